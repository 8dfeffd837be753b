"""Words in columns, as CoNLL files have them: a word on each line with its tag in the last column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsft.data.raw import BadRecord, Raw, Reading
from dsft.data.text import bad_text, find_encoding, open_text

DOCUMENT = "-DOCSTART-"
"""The word that begins a document in CoNLL 2003, and is none of its."""


def records(path: Path, reading: Reading) -> Iterator[Raw | BadRecord]:
    """A record for each sentence: its words in `tokens`, what stands in the last column of each in `tags`.

    Blank lines are between sentences. Columns are separated by tabs, or by spaces where a line has no tab; a single
    column that begins with `#`, and lines like `# sent_id = 3`, are comments. All lines of a sentence have as many
    columns, at least two.
    """
    encoding = find_encoding(path, reading)
    with open_text(path, encoding, newline=None) as file:
        begun, rows = 1, list[list[str]]()
        for number, line in enumerate(file, 1):
            text = line.rstrip("\n").removeprefix("\ufeff" if number == 1 else "")
            columns = text.split("\t") if "\t" in text else text.split()
            if not text.strip():
                yield from _sentence(path, begun, rows, encoding.damaged)
                begun, rows = number + 1, []
            elif _is_comment(text, columns):
                reading.note("with comment lines", path)
                begun += not rows
            else:
                rows.append(columns)
        yield from _sentence(path, begun, rows, encoding.damaged)


def _is_comment(text: str, columns: list[str]) -> bool:
    return text.startswith("#") and "\t" not in text and (len(columns) == 1 or " = " in text)


def _sentence(path: Path, begun: int, rows: list[list[str]], damaged: bool) -> Iterator[Raw | BadRecord]:
    """The record of a sentence's lines, the first of which is the file's line `begun`."""
    rows = [row for row in rows if row[0] != DOCUMENT]
    if not rows:
        return
    origin = f"{path}:{begun}"
    width = len(rows[0])
    for number, row in enumerate(rows):
        if wrong := bad_text("\t".join(row), damaged):
            yield BadRecord(f"{path}:{begun + number}", wrong)
            return
        if len(row) != width or width < 2 or not (row[0].strip() and row[-1].strip()):
            yield BadRecord(
                f"{path}:{begun + number}",
                f"a line with {len(row)} column(s) in a sentence with {width}: a word and its tag are needed on each "
                "line (`word<TAB>tag`), and a blank line between sentences",
            )
            return
    yield Raw({"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]}, origin)
