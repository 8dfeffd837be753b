"""`metrics.jsonl`: the record of a run that all else is drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from numbers import Integral
from pathlib import Path

from dsft.errors import UserError
from dsft.runtime.files import write_bytes

NONFINITE = "/nonfinite"
"""Suffix of the key that says which number a null stands for: `nan`, `inf` or `-inf`."""


class MetricsFile:
    """One JSON object a line: `step` first, then metrics that the run declares.

    JSON has no NaN and no infinity. Such a number is written as null, with its name in a second key, so that every
    JSON reader takes the line: `{"step": 3, "train/loss": null, "train/loss/nonfinite": "nan"}`.

    Args:
        path: The file.
        declared: Names of metrics that may be written.
    """

    def __init__(self, path: Path, declared: Collection[str] = ()):
        self.path = Path(path)
        self._declared = declared

    def write(self, row: dict[str, float]) -> None:
        """Append one row. It is with the operating system on return, so that a killed process loses nothing.

        Args:
            row: `step` and any declared metrics; Python, NumPy or 0-d tensor numbers.

        Raises:
            ValueError: The step is missing, or a name is not declared.
        """
        if undeclared := sorted(row.keys() - {*self._declared, "step"}):
            raise ValueError(f"metrics that the run does not declare: {', '.join(undeclared)}")
        line = json.dumps(_encoded(row), ensure_ascii=False, allow_nan=False) + "\n"
        with open(self.path, "ab") as file:
            file.write(line.encode("utf-8"))

    def rewind(self, step: int) -> int:
        """Drop what was written after `step`: the rows of later steps, and a last line torn by a crash.

        A run goes on from the checkpoint of `step`, and rows of `step` itself were written before that checkpoint, so
        they stay. A run that starts anew rewinds to -1. The file changes in one step, and its kept bytes not at all.

        Returns:
            How many rows were dropped.

        Raises:
            UserError: A line before the last is no JSON object.
        """
        lines = self._lines()
        kept = [line for line, row in lines if row is not None and row["step"] <= step]
        content = b"".join(line + b"\n" for line in kept)
        if lines and content != self.path.read_bytes():
            write_bytes(self.path, content)
        return len(lines) - len(kept)

    def rows(self) -> list[dict[str, float]]:
        """All whole rows in the order they were written, with NaN and infinity as floats again.

        Raises:
            UserError: A line before the last is no JSON object.
        """
        return [_decoded(row) for _, row in self._lines() if row is not None]

    def _lines(self) -> list[tuple[bytes, dict | None]]:
        """Each line with its row; None for a torn last line."""
        if not self.path.exists():
            return []
        raw = self.path.read_bytes().splitlines()
        rows = [_parsed(line) for line in raw]
        if None in rows[:-1]:
            raise UserError(
                f"{self.path}:{rows.index(None) + 1}: this line is no row of metrics. Repair or delete the line, or "
                "start in another run_dir."
            )
        return list(zip(raw, rows, strict=True))


def _parsed(line: bytes) -> dict | None:
    """The row on `line`, or None where there is no whole one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _encoded(row: dict[str, float]) -> dict[str, int | float | str | None]:
    if "step" not in row:
        raise ValueError(f"a row of metrics has no step: {row}")
    encoded: dict[str, int | float | str | None] = {"step": int(row["step"])}
    for name in (name for name in row if name != "step"):
        number = int(row[name]) if isinstance(row[name], Integral) else float(row[name])
        if math.isfinite(number):
            encoded[name] = number
        else:
            encoded |= {name: None, name + NONFINITE: str(number)}
    return encoded


def _decoded(row: dict) -> dict[str, float]:
    """`row` with each null number as the float it stands for."""
    numbers = {name: value for name, value in row.items() if not name.endswith(NONFINITE)}
    return {name: float(row.get(name + NONFINITE, "nan")) if v is None else v for name, v in numbers.items()}
