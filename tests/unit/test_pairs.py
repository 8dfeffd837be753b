"""The thinned-out products of the other tests."""

import itertools

import pairs
import pytest

AXES = [("a", "b", "c", "d"), (1, 2), ("x", "y", "z"), (None, 0.5), (True, False)]


def test_any_two_choices_meet_and_few_rows_suffice():
    rows = pairs.cover(AXES)
    for (i, first), (j, second) in itertools.combinations(enumerate(AXES), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(first, second))
    assert len(set(rows)) == len(rows) < 20 < 96
    assert pairs.cover(AXES) == rows


@pytest.mark.parametrize("axes", [[("a", "b")], [("a", "b"), (1, 2, 3)]])
def test_two_axes_or_one_stay_whole(axes):
    assert sorted(pairs.cover(axes)) == sorted(itertools.product(*axes))


def test_the_whole_product_is_made_on_request(monkeypatch):
    monkeypatch.setenv(pairs.PUBLISH, "1")
    names, rows = pairs.product(stage=AXES[0], ranks=AXES[1], way=AXES[2]).args
    assert names == ("stage", "ranks", "way")
    assert rows == list(itertools.product(*AXES[:3]))
    monkeypatch.delenv(pairs.PUBLISH)
    assert len(pairs.product(stage=AXES[0], ranks=AXES[1], way=AXES[2]).args[1]) == 12
