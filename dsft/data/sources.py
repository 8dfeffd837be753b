"""Records out of files and hubs: one reader per format, every record with the place it came from.

JSON is read by the standard library, not through Arrow: Arrow would give every tool call the keys of all the others,
and could not name the line of a mistake. CSV is read by the standard library too, since a data frame would guess types
(an answer `007` would become 7, an answer `NA` nothing). Parquet is read by Arrow and hub ids by `datasets`.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from dsft.data.json_array import elements
from dsft.errors import UserError
from dsft.runtime.content import disguise
from dsft.runtime.files import describe, hash_file

Fields = dict[str, Any]

PARQUET_ROWS = 256
"""Rows of a Parquet file that are in memory at a time."""


@dataclass
class Raw:
    """One record as it was found.

    Attributes:
        fields: Column or key -> value.
        origin: `file:line`; for Parquet and hub ids the row, counted from 1.
        notes: What the audit counts records by, filled in by whoever works on it.
    """

    fields: Fields
    origin: str
    notes: set[str] = field(default_factory=set)


class BadRecord(UserError):
    """One record is malformed; the ones after it may be fine.

    Attributes:
        origin: Where the record came from.
        problem: What is wrong with it.
    """

    def __init__(self, origin: str, problem: str) -> None:
        super().__init__(origin, problem)  # both, so that it survives pickling
        self.origin, self.problem = origin, problem

    def __str__(self) -> str:
        return f"{self.origin}: {self.problem} (data.on_bad_record=skip leaves such records out and lists them)"


class Found:
    """What a `spec` stands for, looked up once: its files, or the rows of a hub data set, which is loaded once at most.

    Args:
        spec: Path of a file with a suffix in READERS; a directory, searched recursively; a glob, in which `**` goes
            through directories; or, where no such path exists, the `owner/name` of a data set on the hub.
        split: Split of a hub data set.

    Raises:
        UserError: Nothing is there, or the format is unknown.
    """

    def __init__(self, spec: str, split: str = "train") -> None:
        self.name = spec
        self._split = split
        self._paths = files(spec)

    @cached_property
    def _rows(self) -> Any:
        return _hub(self.name, self._split)

    def state(self) -> list[Any]:
        """What tells its content from an earlier one without reading it: names, sizes, times and inodes of files."""
        return [self.name, self._split, *map(describe, self._paths or [])]

    def fingerprint(self) -> str:
        """A hash of the content; renaming or moving files does not change it.

        Raises:
            UserError: A file was written to meanwhile.
        """
        if self._paths is None:
            return f"{self.name}[{self._split}]{self._rows._fingerprint}"
        digest = xxhash.xxh3_128()
        for path in self._paths:
            before = describe(path)
            digest.update(f"{path.suffix.lower()}:{path.stat().st_size}:".encode())
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
        if self._paths is None:
            yield from _rows(self._rows, f"{self.name}[{self._split}]")
        for path in self._paths or []:
            yield from READERS[path.suffix.lower()](path)


def files(spec: str) -> list[Path] | None:
    """The files that `spec` stands for, sorted; None if it names a hub data set.

    Raises:
        UserError: Nothing is there, or nothing of a known format.
    """
    path = Path(spec).expanduser()
    if _is_file(path):
        found = [path]
    elif path.is_dir():
        found = [p for p in path.rglob("*") if _is_file(p) and not _hidden(p.relative_to(path))]
    elif glob.has_magic(spec):
        matches = glob.glob(str(path), recursive=True)
        found = [match for match in map(Path, matches) if _is_file(match)]
    elif _looks_like_hub_id(spec):
        return None
    else:
        raise UserError(f"{spec}: no such file, directory or glob, and not a hub id (owner/name)")
    for file in found:
        if file.suffix.lower() in READERS and (problem := disguise(file, text=file.suffix.lower() != ".parquet")):
            raise UserError(f"{file} is {problem}")
    known = sorted(p for p in found if p.suffix.lower() in READERS)
    if not known:
        names = ", ".join(sorted(p.name for p in found)[:5]) or "nothing"
        raise UserError(f"{spec}: no file of a known format (found {names}); supported are {', '.join(READERS)}")
    return known


def _is_file(path: Path) -> bool:
    """A file, or a link to something that is not there."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _looks_like_hub_id(spec: str) -> bool:
    """`owner/name` that is not simply a mistyped path."""
    owner, _, name = spec.partition("/")
    is_path = Path(name).suffix.lower() in READERS or Path(owner).exists()
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec)) and not is_path


def _jsonl(path: Path) -> Iterator[Raw | BadRecord]:
    # A binary file splits on \n alone; U+2028 and U+0085 are ordinary characters of a text.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            origin = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield _record(json.loads(text), origin)
            except UnicodeDecodeError as error:
                yield BadRecord(origin, f"not UTF-8: byte {error.object[error.start]:#04x} at column {error.start + 1}")
            except json.JSONDecodeError as error:
                yield BadRecord(origin, f"not JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield BadRecord(origin, f"not JSON that can be read: {str(error)[:100]}")


def _json(path: Path) -> Iterator[Raw | BadRecord]:
    if (found := elements(path)) is not None:
        for value, line in found:
            yield _record(value, f"{path}:{line}")
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
        document = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON Lines under the name of JSON
            yield from _jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        yield from _data(text, document["data"], path)
    else:
        yield _record(document, f"{path}:1")


def _data(text: str, data: list[Any], path: Path) -> Iterator[Raw | BadRecord]:
    """The elements of the array under the key `data` of a valid document, each with the line it begins on."""
    decode = json.JSONDecoder().raw_decode
    blank: Any = re.compile(r"[\s,]*")
    starts = (match.end() - 1 for match in re.finditer(r'"data"\s*:\s*\[', text))
    at = next(at for at in starts if repr(decode(text, at)[0]) == repr(data))
    line, counted = 1, 0
    at = blank.match(text, at + 1).end()
    while text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, end = decode(text, at)
        yield _record(value, f"{path}:{line}")
        at = blank.match(text, end).end()


def _record(value: Any, origin: str) -> Raw | BadRecord:
    if isinstance(value, dict):
        return Raw(value, origin)
    return BadRecord(origin, f"a record is an object, but this is {type(value).__name__}")


def _delimited(delimiter: str) -> Callable[[Path], Iterator[Raw | BadRecord]]:
    def reader(path: Path) -> Iterator[Raw | BadRecord]:
        csv.field_size_limit(2**31 - 1)
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                header = next(rows, [])
                start = rows.line_num + 1
                for row in rows:
                    origin, start = f"{path}:{start}", rows.line_num + 1
                    if len(row) == len(header):
                        yield Raw(dict(zip(header, row, strict=True)), origin)
                    elif row:
                        yield BadRecord(origin, f"{len(row)} fields where the header has {len(header)}")
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}:{rows.line_num}: cannot be read as delimited UTF-8 text: {error}") from error

    return reader


def _parquet(path: Path) -> Iterator[Raw]:
    import datasets
    from pyarrow import parquet

    try:
        # `datasets` would hold a whole group of rows, and files often have but one
        with parquet.ParquetFile(path) as file:
            features = datasets.Features.from_arrow_schema(file.schema_arrow)
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=PARQUET_ROWS))
            yield from _rows(map(features.decode_example, rows), str(path))
    except Exception as error:  # Arrow and datasets each have their own
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


def _hub(spec: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(spec, split=split)
    except Exception as error:  # network, permission, split and builder errors have no common base
        problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{spec}: no such path here, and as a hub id with data.split={split} it failed: {problem}"
        ) from error


def _rows(rows: Any, name: str) -> Iterator[Raw]:
    for number, row in enumerate(rows, start=1):
        yield Raw(_without_nulls(row), f"{name}:{number}")


def _without_nulls(value: Any) -> Any:
    """Undo Arrow's filling in of keys that other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Raw | BadRecord]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
}
"""Suffix -> reader."""
