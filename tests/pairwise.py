"""Which cases of a product to try every day: every pair of values meets in one of them.

The whole product is tried with DSFT_PUBLISH=1, which writes its figures into the documents that publish them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

PUBLISH = bool(os.environ.get("DSFT_PUBLISH"))
"""Whether whole products are tried, and published."""


def cases(*dimensions: Sequence[Any]) -> list[tuple]:
    """The whole product where it is published, else a part of it that covers all pairs."""
    return list(itertools.product(*dimensions)) if PUBLISH else cover(*dimensions)


def cover(*dimensions: Sequence[Any]) -> list[tuple]:
    """Cases in which every value of every dimension meets every value of every other one.

    Each next case is the one of the product that brings together most pairs not met so far, the first where several
    do: the same list every time.
    """
    product = list(itertools.product(*(range(len(values)) for values in dimensions)))
    places = list(itertools.combinations(range(len(dimensions)), 2))

    def pairs(case: tuple) -> set[tuple]:
        return {(a, b, case[a], case[b]) for a, b in places}

    missing = set().union(*map(pairs, product))
    chosen = []
    while missing:
        best = max(product, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return [tuple(values[i] for values, i in zip(map(tuple, dimensions), case)) for case in chosen]
