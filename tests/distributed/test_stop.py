"""All ranks stop after the same step, whoever was asked, and whenever."""

from __future__ import annotations

import cases
import pytest

TERM, USR1 = "SIGTERM", "SIGUSR1"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], (None, 9, 9)),
        # the step after the one in which it was asked
        ([(1, 3, "before", TERM)], (TERM, 4, 4)),
        ([(0, 3, "after", USR1)], (USR1, 4, 4)),
        ([(1, 0, "before", TERM)], (TERM, 2, 2)),
        # asked twice: the first counts
        ([(1, 3, "before", TERM), (1, 4, "before", TERM)], (TERM, 4, 4)),
        # the step before the last, and the last, where ranks meet for the last evaluation
        ([(1, 8, "before", TERM)], (TERM, 9, 9)),
        ([(1, 9, "after", TERM)], (TERM, 9, 9)),
    ],
)
def test_every_rank_stops_after_the_step_that_the_first_to_be_asked_names(pools, asked, expected):
    assert pools(2).run(cases.stops, asked=asked) == [expected] * 2


@pytest.mark.parametrize("names", [(TERM, TERM), (TERM, USR1)])
@pytest.mark.parametrize("moments", [("before", "before"), ("after", "before"), ("after", "after")])
def test_two_ranks_that_are_asked_at_once_agree(pools, names, moments):
    """And again in the step after, by a rank that may have read what the other wrote."""
    first, second = pools(2).run(
        cases.stops, asked=[(0, 3, moments[0], names[0]), (1, 3, moments[1], names[1]), (1, 4, "before", names[1])]
    )
    assert first == second
    assert first[0] in names and first[1:] == (4, 4)


def test_asked_during_an_evaluation_all_stop_there(pools):
    asked = [(1, 4, "evaluation", USR1)]
    assert pools(2).run(cases.stops, asked=asked, eval_every=2) == [(USR1, 4, 4)] * 2
