"""The elements of a JSON array in a file, one at a time: the file may be larger than memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsft.errors import UserError

BLOCK = 1 << 20
"""Bytes that are read at a time; an element that is longer has more at once."""

_BLANK = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


def elements(path: Path) -> Iterator[tuple[Any, int]] | None:
    """Elements of the one array that a UTF-8 file holds, and the line that each begins on; None if it holds no array.

    Raises:
        UserError: It is not UTF-8. While elements are taken: it is no valid JSON; the message names line and column.
    """
    with path.open("rb") as file:
        if _Text(path, file).peek() != "[":
            return None
    return _elements(path)


def _elements(path: Path) -> Iterator[tuple[Any, int]]:
    with path.open("rb") as file:
        text = _Text(path, file)
        text.peek()
        text.at += 1
        if text.peek() == "]":
            text.at += 1
        else:
            while True:
                yield text.value()
                mark = text.peek()
                if mark not in (",", "]"):
                    raise text.problem("Expecting ',' delimiter", text.at)
                text.at += 1
                if mark == "]":
                    break
        if text.peek():
            raise text.problem("Extra data", text.at)


class _Text:
    """A text file of which a part is in memory.

    Attributes:
        at: Place in the part up to which it has been read.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.at = 0
        self._path, self._file = path, file
        self._text, self._ended = "", False
        self._counted, self._line, self._column = 0, 1, 1  # a place in the part, not behind `at`, and what it is called
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def peek(self) -> str:
        """The next character that is not blank, which `at` then points to; "" at the end."""
        while True:
            blank = _BLANK.match(self._text, self.at)
            assert blank is not None, "it matches nothing, too"
            self.at = blank.end()
            if self.at < len(self._text):
                return self._text[self.at]
            if self._ended:
                return ""
            self._more()

    def value(self) -> tuple[Any, int]:
        """The next JSON value, and the line that it begins on."""
        self.peek()
        while True:
            try:
                value, end = _decode(self._text, self.at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self.problem(error.msg, error.pos) from error
            else:
                if end + 2 < len(self._text) or self._ended:  # else it may be a number that goes on, as 1 of 1e+9
                    self._count()
                    self.at = end
                    return value, self._line
            self._more()

    def problem(self, message: str, at: int) -> UserError:
        """The error that says what is wrong at a place of the part."""
        line, column = self._place(at)
        return UserError(f"{self._path}:{line}: not JSON: {message} at column {column}")

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, counted from 1, of a place that is not before the one counted last."""
        lines = self._text.count("\n", self._counted, at)
        column = at - self._text.rfind("\n", self._counted, at) if lines else self._column + at - self._counted
        return self._line + lines, column

    def _count(self) -> None:
        self._line, self._column = self._place(self.at)
        self._counted = self.at

    def _more(self) -> None:
        """Forget what has been read, and read as much again as is left, a block at least."""
        self._count()
        rest = self._text[self.at :]
        block = self._file.read(max(BLOCK, len(rest)))
        begin = self._file.tell() - len(block) - len(self._decoder.getstate()[0])
        try:
            self._text = rest + self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path}: not UTF-8 at byte {begin + error.start}") from error
        self.at, self._counted, self._ended = 0, 0, not block
