"""Labels: as records write them, as the cache keeps them, and as the numbers of a model's outputs.

Which labels there are is known when all records have been read, and a record is encoded before. So the cache keeps a
hash of each label's name, and the report of an entry its names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from dsft.config.schema import Balance, TaskConfig
from dsft.errors import UserError

COLUMN = "labels"
"""The column of an example's labels: `key` of each, uint64."""

SHOWN = 10
"""Names that a message lists at most."""


def name_of(value: Any, field: str) -> str:
    """The name of a label, which may be written as text, a whole number, or true and false.

    Raises:
        ValueError: It is none; the message names the field.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    what = "empty" if isinstance(value, str) else f"{value!r:.40}"
    raise ValueError(f"field `{field}` is {what}: a label is a name, a whole number, true or false")


def key(name: str) -> int:
    """The hash by which the cache keeps a label, 64 bits."""
    return xxhash.xxh3_64_intdigest(name.encode())


def keys(names: Sequence[str]) -> np.ndarray:
    """Those of several, uint64."""
    return np.array([key(name) for name in names], np.uint64)


@dataclass(frozen=True)
class Labels:
    """The labels of a run.

    Attributes:
        names: In the order of the model's outputs.
        weights: What a record of each counts in the loss of training; 1 where nothing is balanced.
        scale: Of numbers, the standard deviation of each in training.
        shift: Of numbers, the mean.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()

    def numbers(self, hashes: np.ndarray) -> np.ndarray:
        """The numbers of labels that the cache keeps, int64, the same shape."""
        order, rising = self._table
        found = np.searchsorted(rising, hashes).clip(max=len(rising) - 1)
        assert (rising[found] == hashes).all(), "every label of the data has been collected"
        return order[found]

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        hashes = keys(self.names)
        order = np.argsort(hashes)
        return order, hashes[order]


def collected(reports: Mapping[str, dict[str, Any]], given: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """The names of all labels, in the order of the model's outputs.

    Args:
        reports: Of each place that was read, the training data's first -> its labels: name -> how many records have it,
            and where the first one is (`Entry.report["labels"]`).
        given: `task.labels`.
        own: Names of the outputs that the model has been trained for already, in order; kept where they are the same.

    Raises:
        UserError: A label is not among those given, or is nowhere in the training data; or there are fewer than two.
    """
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise UserError(f"task.labels names {', '.join(twice)} twice")
    train = next(iter(reports.values()))
    known = set(given) or set(train)
    for place, found in reports.items():
        if unknown := sorted(found.keys() - known, key=_order):
            raise UserError(_unknown(place, unknown, found, bool(given)))
    if len(known) < 2:
        raise UserError(
            f"there is only one label ({', '.join(known) or 'none at all'}), so that there is nothing to learn: give "
            "task.labels, or records with others"
        )
    if given:
        return tuple(given)
    return tuple(own) if set(own) == known else tuple(sorted(known, key=_order))


def _unknown(place: str, unknown: list[str], found: dict[str, Any], given: bool) -> str:
    shown = ", ".join(f"{name!r} ({found[name][0]} records, the first {found[name][1]})" for name in unknown[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    where = "task.labels does not name" if given else "no training record has"
    remedy = "add them there" if given else "name all labels in task.labels if they belong there"
    return f"{place}: labels that {where}: {shown}{more}. Correct the records, or {remedy}."


def _order(name: str) -> tuple[bool, int, str]:
    """Numbers by their size, before names by the alphabet."""
    number = name.lstrip("-").isdecimal()
    return not number, int(name) if number else 0, name


def weights(names: Sequence[str], counts: np.ndarray, records: float, settings: TaskConfig) -> tuple[float, ...]:
    """What a label counts in the loss of training.

    With one label for a record it is what a record of the label counts, 1 in the mean over records. With several at
    once it is what a record that has the label counts, where one that has it not counts 1.

    Args:
        names: Of all labels.
        counts: Weight of the training records of each, float64.
        records: Weight of all training records.
        settings: `balance`, `effective_beta`, `label_weights` and `multi_label`.

    Raises:
        UserError: Weights are given that fit no labels, or beside a way to balance.
    """
    if settings.label_weights:
        _check_given(names, settings)
        return tuple(settings.label_weights)
    if settings.balance is Balance.none:
        return (1.0,) * len(names)
    others = records - counts
    if settings.balance is Balance.effective_number:
        beta = settings.effective_beta
        counts_as, others = 1 - np.power(beta, counts), 1 - np.power(beta, others)
    else:
        counts_as = counts
    found = counts > 0
    if settings.multi_label:
        return tuple(np.divide(others, counts_as, out=np.ones(len(names)), where=found).tolist())
    raw = np.divide(1.0, counts_as, out=np.zeros(len(names)), where=found)
    return tuple((raw * counts.sum() / (raw * counts).sum()).tolist())


def _check_given(names: Sequence[str], settings: TaskConfig) -> None:
    values = settings.label_weights
    if settings.balance is not Balance.none:
        raise UserError("task.label_weights stands beside task.balance: leave one of them out")
    if not settings.labels or len(values) != len(names):
        raise UserError(
            f"task.label_weights has {len(values)} weights for {len(names)} labels: give one for each label, in the "
            f"order of task.labels=[{','.join(names)}], which has to be given too"
        )
    if not all(0 <= value < float("inf") for value in values) or not any(values):
        raise UserError("task.label_weights: weights are 0 or more, finite, and not all 0")
