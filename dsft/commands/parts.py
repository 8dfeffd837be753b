"""Blocks of predictions as files, each whole or not there, and beside them what their scores need."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsft.errors import UserError
from dsft.runtime.files import write_bytes
from dsft.types import Example


@dataclass
class Piece:
    """What one rank made of its share of a block.

    Attributes:
        lines: Number of a record -> what is written of it.
        rows: What `Task.judge` needs of those with a reference.
        examples: Theirs.
    """

    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)


def write(part: Path, pieces: list[Piece]) -> None:
    """Write what all ranks made of a block; what its scores need first, so that a whole part has it."""
    lines: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        lines |= piece.lines
    judged = [piece for piece in pieces if piece.examples]
    text = "".join(f"{json.dumps(lines[number], ensure_ascii=False)}\n" for number in sorted(lines))
    try:
        if judged:
            write_bytes(part.with_suffix(".scores"), _packed(judged))
        write_bytes(part, text.encode("utf-8", errors="backslashreplace"))
    except OSError as problem:
        raise UserError(
            f"{part.parent} cannot be written to: {problem.strerror}. Once it can, the same command goes on from there."
        ) from problem


def _packed(pieces: list[Piece]) -> bytes:
    """Rows and examples of pieces as NumPy's archive, which holds nothing but arrays."""
    arrays: dict[str, np.ndarray] = {}
    for number, piece in enumerate(pieces):
        arrays |= {f"{number}/rows/{name}": values for name, values in piece.rows.items()}
        for name in piece.examples[0].columns:
            values = [example.columns[name] for example in piece.examples]
            arrays[f"{number}/column/{name}"] = np.concatenate(values)
            arrays[f"{number}/sizes/{name}"] = np.array([len(one) for one in values])
        about = [[example.tokens, example.weight, example.record] for example in piece.examples]
        arrays[f"{number}/about"] = np.array(about, np.float64)
    file = io.BytesIO()
    keywords: Any = arrays  # mypy takes them for those of savez
    np.savez(file, **keywords)
    return file.getvalue()


def unpacked(file: Path) -> Iterator[tuple[dict[str, np.ndarray], list[Example]]]:
    """Rows and examples that `write` put beside a part."""
    with np.load(file, allow_pickle=False) as archive:
        for number in itertools.count():
            if f"{number}/about" not in archive:
                return
            found: dict[str, dict[str, np.ndarray]] = {"rows": {}, "column": {}, "sizes": {}}
            for key in archive.files:
                owner, kind, *name = key.split("/")
                if owner == str(number) and name:
                    found[kind][name[0]] = archive[key]
            columns = {
                name: np.split(values, np.cumsum(found["sizes"][name])[:-1]) for name, values in found["column"].items()
            }
            yield (
                found["rows"],
                [
                    Example({name: parts[place] for name, parts in columns.items()}, int(tokens), weight, int(record))
                    for place, (tokens, weight, record) in enumerate(archive[f"{number}/about"].tolist())
                ],
            )
