"""A record that is longer than a row, as several examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dsft.types import Dropped, Example

EMPTY = "parts of longer records with nothing to learn (data.on_overflow=split)"


def windows(
    example: Example, max_length: int, make: Callable[[dict[str, np.ndarray]], Example]
) -> list[Example | Dropped]:
    """The example in parts of at most `max_length` tokens that follow one another, none of them overlapping.

    Args:
        example: One of any length.
        max_length: Tokens of the longest part.
        make: The task's own rule: makes an example of a part's columns, its weight among it. Columns with a value
            for each token are cut, the others are given to every part whole.

    Returns:
        The example itself if it fits. Else its parts in order; a part without weight comes as a Dropped, so that it is
        counted.
    """
    if example.tokens <= max_length:
        return [example]
    parts: list[Example | Dropped] = []
    for begin in range(0, example.tokens, max_length):
        cut = slice(begin, begin + max_length)
        # a copy: what a task changes in one part is not to change the others
        columns = {
            name: (column[cut] if len(column) == example.tokens else column).copy()
            for name, column in example.columns.items()
        }
        part = replace(make(columns), record=example.record, number=example.number)
        parts.append(part if part.weight else Dropped(EMPTY))
    return parts
