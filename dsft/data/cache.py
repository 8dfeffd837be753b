"""Entries of the cache: columns of examples in files, written as they come and mapped by every rank.

An entry is a directory named by everything that its content depends on. It is written under another name and renamed
when whole, so there is never a part of one. Files hold bare numbers; `entry.json` says their types and digests.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from dsft.data.blocks import Block, different_columns
from dsft.errors import UserError
from dsft.runtime.files import describe, hash_file
from dsft.runtime.once import once_per_host

PER_EXAMPLE = {"tokens": np.int32, "weights": np.float64, "records": np.int64, "truncated": np.bool_}
PER_EXAMPLE |= dict.fromkeys(("contents", "groups", "strata"), np.uint64) | {"learnt": np.int32}
"""Arrays with a number for each example."""


@dataclass(frozen=True)
class Column:
    """One column of all examples.

    Attributes:
        data: All examples end to end.
        offsets: Where each example begins in `data`, and the end of the last, int64, shape (examples + 1,).
    """

    data: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, number: int) -> np.ndarray:
        return self.data[self.offsets[number] : self.offsets[number + 1]]


@dataclass(frozen=True)
class Entry:
    """Examples as they lie in the cache; arrays are mapped, and read-only.

    Attributes:
        columns: Name -> column, as the task gave it.
        tokens: Tokens of each example, int32.
        weights: Weight of each, float64.
        records: Which record of the data set, counted from 0 in the order read, each was made of; int64, never falling.
        truncated: Whether each was cut off, bool.
        contents: A hash of what each one's record says, uint64.
        groups: A hash of its group, 0 for none, uint64.
        strata: A hash of its stratum, uint64.
        learnt: How many of its tokens count something, where a task says what each counts; int32.
        report: What became of the records: `read`, `dropped`, `parts_dropped` and `bad`.
    """

    columns: dict[str, Column]
    tokens: np.ndarray
    weights: np.ndarray
    records: np.ndarray
    truncated: np.ndarray
    contents: np.ndarray
    groups: np.ndarray
    strata: np.ndarray
    learnt: np.ndarray
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)


def load(directory: Path) -> Entry | None:
    """An entry, mapped; None if it is missing or any of its files is not as it was written.

    Its files are read through by one process of a host at every start.
    """
    note = directory.parents[1] / "verified" / directory.name
    if not directory.is_dir() or not once_per_host(note, lambda: _state(directory), lambda: _whole(directory)):
        return None
    try:
        content = _content(directory)
        arrays = {name: _mapped(directory / f"{name}.bin", dtype) for name, dtype in content["dtypes"].items()}
    except (OSError, ValueError, KeyError):  # another host builds it again
        return None
    columns = {name: Column(arrays[f"{name}.data"], arrays[file]) for name, file in content["offsets"].items()}
    return Entry(columns, report=content["report"], **{name: arrays[name] for name in PER_EXAMPLE})


def _state(directory: Path) -> list[list[Any]]:
    """Everything by which a file that has been changed is told from what it was, short of reading it."""
    try:
        return [describe(path) for path in sorted(directory.iterdir())]
    except OSError:
        return []


def _whole(directory: Path) -> bool:
    try:
        digests = _content(directory)["digests"]
        return all(_digest(directory / f"{name}.bin") == expected for name, expected in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _content(directory: Path) -> dict[str, Any]:
    """What `entry.json` says.

    Raises:
        ValueError: It is not as it was written.
    """
    entry = json.loads((directory / "entry.json").read_text(encoding="utf-8"))
    if entry["digest"] != _digest_of(entry["content"]):
        raise ValueError("entry.json is damaged")
    return entry["content"]


def _digest_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    """A hash of a file's content."""
    hasher = xxhash.xxh3_128()
    hash_file(hasher, path)
    return hasher.hexdigest()


def _mapped(path: Path, dtype: str) -> np.ndarray:
    # an empty file cannot be mapped
    if not path.stat().st_size:
        return np.empty(0, np.dtype(dtype))
    return np.memmap(path, np.dtype(dtype), mode="r").view(np.ndarray)


class _Array:
    """A file that an array is appended to, and its digest."""

    def __init__(self, path: Path, file: BinaryIO, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.length = 0
        self._file, self._hasher = file, xxhash.xxh3_128()

    def append(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values, self.dtype).view(np.uint8).data
        self._file.write(content)
        self._hasher.update(content)
        self.length += len(values)

    @property
    def digest(self) -> str:
        return self._hasher.hexdigest()


class Writer:
    """Appends blocks of examples to the files of an entry; only sums and one block are in memory."""

    def __init__(self, directory: Path, files: ExitStack) -> None:
        self._directory, self._files = directory, files
        self._arrays: dict[str, _Array] = {}
        self._names: dict[str, np.dtype] | None = None
        for name, dtype in PER_EXAMPLE.items():
            self._open(name, np.dtype(dtype))

    def _open(self, name: str, dtype: np.dtype) -> None:
        path = self._directory / f"{name}.bin"
        self._arrays[name] = _Array(path, self._files.enter_context(path.open("wb", buffering=1 << 18)), dtype)

    def append(self, block: Block, first_record: int) -> None:
        """Write a block's examples.

        Args:
            block: The examples.
            first_record: Records that were read before it.

        Raises:
            UserError: Its columns are not those of the blocks before; the message names the record.
        """
        if not len(block.tokens):
            return
        self._check_columns(block)
        for name, (data, lengths) in block.columns.items():
            begin = self._arrays[f"{name}.data"].length
            self._arrays[f"{name}.offsets"].append(begin + np.cumsum(lengths))
            self._arrays[f"{name}.data"].append(data)
        for name in PER_EXAMPLE:
            values = getattr(block, name)
            self._arrays[name].append(values + first_record if name == "records" else values)

    def _check_columns(self, block: Block) -> None:
        names = {name: data.dtype for name, (data, _) in block.columns.items()}
        if self._names is None:
            self._names = names
            for name, dtype in names.items():
                self._open(f"{name}.data", dtype)
                self._open(f"{name}.offsets", np.dtype(np.int64))
                self._arrays[f"{name}.offsets"].append(np.zeros(1))
        elif names != self._names:
            raise UserError(different_columns(block.origin, names, self._names))

    def finish(self) -> dict[str, Any]:
        """Types, digests and the file of offsets of each column; equal offsets are kept once. All files are closed."""
        self._files.close()
        offsets, kept = {}, dict(self._arrays)
        first: dict[str, str] = {}
        for name in self._names or {}:
            file = f"{name}.offsets"
            offsets[name] = first.setdefault(self._arrays[file].digest, file)
            if offsets[name] != file:
                kept.pop(file).path.unlink()
        return {
            "dtypes": {name: array.dtype.str for name, array in kept.items()},
            "digests": {name: array.digest for name, array in kept.items()},
            "offsets": offsets,
        }


def build(directory: Path, fill: Callable[[Writer], dict[str, Any]]) -> None:
    """Make an entry, whole or not at all.

    Args:
        directory: The entry; what is there is replaced.
        fill: Appends everything and gives the report.

    Raises:
        OSError: It cannot be written; `filename` says where.
    """
    building = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        with ExitStack() as files:
            writer = Writer(building, files)
            report = fill(writer)
            content = {**writer.finish(), "report": report}
        text = json.dumps({"digest": _digest_of(content), "content": content}, ensure_ascii=False, indent=1)
        (building / "entry.json").write_text(text, encoding="utf-8", errors="backslashreplace")
        building.chmod(0o755)  # mkdtemp makes it private; colleagues may share the cache
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)
    except OSError as problem:
        # writing to an open file fails without its name, and a full disk is to be named
        problem.filename = problem.filename or str(directory.parent)
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
