"""A long record in parts: every token once, in order, and what each part weighs is the task's to say."""

import numpy as np
import pytest

from dsft.data.windows import EMPTY, windows
from dsft.types import Dropped, Example


def make(columns):
    columns["supervised"][:1] = False  # nothing comes before a part's first token
    return Example(columns, tokens=len(columns["ids"]), weight=float(columns["supervised"].sum()))


def example(tokens, supervised=()):
    mask = np.zeros(tokens, dtype=bool)
    mask[list(supervised)] = True
    columns = {"ids": np.arange(tokens, dtype=np.int32), "supervised": mask, "label": np.array([7], np.int64)}
    return Example(columns, tokens=tokens, weight=float(mask.sum()), record=5, number=9)


@pytest.mark.parametrize("tokens", [8, 9, 15, 16, 17, 40])
def test_every_token_is_in_one_part_and_columns_stay_together(tokens):
    whole = example(tokens, range(tokens))
    parts = [part for part in windows(whole, 8, make) if isinstance(part, Example)]
    left = tokens % 8 == 1 and tokens > 8  # a part of one token has nothing to learn
    assert np.concatenate([part.ids for part in parts]).tolist() == list(range(tokens - left))
    assert all(part.tokens == len(part.ids) == len(part.columns["supervised"]) <= 8 for part in parts)
    assert all(part.columns["label"].tolist() == [7] and (part.record, part.number) == (5, 9) for part in parts)
    assert whole.columns["supervised"].all(), "the whole example was changed"


def test_a_part_weighs_what_the_task_says_and_one_without_weight_is_counted():
    first, empty, last = windows(example(24, [3, 4, 16, 20]), 8, make)
    assert (first.weight, empty, last.weight) == (2, Dropped(EMPTY), 1)


def test_what_fits_stays_as_it_is():
    one = example(8, [2])
    assert windows(one, 8, make) == [one]
