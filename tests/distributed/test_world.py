"""What one rank alone finds out, told to all of them."""

import cases

from dsft.errors import UserError


def test_a_mistake_that_rank_0_finds_is_everyone_s(pools):
    main, other = pools(2).run(cases.from_main_fails, error=UserError)
    assert main == other == ("UserError", "rank 0: out of luck")


def test_an_unexpected_exception_on_rank_0_leaves_nobody_in_a_collective(pools):
    main, other = pools(2).run(cases.from_main_fails, error=ZeroDivisionError)
    assert main == ("ZeroDivisionError", "out of luck")
    assert other == ("PeerFailed", "rank 0: ZeroDivisionError: out of luck")


def test_an_exception_that_does_not_pickle_is_told_all_the_same(pools):
    other, failed = pools(2).run(cases.all_succeed_but, rank=1)
    assert failed == ("Locked", "held")
    assert other == ("PeerFailed", "rank 1: Locked: held")
