"""Long texts in overlapping windows, of which each token is answered in one."""

from __future__ import annotations

import itertools

Window = tuple[int, int, int, int]
"""Tokens (begin, end) of a window, and those of them (from, to) that it answers."""


def windows(length: int, room: int, overlap: int) -> list[Window]:
    """Windows that cover `length` tokens; each token is answered where it stands farthest from a cut.

    Args:
        length: Tokens.
        room: Of a window at most.
        overlap: That neighbours have in common, fewer than `room`; the last one has more, so that it is full.

    Returns:
        In order; the tokens answered follow one another without gap or repetition.
    """
    if length <= room:
        return [(0, length, 0, length)]
    begins = [*range(0, length - room, room - overlap), length - room]
    bounds = [0, *((left + room + right) // 2 for left, right in itertools.pairwise(begins)), length]
    return [(begin, begin + room, *bounds[n : n + 2]) for n, begin in enumerate(begins)]
