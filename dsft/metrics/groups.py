"""A set's scores by groups of its records: each group's numbers, how sure they are, which is worst, how far apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsft.metrics.scores import Score, intervals, total

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
    """Scores of each group, and between groups.

    Args:
        scores: By name.
        tables: Statistics of each record for each of them, shape (records, k).
        keys: Group of each record.

    Returns:
        `groups`: name -> `records`, `small` where there are fewer than FEW, each metric's number and, under
        `intervals`, its 95 % bootstrap interval; `worst`: metric -> the group that is worst by it; `gap`: metric -> how
        far the best and the worst are apart. Of metrics without a better direction neither, and of small groups.
    """
    order = sorted(set(keys))
    labels = np.array(keys)
    made: dict[str, dict[str, Any]] = {}
    for key in order:
        mine = labels == key
        own: dict[str, Any] = {"records": int(mine.sum())}
        if own["records"] < FEW:
            own["small"] = True
        between: dict[str, tuple[float, float]] = {}
        for name, score in scores.items():
            own |= score.form(total(tables[name][mine]))
            between |= intervals(score, tables[name][mine])
        made[key] = own | {"intervals": between}
    worst: dict[str, str] = {}
    gap: dict[str, float] = {}
    for score in scores.values():
        for name, metric in score.metrics.items():
            known = [(own[name], key) for key, own in made.items() if name in own and "small" not in own]
            if metric.better is None or len(known) < 2:
                continue
            low, high = min(known), max(known)
            worst[name] = low[1] if metric.better == "higher" else high[1]
            gap[name] = high[0] - low[0]
    return {"groups": made, "worst": worst, "gap": gap}
