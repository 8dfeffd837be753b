"""Records become blocks of examples, in order, in this process or in several; few are in memory at a time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.types import Dropped, Example

CHUNK = 256
"""Records that make up a block."""

POOL_FROM = 20_000
"""Fewer records are tokenised (some 2,000 a second) before worker processes have started (some 8 seconds)."""

WEIGHTS = "weights"
"""Name of the column, float32, shape (tokens,), by which a task says what each token counts, 0 if it is not learnt."""

TARGET = "target_ids"
"""Name of the column, int32, of the tokens of another text that is written from an example's own."""

LONGEST_PROBLEM = 300
"""Characters of an exception's message that are shown."""

Encode = Callable[[Raw], "list[Example | Dropped] | Dropped"]
"""What a task makes of a record: its examples, among them a Dropped for each part with nothing to learn, or none."""


@dataclass
class Block:
    """What became of some records that follow one another.

    Attributes:
        read: Records.
        columns: Name -> all examples' values end to end, and the length of each example's, int64.
        tokens: Tokens of each example, int32.
        weights: Weight of each, float64.
        records: Which record of the block each was made of, int64.
        truncated: Whether each was cut off, bool.
        contents: A hash of what each one's record says, uint64; likewise groups and strata.
        learnt: How many tokens of each count something, int32.
        dropped: Reason -> records that made no example.
        parts_dropped: Reason -> parts of records that made other examples.
        verdicts: What to say where every record was dropped.
        bad: Malformed records.
        notes: What is to be said of records -> how many it holds for.
        origin: Where the first record with an example came from.
        labels: Name of each label -> how many examples have it, and where the first one came from.
    """

    read: int = 0
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    weights: np.ndarray = field(default_factory=lambda: np.empty(0, np.float64))
    records: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    truncated: np.ndarray = field(default_factory=lambda: np.empty(0, np.bool_))
    contents: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    strata: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    learnt: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    dropped: Counter[str] = field(default_factory=Counter)
    parts_dropped: Counter[str] = field(default_factory=Counter)
    verdicts: set[str] = field(default_factory=set)
    bad: list[BadRecord] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    origin: str = ""
    labels: dict[str, tuple[int, str]] = field(default_factory=dict)


def blocks(
    records: Iterable[Raw | BadRecord], encode: Encode, workers: int | None, stop_at_bad: bool, scratch: Path
) -> Iterator[Block]:
    """What becomes of the records, the same whatever the number of processes.

    Args:
        records: In order.
        encode: Picklable; worker processes import where it comes from.
        workers: Processes, started from POOL_FROM records on; None for all cores.
        stop_at_bad: Whether the first malformed record ends its block, and nothing after it is of interest.
        scratch: Directory for a temporary file, in which the first records wait until it is known how many there are.

    Raises:
        UserError: `encode` raised it, or gave examples of different columns.
    """
    workers = workers or _cores()
    with tqdm(desc="tokenising", unit=" records", delay=2, file=sys.stderr) as bar:
        for block in _blocks(iter(records), partial(_encoded, encode, stop_at_bad), workers, scratch):
            bar.update(block.read)
            yield block


def _blocks(
    records: Iterator[Raw | BadRecord],
    make: Callable[[list[Raw | BadRecord]], Block],
    workers: int,
    scratch: Path,
) -> Iterator[Block]:
    if workers == 1:
        yield from map(make, _chunks(records))
        return
    with tempfile.TemporaryFile(dir=scratch) as waiting:
        count = 0
        for record in islice(records, POOL_FROM):
            pickle.dump(record, waiting)
            count += 1
        waiting.seek(0)
        head = (pickle.load(waiting) for _ in range(count))
        chunked = _chunks(chain(head, records))
        yield from map(make, chunked) if count < POOL_FROM else _pooled(chunked, make, workers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(records: Iterator[Raw | BadRecord]) -> Iterator[list[Raw | BadRecord]]:
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def _pooled(
    chunks: Iterator[list[Raw | BadRecord]], make: Callable[[list[Raw | BadRecord]], Block], workers: int
) -> Iterator[Block]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(make,)) as pool:
        pending: deque[Any] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) > 4 * workers:  # so that a large source is never held whole
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_make: Callable[[list[Raw | BadRecord]], Block]
"""A worker process's own; set once, so that the tokenizer is not sent with every chunk."""


def _start_worker(make: Callable[[list[Raw | BadRecord]], Block]) -> None:
    global _make
    _make = make


def _work(chunk: list[Raw | BadRecord]) -> Block:
    return _make(chunk)


def _encoded(encode: Encode, stop_at_bad: bool, records: list[Raw | BadRecord]) -> Block:
    block = Block()
    examples: list[tuple[int, str, Example]] = []
    for record in records:
        number, block.read = block.read, block.read + 1
        outcome = record if isinstance(record, BadRecord) else _made(encode, record)
        if isinstance(outcome, BadRecord):
            block.bad.append(outcome)
            if stop_at_bad:
                break
            continue
        assert isinstance(record, Raw), "a bad record's outcome is itself"
        block.notes.update(record.notes)
        parts = [outcome] if isinstance(outcome, Dropped) else outcome
        made = [(number, record.origin, part) for part in parts if isinstance(part, Example)]
        dropped = [part for part in parts if isinstance(part, Dropped)]
        _count(block, len(made), dropped)
        examples += made
    if examples:
        _lay_out(block, examples)
    return block


def _made(encode: Encode, record: Raw) -> list[Example | Dropped] | Dropped | BadRecord:
    """What becomes of a record; if it is malformed, what is wrong.

    Whatever a single record makes fail is its own fault: the tokenizer on a lone surrogate, a template on a type that
    it did not expect, Python on a number of thousands of digits.
    """
    try:
        return encode(record)
    except BadRecord as bad:
        return BadRecord(bad.origin, bad.problem + record.hint) if record.hint else bad
    except (UserError, MemoryError, OSError):  # these concern all records
        raise
    except Exception as error:
        problem = " ".join(str(error).split())[:LONGEST_PROBLEM]
        return BadRecord(record.origin, f"cannot be read: {type(error).__name__}: {problem}")


def _count(block: Block, made: int, dropped: list[Dropped]) -> None:
    if made:
        block.parts_dropped.update(part.reason for part in dropped)
        return
    reason = dropped[0] if dropped else Dropped("no example was made of it")
    block.dropped[reason.reason] += 1
    if reason.verdict:
        block.verdicts.add(reason.verdict)


def _lay_out(block: Block, examples: list[tuple[int, str, Example]]) -> None:
    """Fill the block's arrays from examples, each with its record and where that came from."""
    numbers, origins, made = zip(*examples, strict=True)
    block.origin = origins[0]
    expected = _dtypes(origins[0], made[0])
    for origin, example in zip(origins, made, strict=True):
        if (found := _dtypes(origin, example)) != expected:
            raise UserError(different_columns(origin, found, expected))
    for name in expected:
        values = [example.columns[name] for example in made]
        block.columns[name] = np.concatenate(values), np.array([len(v) for v in values], np.int64)
    block.tokens = np.array([example.tokens for example in made], np.int32)
    block.weights = np.array([example.weight for example in made], np.float64)
    block.truncated = np.array([example.truncated for example in made], np.bool_)
    block.records = np.array(numbers, np.int64)
    block.contents = np.array([example.content for example in made], np.uint64)
    block.groups = np.array([example.group for example in made], np.uint64)
    block.strata = np.array([example.stratum for example in made], np.uint64)
    for origin, example in zip(origins, made, strict=True):
        for label in example.labels:
            count, first = block.labels.get(label, (0, origin))
            block.labels[label] = count + 1, first
    block.learnt = np.array([np.count_nonzero(example.columns.get(WEIGHTS, ())) for example in made], np.int32)


def _dtypes(origin: str, example: Example) -> dict[str, np.dtype]:
    for name, column in example.columns.items():
        if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype.hasobject:
            raise UserError(f"{origin}: its example's column {name} is no one-dimensional array of plain values")
    return {name: column.dtype for name, column in example.columns.items()}


def different_columns(origin: str, found: dict[str, np.dtype], expected: dict[str, np.dtype]) -> str:
    """Says that a record's example has other columns than the examples before."""

    def shown(columns: dict[str, np.dtype]) -> str:
        return ", ".join(f"{name} ({dtype})" for name, dtype in columns.items())

    return f"{origin}: its example has the columns {shown(found)}, and those before have {shown(expected)}"
