"""A record as it was found, and what there is to say of a file beside its records."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsft.errors import UserError

Fields = dict[str, Any]

MAX_NAMED = 5
"""Files that are named for each thing that there is to say; all are counted."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass
class Raw:
    """One record as it was found.

    Attributes:
        fields: Column or key -> value.
        origin: `file:line`; for Parquet, Arrow and hub ids the row, counted from 1.
        notes: What the audit counts records by, filled in by whoever works on it.
        hint: What to say with it where it is malformed, for that may have to do with its file.
    """

    fields: Fields
    origin: str
    notes: set[str] = field(default_factory=set)
    hint: str = ""


class BadRecord(UserError):
    """One record is malformed; the ones after it may be fine.

    Attributes:
        origin: Where the record came from.
        problem: What is wrong with it; both can be printed, whatever they quote.
    """

    def __init__(self, origin: str, problem: str) -> None:
        self.origin, self.problem = printable(origin), printable(problem)
        super().__init__(self.origin, self.problem)  # both, so that it survives pickling

    def __str__(self) -> str:
        return f"{self.origin}: {self.problem} (data.on_bad_record=skip leaves such records out and lists them)"


@dataclass
class Reading:
    """How files are to be read, and what was noticed on the way.

    Attributes:
        header: Names of the fields of delimited files without a header line; empty if they have one.
        notes: What was noticed -> how many files it is said of, and the first of them.
    """

    header: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, what: str, path: Path | str) -> None:
        """Remember something of a file, for the audit."""
        about = self.notes.setdefault(printable(what), {"files": 0, "first": []})
        about["files"] += 1
        about["first"] += [printable(str(path))] if about["files"] <= MAX_NAMED else []


def printable(text: str) -> str:
    """The text with escapes in place of control characters and of halves of surrogate pairs, which have no UTF-8."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
