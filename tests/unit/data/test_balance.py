"""Records of rare labels more often, those of frequent ones less often."""

from types import SimpleNamespace

import numpy as np
import pytest

from dsft.config.schema import Resampling
from dsft.data.balance import resampled
from dsft.data.cache import Column
from dsft.data.dataset import TokenDataset
from dsft.errors import UserError

LABELS = np.array([7] * 11 + [9] * 3 + [7] * 2 + [8] * 4, np.uint64)


def data(counts=None) -> TokenDataset:
    """Examples of LABELS of which the last but one is held out."""
    offsets = np.concatenate([[0], np.cumsum(counts if counts is not None else np.ones(len(LABELS), int))])
    values = np.resize(LABELS, offsets[-1])
    entry = SimpleNamespace(
        columns={"labels": Column(values, offsets)},
        tokens=np.arange(len(LABELS), dtype=np.int32),
        weights=np.arange(len(LABELS), dtype=float),
    )
    return TokenDataset("key", entry, np.delete(np.arange(len(LABELS)), -2))


def test_rare_labels_are_taken_as_often_as_the_most_frequent_one():
    made, about = resampled(data(), "labels", Resampling.oversample, 0)
    taken = np.bincount(made.selection, minlength=len(LABELS))
    assert taken[-2] == 0 and (np.diff(made.selection) >= 0).all()
    for label in (7, 8, 9):
        own = np.delete(taken, -2)[np.delete(LABELS, -2) == label]
        assert own.sum() == 13 and own.max() - own.min() <= 1
    assert about == {"how": "oversample", "examples_before": 19, "examples_after": 39}
    assert (made.weights == made.selection).all() and (made.lengths == made.selection).all()


def test_frequent_labels_are_taken_as_often_as_the_rarest_one():
    made, _ = resampled(data(), "labels", Resampling.undersample, 0)
    taken = np.bincount(made.selection, minlength=len(LABELS))
    assert taken.max() == 1 and taken[-2] == 0
    assert [int(taken[label == LABELS].sum()) for label in (7, 8, 9)] == [3, 3, 3]


def test_what_is_drawn_depends_on_the_seed_alone():
    first, again, other = (resampled(data(), "labels", Resampling.undersample, seed)[0] for seed in (0, 0, 1))
    assert (first.selection == again.selection).all() and first.key == again.key != "key"
    assert (first.selection != other.selection).any() and first.key != other.key


def test_several_labels_at_once_are_refused():
    counts = np.ones(len(LABELS), int)
    counts[3] = 2
    with pytest.raises(UserError, match="data.balance=oversample needs records with one label each"):
        resampled(data(counts), "labels", Resampling.oversample, 0)
