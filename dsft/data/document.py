"""Files of text, each of them one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsft.data.raw import BadRecord, Raw, Reading
from dsft.data.text import bad_text, find_encoding, open_text

LONGEST = 1 << 26
"""Characters of the longest document; more belong in several."""


def records(path: Path, reading: Reading) -> Iterator[Raw | BadRecord]:
    """The one record of a file: its text, whole, in the field `text`; none of a file that is empty or blank."""
    encoding = find_encoding(path, reading)
    with open_text(path, encoding, newline=None) as file:
        text = file.read(LONGEST + 1)
    origin = f"{path}:1"
    if len(text) > LONGEST:
        yield BadRecord(
            origin,
            f"a document of more than {LONGEST:,} characters: a .txt or .md file is one record; write JSON Lines with "
            'one document per line instead, {"text": "..."}',
        )
    elif wrong := bad_text(text, encoding.damaged):
        yield BadRecord(origin, wrong)
    elif text.strip():
        yield Raw({"text": text}, origin)
