"""The next step's batches, made in the background: the same steps, the same cursor, and no thread left behind."""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import closing
from itertools import islice

import pytest
import torch
from test_loader import loader

from dsft.data.ahead import ahead

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dsft-ahead")]


def test_steps_and_cursors_are_those_of_the_loader_alone():
    """Over the end of an epoch, and the cursor is that of the step that was handed out last."""
    alone, made = loader(), loader()
    count = 2 * alone._planner.steps(0)
    seen = 0
    for expected, found in zip(islice(alone, count), made.ahead(count, CPU), strict=True):
        assert (found.tokens, found.weight, found.epoch) == (expected.tokens, expected.weight, expected.epoch)
        for a, b in zip(found.batches, expected.batches, strict=True):
            assert a.lengths == b.lengths and a.step == b.step
            assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)
        assert made.state_dict() == alone.state_dict()
        assert (made.epochs, made.progress()) == (alone.epochs, alone.progress())
        seen += 1
    assert seen == count and not threads()


def test_an_iteration_that_is_left_can_be_taken_up():
    made, alone = loader(), loader()
    with closing(made.ahead(9, CPU)) as steps:
        for _ in range(3):
            next(steps)
    assert not threads()
    later = loader()
    later.load_state_dict(made.state_dict())
    expected = list(islice(alone, 5))[3:]
    for a, b in zip(expected, later.ahead(2, CPU), strict=True):
        assert a.batches[0].numbers == b.batches[0].numbers


def test_the_next_item_is_made_while_this_one_is_in_use():
    made = []
    with closing(ahead(iter(made.append(n) or n for n in range(5)))) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 10
        while len(made) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1]  # and no more than the next


def test_an_exception_comes_when_its_turn_comes_with_its_traceback():
    def items():
        yield 1
        raise KeyError("no such record")

    found = []
    with pytest.raises(KeyError, match="no such record") as raised:
        for item in ahead(items()):
            found.append(item)
    assert found == [1] and not threads()
    assert "items" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


def test_an_exception_in_the_loop_ends_the_thread():
    with pytest.raises(ZeroDivisionError), closing(loader().ahead(9, CPU)) as steps:
        next(steps)
        raise ZeroDivisionError
    assert not threads()
