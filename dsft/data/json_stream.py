"""A JSON text of which a part is in memory, read a value at a time: it may be larger than memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dsft.data.json_decoder import TOO_DEEP, Decoder
from dsft.errors import UserError

BLOCK = 1 << 20
"""Characters that are read at a time; a value that is longer has more at once."""

_LOOKAHEAD = 16
"""An error that is more characters from the end of what is in memory does not come from there being more."""

_BLANK = re.compile(r"[ \t\r\n]*")
_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)


class Value(NamedTuple):
    """A JSON value.

    Attributes:
        value: What it is.
        line: Where it begins, counted from 1.
        problem: Why it is no record, if it is none.
    """

    value: Any
    line: int
    problem: str | None


class Broken(UserError):
    """A place where the text is no JSON.

    Attributes:
        where: What is wrong there, with line and column.
    """

    def __init__(self, path: Path, message: str, line: int, column: int) -> None:
        super().__init__(f"{path}:{line}: not JSON: {message} at column {column}")
        self.where = f"not JSON: {message} at column {column} of line {line}"


class Text:
    """A text of which a part is in memory.

    Attributes:
        at: Place in the part up to which it has been read.
    """

    def __init__(self, path: Path, file: TextIO, decoder: Decoder) -> None:
        self.at = 0
        self._path, self._file, self._decoder = path, file, decoder
        self._text, self._ended = "", False
        self._counted, self._line, self._column = 0, 1, 1  # a place in the part, not behind `at`, and what it is called

    @property
    def line(self) -> int:
        """The line of `at`, counted from 1."""
        self._count()
        return self._line

    def array(self) -> Iterator[Value]:
        """The elements of the array that begins at `at`."""
        self._take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self._take(",]", "Expecting ',' delimiter") == "]":
                return

    def data(self, beside: list[str]) -> Iterator[Value]:
        """The elements of the array under the key `data`, in an object that is valid; its other keys go to `beside`."""
        for key in self.members():
            if key == "data" and self.peek() == "[":
                yield from self.array()
            else:
                beside.append(key)
                self.value()

    def values(self) -> Iterator[Value]:
        """One value after the other; after a broken one they go on with the next `{` at the beginning of a line."""
        while self.peek():
            try:
                value = self.value()
            except Broken as error:
                value = Value(None, self.line, error.where)
                self._skip()
            yield value

    def members(self) -> Iterator[str]:
        """The keys of the object that begins at `at`; whoever takes one goes on behind its value."""
        self._take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._problem("Expecting property name enclosed in double quotes", self.at)
            key = self.value().value
            self._take(":", "Expecting ':' delimiter")
            yield key
            if self._take(",}", "Expecting ',' delimiter") == "}":
                return

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

    def below(self) -> str:
        """The first character of the line after that of `at`, as far as it is in memory."""
        end = self._text.find("\n", self.at) + 1
        return self._text[end : end + 1] if end else ""

    def value(self) -> Value:
        """The next value.

        Raises:
            UserError: There is none that is whole and valid; `at` stays where it should begin.
        """
        self.peek()
        while True:
            try:
                value, end, problem = self._decoder.value(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LOOKAHEAD
                if self._ended or not cut:
                    raise self._problem(error.msg, error.pos) from error
            except RecursionError:
                if stop := _end(self._text, self.at):
                    return self._taken(None, stop, TOO_DEEP)
                if self._ended:
                    raise self._problem("cut off, and too deep", self.at) from None
            else:
                if end + 2 < len(self._text) or self._ended:  # else it may be a number that goes on, as 1 of 1e+9
                    return self._taken(value, end, problem)
            self._more()

    def end(self) -> None:
        """Raises UserError: Something follows."""
        if self.peek():
            raise self._problem("Extra data", self.at)

    def _taken(self, value: Any, end: int, problem: str | None) -> Value:
        line, self.at = self.line, end
        return Value(value, line, problem)

    def _take(self, marks: str, missing: str = "") -> str:
        mark = self.peek()
        if not mark or mark not in marks:
            raise self._problem(missing, self.at)
        self.at += 1
        return mark

    def _skip(self) -> None:
        self.at += 1
        while (begin := self._text.find("\n{", self.at)) < 0 and not self._ended:
            self.at = max(self.at, len(self._text) - 1)
            self._more()
        self.at = begin + 1 if begin >= 0 else len(self._text)

    def _problem(self, message: str, at: int) -> Broken:
        """The error that says what is wrong at a place of the part."""
        return Broken(self._path, message, *self._place(at))

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
        self._text = rest + block
        self.at, self._counted, self._ended = 0, 0, not block


def _end(text: str, at: int) -> int:
    """Where the list or object that begins at a place ends, by its brackets alone; 0 if that is not in the text."""
    depth = 0
    for found in _MARK.finditer(text, at):
        mark = found[0]
        if mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
            if not depth:
                return found.end()
        elif mark == '"':
            return 0
    return 0
