"""Products of choices, thinned out: by day any two choices meet, and the whole product is for the day of publishing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest

PUBLISH = "DSFT_PUBLISH"
"""Set in the environment, it asks for whole products, and for their figures in the documents."""


def product(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over the product of its axes: the pairwise cover, or all of it where PUBLISH is set."""
    rows = itertools.product(*axes.values()) if os.environ.get(PUBLISH) else cover(list(axes.values()))
    return pytest.mark.parametrize(tuple(axes), list(rows))


def cover(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows of the product in which each choice of an axis meets each choice of each other axis at least once.

    Greedy: always the row that brings the most new pairs, the first of several. So it is the same every time.
    """

    def pairs(row: tuple[int, ...]) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(axis[i] for axis, i in zip(axes, row)) for row in chosen or rows]
