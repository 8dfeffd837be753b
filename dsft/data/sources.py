"""Records out of files and hubs: one reader per format, every record with the place it came from."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from dsft.config.schema import DataConfig, Source
from dsft.data import arrow, conll, delimited, document, json_text
from dsft.data.choice import Asked, choose
from dsft.data.raw import BadRecord, Fields, Raw, Reading
from dsft.data.text import PACKED, format_of, no_text
from dsft.errors import UserError
from dsft.runtime.content import disguise
from dsft.runtime.files import describe, hash_file

__all__ = ["READERS", "BadRecord", "Fields", "Found", "Raw"]

Reader = Callable[[Path, Reading], Iterator[Raw | BadRecord]]

READERS: dict[str, Reader] = {
    ".jsonl": json_text.records,
    ".json": json_text.records,
    ".ndjson": json_text.records,
    ".csv": delimited.reader(",;\t"),
    ".tsv": delimited.reader("\t"),
    ".conll": conll.records,
    ".bio": conll.records,
    ".iob": conll.records,
    ".iob2": conll.records,
    ".txt": document.records,
    ".md": document.records,
    ".parquet": arrow.parquet,
    ".arrow": arrow.arrow,
}
"""Suffix -> reader. Those of text may be compressed, and have one of the suffixes of PACKED behind their own."""

BINARY = {".parquet", ".arrow"}
DELIMITED = {".csv", ".tsv"}


class Found:
    """What a `spec` stands for, looked up once: its files, or the rows of a hub data set, which is loaded once at most.

    Args:
        spec: Path of a file of a format in READERS; a directory, searched recursively; a glob, in which `**` goes
            through directories; or, where no such path exists, the `owner/name` of a data set on the hub.
        asked: What of a data set on the hub, or of a directory that has splits or subsets, is meant.
        header: Names of the fields of delimited files without a header line; empty if they have one.

    Raises:
        UserError: Nothing is there, or nothing of a known format, or no such split or subset.
    """

    def __init__(self, spec: str, asked: Asked | None = None, header: Sequence[str] = ()) -> None:
        self.name, self._asked = spec, asked or Asked()
        self._reading = Reading(tuple(header))
        self._choice = choose(spec, self._asked, is_known)
        if self._choice is None and not _looks_like_hub_id(spec):
            raise UserError(f"{spec}: no such file, directory or glob, and not a hub id (owner/name)")
        for path in self._choice.paths if self._choice else []:
            if is_known(path) and (problem := disguise(path) if format_of(path) in BINARY else no_text(path)):
                raise UserError(f"{path} is {problem}")
        if self._choice is not None and not any(map(is_known, self._choice.paths)):
            raise UserError(f"{spec}: no file of a known format (found {_names(Path(spec))}); supported are {_known()}")

    @property
    def key(self) -> str:
        """Names it, with split and subset."""
        subset = f"/{self._asked.subset}" if self._asked.subset else ""
        return f"{self.name}{subset}[{self._asked.split}]"

    @property
    def acts(self) -> set[str]:
        """What of `split`, `subset` and `header` has a meaning here."""
        choice = self._choice
        if choice is None:
            return {"split", "subset"}
        delimited = any(format_of(path) in DELIMITED for path in choice.paths)
        said = {"split": choice.by_split, "subset": choice.by_subset, "header": delimited}
        return {name for name, acts in said.items() if acts}

    @cached_property
    def _rows(self) -> Any:
        return _hub(self.name, self._asked)

    def state(self) -> list[Any]:
        """What tells its content from an earlier one without reading it: names, sizes, times and inodes of files."""
        return [self.key, *map(describe, self._choice.paths if self._choice else [])]

    def fingerprint(self) -> str:
        """A hash of the content; renaming or moving files does not change it.

        Raises:
            UserError: A file was written to meanwhile.
        """
        if self._choice is None:
            return f"{self.key}{self._rows._fingerprint}"
        digest = xxhash.xxh3_128(repr(self._reading.header).encode())
        for path in self._choice.paths:
            before = describe(path)
            digest.update(f"{format_of(path)}:{path.suffix.lower()}:{path.stat().st_size}:".encode())
            hash_file(digest, path)
            if describe(path) != before:
                raise UserError(f"{path} was written to while it was being read; start when it is whole")
        return digest.hexdigest()

    def records(self) -> Iterator[Raw | BadRecord]:
        """Its records, in a fixed order.

        A record that cannot be read comes as the BadRecord that says why, so that those after it are still read.

        Raises:
            UserError: A file as a whole cannot be read.
        """
        if self._choice is None:
            yield from _of_hub(self._rows, self.key)
            return
        for path in self._choice.paths:
            read = 0
            for record in READERS[format_of(path)](path, self._reading):
                read += 1
                yield record
            if not read:
                self._reading.note("empty", path)

    def notes(self) -> dict[str, dict[str, Any]]:
        """What has been noticed of files while they were read: what -> `files` (how many) and `first` (some)."""
        return self._reading.notes

    def about(self) -> dict[str, Any]:
        """What it is made of, for the audit: `formats` (format -> files) and `left_out` (why -> as for `notes`) and
        `unread` (settings of its card)."""
        if self._choice is None:
            return {}
        left_out = Reading()
        for why, paths in self._choice.left_out.items():
            for path in paths:
                left_out.note(why, path)
        return {"formats": dict(Counter(map(format_of, self._choice.paths))), "left_out": left_out.notes} | (
            {"unread": self._choice.unread} if self._choice.unread else {}
        )


def places(data: DataConfig) -> dict[str, Found]:
    """Where records are read from, by setting; `data=pydoc` is none of these.

    Raises:
        UserError: As of `Found`.
    """
    found = {}
    if data.source is Source.files and data.train:
        found["data.train"] = Found(data.train, Asked(data.split, data.subset), data.header)
    if data.validation:
        subset = data.subset if data.validation == data.train else None
        asked = Asked(data.validation_split, subset, "data.validation_split")
        found["data.validation"] = Found(data.validation, asked, data.header)
    if data.test:
        subset = data.subset if data.test == data.train else None
        found["data.test"] = Found(data.test, Asked(data.test_split, subset, "data.test_split"), data.header)
    return found


def is_known(path: Path) -> bool:
    """Whether a file is of a format that can be read; one that is not of text is not to be compressed as a whole."""
    kind = format_of(path)
    return kind in READERS and not (kind in BINARY and path.suffix.lower() in PACKED)


def _known() -> str:
    texts = [suffix for suffix in READERS if suffix not in BINARY]
    return f"{', '.join(READERS)}, and {', '.join(PACKED)} of {', '.join(texts)}"


def _names(spec: Path) -> str:
    """Names of some files that were found."""
    spec = spec.expanduser()
    if spec.is_file():
        return spec.name
    found = spec.rglob("*") if spec.is_dir() else map(Path, glob.iglob(str(spec), recursive=True))
    return ", ".join(sorted(path.name for path in islice((p for p in found if p.is_file()), 1000))[:5]) or "nothing"


def _looks_like_hub_id(spec: str) -> bool:
    """`owner/name` that is not simply a mistyped path."""
    owner, _, name = spec.partition("/")
    is_path = is_known(Path(name)) or Path(owner).exists()
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec)) and not is_path


def _hub(spec: str, asked: Asked) -> Any:
    import datasets

    subset = {"name": asked.subset} if asked.subset else {}
    try:
        return datasets.load_dataset(spec, split=asked.split, **subset)
    except Exception as error:  # network, permission, split and builder errors have no common base
        problem = f"{type(error).__name__}: {error}"
        given = f"{asked.setting}={asked.split}" + (f" and data.subset={asked.subset}" if subset else "")
        raise UserError(f"{spec}: no such path here, and as a hub id with {given} it failed: {problem}") from error


def _of_hub(rows: Any, name: str) -> Iterator[Raw]:
    for number, row in enumerate(rows, start=1):
        yield Raw(arrow.without_nulls(row), f"{name}:{number}")
