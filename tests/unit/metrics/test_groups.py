"""Groups of records: their numbers are those of the records by themselves; small ones are marked; gaps by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dsft.metrics import groups
from dsft.metrics.scores import chosen


def test_groups_are_sets_of_their_own():
    scores = chosen(["answer", "ter"])
    draw = np.random.default_rng(0)
    records = [("a b c d", [" ".join(draw.choice(list("abcd"), 4))], "en") for _ in range(100)]
    records[:40] = [(said, [said], own) for said, _, own in records[:40]]
    keys = ["good"] * 40 + ["bad"] * 55 + ["few"] * 5
    tables = {name: np.stack([score.statistics(*one) for one in records]) for name, score in scores.items()}
    found = groups.compare(scores, tables, keys)
    for key, own in found["groups"].items():
        mine = [one for one, name in zip(records, keys) if name == key]
        assert own["records"] == len(mine) and own.get("small", False) == (key == "few")
        for score in scores.values():
            for name, value in score.of_set(mine).items():
                assert own[name] == value
                low, high = own["intervals"][name]
                assert low <= value <= high
    assert found["worst"] == {"exact": "bad", "token_f1": "bad", "ter": "bad"}
    assert found["gap"]["exact"] == pytest.approx(1 - found["groups"]["bad"]["exact"])
    assert found["gap"]["ter"] == pytest.approx(found["groups"]["bad"]["ter"])
    assert groups.compare(scores, tables, keys) == found
    alone = groups.compare(scores, tables, ["all"] * 100)
    assert alone["worst"] == alone["gap"] == {}


def test_the_group_of_a_record():
    fields = {"a": {"b": 3}, "c.d": "x", "e": None, "f": "中文"}
    names = ["a.b", "c.d", "e", "f", "g", "a.b.c"]
    assert [groups.value(fields, name) for name in names] == ["3", "x", "(none)", "中文", "(none)", "(none)"]
