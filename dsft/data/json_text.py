"""JSON in the forms in which records come, each record with its line.

Python's own decoder is given every value, since Arrow would give every tool call the keys of all the others and could
not name the line of a mistake.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from dsft.data import questions
from dsft.data.json_decoder import TOO_DEEP, Decoder
from dsft.data.json_stream import Broken, Text, Value
from dsft.data.raw import MAX_NAMED, BadRecord, Raw, Reading
from dsft.data.text import find_encoding, open_text

_POINTER = "version https://git-lfs.github.com/spec/"


class Form(Enum):
    """How records stand in a file."""

    lines = "an object on each line"
    array = "one array of them"
    data = "an object with the array under the key `data`"
    values = "one object after the other, each on several lines"


def records(path: Path, reading: Reading) -> Iterator[Raw | BadRecord]:
    """The records of a JSON file in any of the forms.

    Raises:
        UserError: An array is broken, so that nothing after that place can be told.
    """
    for one in values(path, reading):
        origin = f"{path}:{one.line}"
        if one.problem:
            yield BadRecord(origin, one.problem)
        else:
            yield from questions.unnested(Raw(one.value, origin))


def values(path: Path, reading: Reading) -> Iterator[Value]:
    """What stands in a JSON file where its form has records; raises as `records`."""
    encoding = find_encoding(path, reading)
    decoder = Decoder(encoding.damaged)
    with open_text(path, encoding, newline="\n") as file:
        form = _form(Text(path, file, decoder))
    with open_text(path, encoding, newline="\n") as file:
        text = Text(path, file, decoder)
        if form is Form.lines:
            yield from _lines(file, decoder)
        elif form is Form.values:
            yield from text.values()
        else:
            text.peek()
            beside: list[str] = []
            yield from text.array() if form is Form.array else text.data(beside)
            text.end()
            if beside:
                reading.note(f"whose fields beside `data` are not read ({', '.join(beside[:MAX_NAMED])})", path)


def _lines(file: TextIO, decoder: Decoder) -> Iterator[Value]:
    # The file splits on \n alone; U+2028 and U+0085 are ordinary characters of a text.
    for number, line in enumerate(file, start=1):
        if text := line.rstrip(" \t\r\n"):
            value, problem = _of_line(text, decoder)
            yield Value(value, number, problem)


def _of_line(text: str, decoder: Decoder) -> tuple[Any, str | None]:
    try:
        value, end, problem = decoder.value(
            text, len(text) - len(text.lstrip(" \t\ufeff"))
        )  # files that were joined bring marks
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, len(text) - len(text[end:].lstrip(" \t\r\n")))
        return value, problem
    except RecursionError:
        return None, TOO_DEEP
    except json.JSONDecodeError as error:
        if problem := decoder.bad_byte(text, 0, len(text)):
            return None, problem
        if text.startswith(_POINTER):
            return None, "a line of a Git LFS pointer, not the file's own: run `git lfs pull` where it was cloned"
        return None, f"not JSON: {error.msg} at column {error.colno}"


def _form(text: Text) -> Form:
    """The form of a file, told from its first value; of an object with the key `data` it takes reading it all."""
    begin = text.peek()
    if begin != "{":
        return Form.array if begin == "[" else Form.lines
    holds_data, line, below = False, text.line, text.below()
    try:
        for key in text.members():
            if key == "data" and text.peek() == "[":
                holds_data = True
                for _ in text.array():
                    pass
            else:
                text.value()
    except Broken:
        if below in ("", "{"):
            return Form.lines
        if holds_data:
            raise
        return Form.values
    end = text.line
    if not text.peek() and holds_data:
        return Form.data
    return Form.lines if line == end and (text.line > end or not text.peek()) else Form.values
