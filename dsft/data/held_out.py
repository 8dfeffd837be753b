"""Which records are held out of training. Those that say the same, and those of one group, stay on one side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sides(
    contents: np.ndarray, groups: np.ndarray, strata: np.ndarray, shares: Sequence[float], seed: int
) -> np.ndarray:
    """Where each record goes.

    Records with equal contents, or of one group, make a unit, and a unit is never taken apart. Units are drawn in an
    order that depends on `seed` alone, and taken while they fit into a side's share of each stratum; those of several
    strata count for the one of their first record. Where there are two units, a side gets one at least.

    Args:
        contents: A hash of what each record says, shape (records,); 0 where it is not known.
        groups: A hash of each record's group; 0 for one of its own.
        strata: A hash of each record's stratum; all alike for none.
        shares: Of the records, for sides 1, 2, ...; less than 1 together. The rest is side 0.
        seed: Of the drawing.

    Returns:
        The number of each record's side, int64, shape (records,).
    """
    units = _units(contents, groups)
    sizes = np.bincount(units)
    of_unit = np.zeros(len(sizes), dtype=np.int64)
    of_unit[units[::-1]] = np.unique(strata, return_inverse=True)[1][::-1]
    order = np.random.default_rng(seed).permutation(len(sizes))
    side = np.zeros(len(sizes), dtype=np.int64)
    for number, share in enumerate(shares, start=1):
        if share > 0:
            free = order[side[order] == 0]
            side[_taken(free, sizes, of_unit, share, len(contents))] = number
    return side[units]


def repeated(contents: np.ndarray) -> int:
    """How many records say what an earlier one says."""
    known = contents[contents != 0]
    return len(known) - len(np.unique(known))


def _units(contents: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The number of each record's unit, counted in the order in which they begin."""
    label = np.arange(len(contents))
    # a record without a key shares one with nobody
    keys = [np.where(one == 0, len(one) + label, np.unique(one, return_inverse=True)[1]) for one in (contents, groups)]
    while True:
        before = label
        for key in keys:
            smallest = np.full(key.max(initial=0) + 1, len(label))
            np.minimum.at(smallest, key, label)
            label = smallest[key]
        if np.array_equal(label, before):
            return np.unique(label, return_inverse=True)[1]


def _taken(order: np.ndarray, sizes: np.ndarray, strata: np.ndarray, share: float, records: int) -> np.ndarray:
    """The units, drawn in this order, that fit into a share of each stratum."""
    if len(order) < 2:
        return order[:0]
    left = _wanted(np.bincount(strata, weights=sizes), share, records)
    chosen: list[int] = []
    for unit in order.tolist():
        if sizes[unit] <= left[strata[unit]] and len(chosen) < len(order) - 1:
            left[strata[unit]] -= sizes[unit]
            chosen.append(unit)
    return np.array(chosen or [min(order.tolist(), key=lambda unit: sizes[unit])])


def _wanted(totals: np.ndarray, share: float, records: int) -> np.ndarray:
    """How many records of each stratum are wanted: whole numbers, with the largest remainders rounded up."""
    exact = totals * share
    wanted = np.floor(exact).astype(np.int64)
    missing = max(round(records * share), 1) - int(wanted.sum())
    for stratum in np.argsort(wanted - exact, kind="stable")[: max(missing, 0)]:
        wanted[stratum] += 1
    return wanted
