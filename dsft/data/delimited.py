"""Delimited text as spreadsheets and data frames write it, each record with the line that it begins on.

It is read by the standard library, since a data frame would guess types (an answer `007` would become 7, an answer `NA`
nothing).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

from dsft.data.raw import BadRecord, Raw, Reading, printable
from dsft.data.text import bad_text, find_encoding, open_text
from dsft.errors import UserError

LONGEST = 1 << 26
"""Characters of the longest cell."""

LONGEST_NAME = 100
"""Characters of the longest name of a field."""

NO_HEADER = (
    "; if the first line of this file holds no names of fields, give them in order, such as "
    "data.header=[prompt,completion]"
)
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_DIRECTIVE = "sep="
"""How a first line begins that tells Excel the delimiter."""

Row = tuple[list[str], int, str | None]
"""Cells, the line on which they begin, and what is wrong with them."""


def reader(delimiters: str) -> Callable[[Path, Reading], Iterator[Raw | BadRecord]]:
    """A reader of files that are delimited by one of some characters, of which the first is the usual one."""

    def records(path: Path, reading: Reading) -> Iterator[Raw | BadRecord]:
        encoding = find_encoding(path, reading)
        csv.field_size_limit(LONGEST)
        with open_text(path, encoding, newline="") as file:
            delimiter, skipped = _delimiter(file, delimiters, reading)
        if delimiter != delimiters[0]:
            reading.note(f"with fields separated by {delimiter!r}", path)
        with open_text(path, encoding, newline="") as file:
            for _ in range(skipped):
                file.readline()
            yield from _records(path, _rows(path, file, delimiter, skipped), reading.header, encoding.damaged)

    return records


def _delimiter(file: TextIO, delimiters: str, reading: Reading) -> tuple[str, int]:
    """The delimiter by which the first rows have alike many cells, more than one, and lines before the first row."""
    lines = list(islice(file, 100))
    first = lines[0].strip() if lines else ""
    if first.lower().startswith(_DIRECTIVE) and len(first) == len(_DIRECTIVE) + 1:
        return first[-1], 1

    def cells(delimiter: str) -> tuple[bool, bool, int]:
        try:
            rows = list(islice((row for row in csv.reader(lines, delimiter=delimiter) if row), 2))
        except csv.Error:
            return False, False, 0
        widths = [len(row) for row in rows] or [0]
        return widths[0] == len(reading.header), widths[0] == widths[-1] > 1, widths[0]

    return max(delimiters, key=lambda delimiter: (*cells(delimiter), -delimiters.index(delimiter))), 0


def _rows(path: Path, file: TextIO, delimiter: str, skipped: int) -> Iterator[Row]:
    """All rows that are not blank. A row that is broken on its first line is bad, and the next line begins another.

    Raises:
        UserError: A row is broken behind its first line, so that it cannot be told where it should end.
    """
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            line, last = begin + skipped, rows.line_num + skipped
            wrong = f"the quotes of this row do not match: {error}" + (f" on line {last}" if last > line else "")
            if last > line and next(file, None) is not None:
                raise UserError(f"{path}:{line}: {wrong}") from error
            yield [], line, wrong
            continue
        if row is None:
            return
        if row:
            yield row, begin + skipped, None


def _records(path: Path, rows: Iterator[Row], names: Sequence[str], damaged: bool) -> Iterator[Raw | BadRecord]:
    header, width, read = list(names), len(names), False
    for row, line, wrong in rows:
        origin = f"{path}:{line}"
        if not header:
            if wrong or (wrong := _no_header(row)):
                raise UserError(f"{origin}: {wrong}")
            width = len(row)
            header = [*_without_blanks(row)]
        elif wrong or (wrong := _no_record(row, header, width, damaged)):
            yield BadRecord(origin, wrong)
        else:
            # that the first line holds no names shows in the first record, if they do not look like names
            doubt = not names and not read and not all(map(_NAME.fullmatch, header))
            read = True
            yield Raw(dict(zip(header, row, strict=False)), origin, hint=NO_HEADER if doubt else "")


def _no_record(row: list[str], header: list[str], width: int, damaged: bool) -> str | None:
    if row == header:
        return "the names of the fields stand here again; leave out data.header if this is the first line"
    if len(row) != width:
        return f"{len(row)} fields where the header has {width}"
    if any(row[len(header) :]):
        return f"field {len(header) + 1} has no name in the header"
    return next((wrong for cell in row if (wrong := bad_text(cell, damaged))), None)


def _no_header(row: list[str]) -> str | None:
    names = _without_blanks(row)
    if twice := [name for name in names if names.count(name) > 1]:
        return f"two fields have the name {printable(twice[0])!r}"
    if any(len(name) > LONGEST_NAME or "\n" in name for name in names):
        return (
            "this is no line with the names of fields: if the file has none, give them in order, such as "
            "data.header=[prompt,completion]"
        )
    return bad_text("".join(names), damaged=True)


def _without_blanks(row: list[str]) -> list[str]:
    """Without the empty cells at the end that a spreadsheet fills in."""
    return row[: max((number for number, cell in enumerate(row, start=1) if cell), default=0)]
