"""Python's decoder of JSON, made strict: what it passes over, or cannot bear, is a problem of the record."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from dsft.data.text import bad_byte

DEEPEST = 100
"""Levels of lists and objects within each other."""

LONGEST = 1000
"""Digits of an integer."""

TOO_DEEP = f"not JSON that can be read: lists and objects lie more than {DEEPEST} deep within each other"

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Decoder:
    """Python's decoder of JSON, and what it passes over.

    Args:
        damaged: Whether the text has places that were no text in the file.
    """

    def __init__(self, damaged: bool) -> None:
        self._damaged = damaged
        self._problem: str | None = None
        hooks: dict[str, Any] = {"object_pairs_hook": self._object, "parse_int": self._int, "parse_float": self._float}
        self._decode = json.JSONDecoder(**hooks).raw_decode

    def value(self, text: str, at: int) -> tuple[Any, int, str | None]:
        """The value that begins at a place, where it ends, and why it is no record.

        Raises:
            json.JSONDecodeError: There is none.
            RecursionError: It is too deep for Python.
        """
        self._problem = None
        value, end = self._decode(text, at)
        return value, end, self.bad_byte(text, at, end) or self._problem or _unfit(value, text, at, end)

    def bad_byte(self, text: str, at: int, end: int) -> str | None:
        """Says which byte between two places is no text."""
        return bad_byte(text, at, end) if self._damaged else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._problem = self._problem or f"the key `{twice}` is there twice in one object"
        return value

    def _int(self, digits: str) -> int:
        if len(digits) <= LONGEST:
            return int(digits)
        self._problem = self._problem or f"not JSON that can be read: a number of {len(digits):,} digits"
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._problem = (
                self._problem or f"not JSON that can be read: the number {digits[:20]} is beyond what a float can hold"
            )
        return value


def _unfit(value: Any, text: str, at: int, end: int) -> str | None:
    """Why a valid JSON value, which stands between two places of a text, is no record."""
    if not isinstance(value, dict):
        return f"a record is an object, but this is {type(value).__name__}"
    if text.count("{", at, end) + text.count("[", at, end) > DEEPEST and _depth(value) > DEEPEST:
        return TOO_DEEP
    return _half(value) if _HALF.search(text, at, end) else None


def _half(value: dict[str, Any]) -> str | None:
    """Says which field of a record holds half of a surrogate pair, if one does."""
    for name, held in value.items():
        try:
            json.dumps({name: held}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            return f"field `{name}` holds half a character, the lone surrogate U+{half:04X}"
    return None


def _depth(value: Any) -> int:
    """Levels of lists and objects, without calling itself."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
    return depth
