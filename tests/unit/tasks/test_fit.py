"""Examples that are too long: cut, taken apart, dropped, refused."""

from itertools import pairwise

import numpy as np
import pytest

from dsft.config.schema import OnOverflow
from dsft.errors import UserError
from dsft.tasks.causal_lm import weighed
from dsft.tasks.fit import EMPTY, TOO_LONG, fit
from dsft.types import Dropped, Example


def fitted(max_length: int, on_overflow: OnOverflow, frame: int = 0):
    supervised = np.array([False, False, True, False, True, False])
    columns = {"ids": np.arange(6, dtype=np.int32), "weights": supervised.astype(np.float32), "label": np.array([7, 8])}
    return fit(columns, weighed, max_length, on_overflow, "f.jsonl:3", frame)


def test_what_fits_stays_as_it_is():
    (whole,) = fitted(6, OnOverflow.error)
    assert (whole.ids.tolist(), whole.weight, whole.truncated) == ([0, 1, 2, 3, 4, 5], 2, False)


def test_the_end_is_cut_off():
    (cut,) = fitted(3, OnOverflow.truncate)
    assert cut.ids.tolist() == [0, 1, 2]
    assert cut.columns["weights"].tolist() == [0, 0, 1]
    assert (cut.tokens, cut.weight, cut.truncated) == (3, 1, True)


def test_windows_hold_every_token_once_and_empty_ones_are_counted():
    parts = fitted(3, OnOverflow.split)
    assert [part.ids.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5]]
    assert {(part.weight, tuple(part.columns["label"]), part.truncated) for part in parts} == {(1, (7, 8), False)}
    # the first token of a window has nothing before it to be predicted from
    assert fitted(2, OnOverflow.split) == [Dropped(EMPTY)] * 3


def test_room_is_left_for_what_is_put_around():
    assert [part.tokens for part in fitted(5, OnOverflow.split, frame=2) if isinstance(part, Example)] == [3, 3]
    with pytest.raises(UserError, match=r"data\.max_length=2 leaves no room beside 2 special tokens"):
        fitted(2, OnOverflow.truncate, frame=2)


def test_it_is_dropped_or_refused_by_name():
    assert fitted(5, OnOverflow.drop) == Dropped(TOO_LONG)
    with pytest.raises(UserError, match=r"f\.jsonl:3: 8 tokens, but data\.max_length is 7"):
        fitted(7, OnOverflow.error, frame=2)


def parts_of(tokens: int, room: int, cuts=(), supervised=None):
    """Ids of each part, and which of them are targets."""
    weights = np.ones(tokens, np.float32) if supervised is None else np.asarray(supervised, np.float32)
    columns = {"ids": np.arange(tokens, dtype=np.int32), "weights": weights}
    parts = fit(columns, weighed, room, OnOverflow.split, "", cuts=cuts, needs_before=weights > 0)
    return [(part.ids.tolist(), part.ids[part.columns["weights"] > 0].tolist()) for part in parts]


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 14, 15, 16, 100, 1000, 100_000])
@pytest.mark.parametrize("room", [2, 3, 8, 2048])
def test_every_token_but_the_first_is_a_target_once(tokens, room):
    parts = parts_of(tokens, room)
    assert [target for _, targets in parts for target in targets] == list(range(1, tokens))
    assert all(len(ids) <= room for ids, _ in parts)
    assert all(later[0][0] == earlier[0][-1] for earlier, later in pairwise(parts))


def test_a_chat_is_cut_between_turns_where_it_can_be():
    supervised = [0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    parts = parts_of(15, 6, cuts=[4, 7], supervised=supervised)
    # the third turn alone is too long: it is cut where the room ends, and goes on from the token before
    assert parts == [([0, 1, 2, 3], [2, 3]), ([4, 5, 6], [6]), ([7, 8, 9, 10, 11, 12], [9, 10, 11, 12]),
                     ([12, 13, 14], [13, 14])]  # fmt: skip
