"""Examples that are longer than `data.max_length`: cut, split, dropped or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from dsft.config.schema import OnOverflow
from dsft.errors import UserError
from dsft.types import Dropped, Example

TOO_LONG = "longer than data.max_length (data.on_overflow=drop)"
EMPTY = "parts of longer records with nothing to learn (data.on_overflow=split)"

Columns = dict[str, np.ndarray]


def fit(
    columns: Columns,
    make: Callable[[Columns], Example],
    max_length: int,
    on_overflow: OnOverflow,
    origin: str,
    frame: int = 0,
    cuts: Sequence[int] = (),
    needs_before: np.ndarray | None = None,
) -> list[Example | Dropped] | Dropped:
    """Examples of at most `max_length` tokens: one of all that was read, of its beginning, of all its parts, or none.

    Args:
        columns: What was read, `ids` among it. Columns with a value for each token are cut, others go into every part.
        make: The task's own: an example of some columns, its weight among it.
        max_length: Tokens.
        on_overflow: What to do with more.
        origin: Where the record came from, for messages.
        frame: Tokens that `make` puts around a part.
        cuts: Tokens, rising, before which a record is rather cut than elsewhere.
        needs_before: Whether each token is predicted from the one before it, which is then repeated where a part begins
            with it; bool, shape (tokens,).

    Returns:
        The examples in order, with a Dropped for each part without weight of a split record.

    Raises:
        UserError: It is longer, and `on_overflow` is `error`; or `frame` takes all the room.
    """
    tokens, room = len(columns["ids"]), max_length - frame
    if room < 1:
        raise UserError(f"data.max_length={max_length} leaves no room beside {frame} special tokens: raise it.")
    if tokens <= room:
        return [make(columns)]
    if on_overflow is OnOverflow.error:
        raise UserError(
            f"{origin}: {tokens + frame} tokens, but data.max_length is {max_length}; raise it, or choose "
            "data.on_overflow=truncate, split or drop"
        )
    if on_overflow is OnOverflow.drop:
        return Dropped(TOO_LONG)
    if on_overflow is OnOverflow.truncate:
        return [replace(make(_part(columns, 0, room)), truncated=True)]
    parts = (make(_part(columns, begin, end - begin)) for begin, end in _parts(tokens, room, cuts, needs_before))
    return [made if made.weight else Dropped(EMPTY) for made in parts]


def _parts(tokens: int, room: int, cuts: Sequence[int], needs_before: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """Where each part begins and ends."""
    begin = 0
    while tokens - begin > room:
        end = max((cut for cut in cuts if begin + 1 < cut <= begin + room), default=begin + room)
        yield begin, end
        begin = end - 1 if needs_before is not None and needs_before[end] else end
    yield begin, tokens


def _part(columns: Columns, begin: int, tokens: int) -> Columns:
    """A copy of some tokens: what a task changes in one part is not to change the others."""
    cut, whole = slice(begin, begin + tokens), len(columns["ids"])
    return {name: (column[cut] if len(column) == whole else column).copy() for name, column in columns.items()}
