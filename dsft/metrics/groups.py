"""A set's scores by groups of its records: each group's numbers, how sure they are, which is worst, how far apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsft.metrics.scores import Score, intervals, total

RESAMPLES = 200
"""Of an interval of numbers that are formed of all rows at once."""

FEW = 30
"""Records below which a group is said to be small: its numbers are given, and it is no worst and in no gap."""

NOTHING = "(none)"
"""What a record's group is called that has no such field."""


def value(fields: Mapping[str, Any], name: str) -> str:
    """The group that a record is of: its field's value as text; `a.b` is the field b of the object in the field a."""
    found: Any = fields
    for key in [name] if name in fields else name.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return NOTHING if found is None else str(found)


def compare(scores: Mapping[str, Score], tables: Mapping[str, np.ndarray], keys: Sequence[str]) -> dict[str, Any]:
    """Scores of texts by group, and between groups.

    Args:
        scores: By name.
        tables: Statistics of each record for each of them, shape (records, k).
        keys: Group of each record.

    Returns:
        As `_between`.
    """
    labels, made = np.array(keys), dict[str, dict[str, Any]]()
    for key in sorted(set(keys)):
        mine, own, spans = labels == key, dict[str, Any](), dict[str, tuple[float, float]]()
        for name, score in scores.items():
            own |= score.form(total(tables[name][mine]))
            spans |= intervals(score, tables[name][mine])
        made[key] = {"records": int(mine.sum())} | own | {"intervals": spans}
    return _between(made, {name: metric.better for score in scores.values() for name, metric in score.metrics.items()})


def compare_judged(
    judge: Callable[[dict[str, np.ndarray], list[int]], tuple[dict[str, float], dict[str, Any]]],
    rows: Mapping[str, np.ndarray],
    records: np.ndarray,
    keys: Mapping[int, str],
    better: Mapping[str, str | None],
) -> dict[str, Any]:
    """The numbers of an evaluation by group, and between groups.

    Args:
        judge: (rows, which of all rows they are) -> numbers, and what is shown beside them, as `Task.judge`.
        rows: Of the whole evaluation, `counts` among them; a record's are side by side.
        records: Number of each row's record.
        keys: Number of a record -> its group.
        better: Which way is up, by name of a number.

    Returns:
        As `_between`; where there are labels also `fairness`: label -> how far groups are apart by the share that is
        given it (`demographic_parity_difference`), its recall (`equal_opportunity_difference`), and by the larger of
        that and its false positive rate (`equalized_odds_difference`), as fairlearn defines them.
    """
    labels = np.array([keys[record] for record in records.tolist()])
    made: dict[str, dict[str, Any]] = {}
    rates: dict[str, dict[str, Any]] = {}
    for key in sorted(set(labels.tolist())):
        places = np.flatnonzero(labels == key)
        own = {name: values[places] for name, values in rows.items()}
        numbers, about = judge(own, places.tolist())
        _, place, count = np.unique(records[places], return_inverse=True, return_counts=True)
        made[key] = {"records": len(count)} | numbers
        made[key]["intervals"] = _resampled(judge, own, places.tolist(), place, numbers)
        rates[key] = about.get("labels", {})
    found = _between(made, better)
    large = [rates[key] for key, own in made.items() if "small" not in own]
    if len(large) > 1 and all(large):
        found["fairness"] = {label: _fairness([one[label] for one in large if label in one]) for label in large[0]}
    return found


def _resampled(
    judge: Callable[[dict[str, np.ndarray], list[int]], tuple[dict[str, float], dict[str, Any]]],
    rows: dict[str, np.ndarray],
    places: list[int],
    record: np.ndarray,
    numbers: Mapping[str, float],
) -> dict[str, tuple[float, float]]:
    """Percentiles of numbers where records are drawn with replacement: one that is drawn twice counts twice."""
    count = int(record.max()) + 1
    if count < 2:
        return {}
    random, shares = np.random.default_rng([0, count]), np.full(count, 1 / count)
    drawn = []
    for _ in range(RESAMPLES):
        weights = random.multinomial(count, shares)[record]
        drawn.append(judge(rows | {"counts": rows["counts"] * weights}, places)[0])
    common = [name for name in numbers if all(name in one for one in drawn)]
    found = {name: np.quantile([one[name] for one in drawn], [0.025, 0.975]) for name in common}
    return {name: (float(lower), float(upper)) for name, (lower, upper) in found.items()}


def _fairness(rates: list[dict[str, float]]) -> dict[str, float]:
    def apart(name: str) -> float:
        values = [one[name] for one in rates]
        return max(values) - min(values)

    return {
        "demographic_parity_difference": apart("selection_rate"),
        "equal_opportunity_difference": apart("recall"),
        "equalized_odds_difference": max(apart("recall"), apart("false_positive_rate")),
    }


def _between(made: dict[str, dict[str, Any]], better: Mapping[str, str | None]) -> dict[str, Any]:
    """What is told of groups.

    Args:
        made: Group -> `records`, its numbers, and `intervals` with the 95 % bootstrap interval of each.
        better: Which way is up, by name of a number.

    Returns:
        `groups`: that, with `small` where there are fewer than FEW records; `worst`: number -> the group that is worst
        by it; `gap`: number -> how far the best and the worst are apart. Neither of numbers without a better direction,
        nor of small groups.
    """
    for own in made.values():
        own.update({"small": True} if own["records"] < FEW else {})
    worst: dict[str, str] = {}
    gap: dict[str, float] = {}
    for name, way in better.items():
        known = [(own[name], key) for key, own in made.items() if name in own and "small" not in own]
        if way is None or len(known) < 2:
            continue
        low, high = min(known), max(known)
        worst[name] = low[1] if way == "higher" else high[1]
        gap[name] = high[0] - low[0]
    return {"groups": made, "worst": worst, "gap": gap}
