"""Groups of records: their numbers are those of the records by themselves; small ones are marked; gaps by hand."""

from __future__ import annotations

import fairlearn.metrics
import numpy as np
import pytest

from dsft.metrics import classification, groups
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


def test_labels_by_group_are_as_fair_as_fairlearn_says():
    draw = np.random.default_rng(1)
    logits, targets = draw.normal(size=(300, 3)), draw.integers(0, 3, 300)
    logits[np.arange(300), targets] += 1
    sexes = np.array(["a", "b", "c"])[draw.integers(0, 3, 300)]
    logits[sexes == "b", 1] += 1
    rows = {"logits": logits, "targets": targets, "counts": np.ones(300)}

    def judge(own, places):
        assert (own["targets"] == targets[places]).all()
        each = classification.per_label(own["logits"], own["targets"], own["counts"])
        numbers = classification.single_label(own["logits"], own["targets"], own["counts"])
        return numbers, {"labels": dict(zip("xyz", each))}

    keys = dict(enumerate(sexes.tolist()))
    found = groups.compare_judged(judge, rows, np.arange(300), keys, {"accuracy": "higher", "log_loss": "lower"})
    for number, label in enumerate("xyz"):
        given = targets == number, logits.argmax(-1) == number
        for name, value in found["fairness"][label].items():
            expected = getattr(fairlearn.metrics, name)(*given, sensitive_features=sexes)
            assert value == pytest.approx(expected), (label, name)
    accuracies = {key: (logits.argmax(-1) == targets)[sexes == key].mean() for key in "abc"}
    for key, own in found["groups"].items():
        assert own["accuracy"] == pytest.approx(accuracies[key]) and own["records"] == (sexes == key).sum()
        low, high = own["intervals"]["accuracy"]
        spread = np.sqrt(accuracies[key] * (1 - accuracies[key]) / own["records"])
        assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.35)
    assert found["worst"]["accuracy"] == min(accuracies, key=accuracies.get)
    assert found["gap"]["accuracy"] == pytest.approx(max(accuracies.values()) - min(accuracies.values()))


def test_the_group_of_a_record():
    fields = {"a": {"b": 3}, "c.d": "x", "e": None, "f": "中文"}
    names = ["a.b", "c.d", "e", "f", "g", "a.b.c"]
    assert [groups.value(fields, name) for name in names] == ["3", "x", "(none)", "中文", "(none)", "(none)"]
