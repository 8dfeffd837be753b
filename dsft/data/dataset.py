"""Tokenised records, made once and kept: every rank maps the same read-only files.

An entry of the cache is a directory named by everything that its content depends on. It is built under another name
and renamed when whole. The first process to come builds it while the others wait at a file lock; this is before any
process group exists, so no collective can time out.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
import xxhash
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dsft.config.schema import DataConfig, OnBadRecord, OnOverflow, Source, TrainOn
from dsft.data import audit, pydoc, render, shapes, sources
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.types import Example

CHUNK = 256
"""Records that a worker takes at a time."""

POOL_FROM = 20_000
"""Fewer records are tokenised (some 2,000 a second) before worker processes have started (some 8 seconds)."""

ARRAYS = {
    "ids": np.int32,  # all examples end to end
    "supervised": np.bool_,  # one per id
    "offsets": np.int64,  # where each example begins in `ids`, and the end of the last
    "weights": np.float64,  # one per example
    "truncated": np.bool_,  # one per example
}
"""Files of an entry, each `NAME.npy`."""


@dataclass
class TokenDataset:
    """A selection of the examples of one cache entry.

    Attributes:
        key: Names the content and the selection; equal keys mean equal examples.
        arrays: The memory-mapped ARRAYS of the entry.
        selection: Entry's number of each example, int64, shape (examples,).
    """

    key: str
    arrays: dict[str, np.ndarray]
    selection: np.ndarray

    def __post_init__(self) -> None:
        self.lengths = np.diff(self.arrays["offsets"])[self.selection].astype(np.int32)
        self.weights = np.asarray(self.arrays["weights"])[self.selection]
        self.truncated = np.asarray(self.arrays["truncated"])[self.selection]

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, number: int) -> Example:
        place = self.selection[number]
        start, end = self.arrays["offsets"][place : place + 2]
        ids, supervised = self.arrays["ids"][start:end], self.arrays["supervised"][start:end]
        return Example(
            {"ids": ids, "supervised": supervised},
            tokens=len(ids),
            weight=float(self.weights[number]),
            record=int(place),
            truncated=bool(self.truncated[number]),
            number=number,
        )


def prepare(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, tokenizer_fingerprint: str, seed: int
) -> tuple[TokenDataset, TokenDataset | None, dict[str, Any]]:
    """The training set, the validation set and the audit of both.

    Without `data.validation`, `data.validation_share` of the kept training records, chosen by `seed`, is held out:
    at least one if there are two. The validation set is None if there is nothing to hold out.

    Args:
        data: What to read and how to render it.
        tokenizer: A fast tokenizer with the model's chat template.
        tokenizer_fingerprint: A hash of the tokenizer's content.
        seed: Seed of the held-out split; it does not enter the cache's key.

    Raises:
        UserError: A record is malformed or too long and may not be left out, no record is left, or nothing in them
            is supervised.
    """
    recipe = _recipe(data, tokenizer, tokenizer_fingerprint)
    if data.source is Source.files and not data.train:
        raise UserError("data.train is not set: give a file, directory, glob or hub id, or choose data=pydoc")
    name = "pydoc" if data.source is Source.pydoc else str(data.train)
    key, arrays, report = _entry(name, data, tokenizer, recipe, data.max_records)
    train, held_out = _split(key, arrays, 0.0 if data.validation else data.validation_share, seed)
    parts = {"train": audit.part(name, report, train, len(held_out or []))}
    if data.validation:
        key, arrays, report = _entry(data.validation, data, tokenizer, recipe, None)
        validation = TokenDataset(key, arrays, np.arange(len(arrays["offsets"]) - 1))
        parts["validation"] = audit.part(data.validation, report, validation, 0)
    else:
        validation = held_out
        unread = {"read": len(held_out or []), "dropped": {}, "bad": []}
        parts["validation"] = audit.part(f"held out of {name}", unread, held_out, 0) if held_out else None
    return train, validation, {**parts, "example": audit.example_spans(train[0], tokenizer)}


def _split(
    key: str, arrays: dict[str, np.ndarray], share: float, seed: int
) -> tuple[TokenDataset, TokenDataset | None]:
    kept = len(arrays["offsets"]) - 1
    held = min(max(round(kept * share), 1), kept - 1) if share > 0 else 0
    order = np.random.default_rng(seed).permutation(kept)
    parts = [np.sort(order[held:]), np.sort(order[:held])]
    train, validation = (TokenDataset(f"{key}-{_hash(part.tobytes())}", arrays, part) for part in parts)
    return train, validation if held else None


def _recipe(data: DataConfig, tokenizer: PreTrainedTokenizerFast, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Everything but the records that an entry's content depends on."""
    return {
        "tokenizer": tokenizer_fingerprint,
        "chat_template": tokenizer.chat_template,
        "max_length": data.max_length,
        "train_on": data.train_on.value,
        "on_overflow": data.on_overflow.value,
        "on_bad_record": data.on_bad_record.value,
        "code": _code_version(),
    }


@cache
def _code_version() -> str:
    here = Path(__file__).parent
    names = ("sources", "shapes", "pydoc", "render", "dataset", "audit")
    texts = [(here / f"{name}.py").read_text(encoding="utf-8") for name in names]
    return _hash("\0".join([*texts, transformers.__version__, tokenizers.__version__]).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _entry(
    spec: str, data: DataConfig, tokenizer: PreTrainedTokenizerFast, recipe: dict[str, Any], limit: int | None
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Key, arrays and report of a source's entry, which is built if it is not there whole."""
    if data.source is Source.pydoc and spec == "pydoc":
        content, records = pydoc.fingerprint(data.packages), pydoc.records(data.packages)
    else:
        content, records = sources.fingerprint(spec, data.split), sources.read(spec, data.split)
    key = _hash(json.dumps({**recipe, "content": content, "limit": limit}, sort_keys=True).encode())
    directory = Path(data.cache_dir).expanduser() / "tokens" / key
    found = _load(directory)
    if found is None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            found = _load(directory)
            if found is None:
                _build(directory, spec, islice(records, limit), data, tokenizer)
                found = _load(directory)
    return key, *found


def _load(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """An entry's arrays and report; None if it is missing or any of its files is not as it was written."""
    try:
        report = json.loads((directory / "audit.json").read_text(encoding="utf-8"))
        paths = {name: directory / f"{name}.npy" for name in ARRAYS}
        if any(_digest(path) != report["digests"][name] for name, path in paths.items()):
            return None
        return {name: np.load(path, mmap_mode="r").view(np.ndarray) for name, path in paths.items()}, report
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _build(
    directory: Path,
    spec: str,
    records: Iterable[Raw | BadRecord],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    examples, report = _collect(_outcomes(records, data, tokenizer), data.on_bad_record)
    _refuse_empty(spec, examples, report)
    lengths = [len(example.ids) for example in examples]
    content = {
        "ids": np.concatenate([example.ids for example in examples]),
        "supervised": np.concatenate([example.columns["supervised"] for example in examples]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "weights": [example.weight for example in examples],
        "truncated": [example.truncated for example in examples],
    }
    building = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        for name, dtype in ARRAYS.items():
            np.save(building / f"{name}.npy", np.asarray(content[name], dtype=dtype))
        report["digests"] = {name: _digest(building / f"{name}.npy") for name in ARRAYS}
        (building / "audit.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        building.chmod(0o755)  # mkdtemp makes it private; colleagues may share the cache
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _collect(
    outcomes: Iterator[Example | str | BadRecord], on_bad_record: OnBadRecord
) -> tuple[list[Example], dict[str, Any]]:
    examples, bad, dropped = [], [], Counter()
    for outcome in outcomes:
        if isinstance(outcome, Example):
            examples.append(outcome)
        elif isinstance(outcome, str):
            dropped[outcome] += 1
        elif on_bad_record is OnBadRecord.error:
            raise outcome
        else:
            dropped[audit.BAD] += 1
            bad.append([outcome.origin, outcome.problem])
    read = len(examples) + dropped.total()
    return examples, {"read": read, "dropped": dict(sorted(dropped.items())), "bad": bad[: audit.MAX_LISTED]}


def _refuse_empty(spec: str, examples: list[Example], report: dict[str, Any]) -> None:
    if examples:
        return
    why = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "it is empty"
    first = "".join(f"\n  {origin}: {problem}" for origin, problem in report["bad"][:3])
    if report["dropped"].keys() & {audit.UNSUPERVISED, audit.CUT_OFF}:
        raise UserError(
            f"{spec}: every label is masked; no token of {report['read']} records would be learnt ({why}). Likely "
            "causes: prompts longer than data.max_length, so that truncation cuts the answers off; a chat template "
            "whose {% generation %} marks enclose nothing; data.train_on not fitting the records"
        )
    raise UserError(f"{spec}: no record is left of {report['read']} read ({why}){first}")


def _outcomes(
    records: Iterable[Raw | BadRecord], data: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Example | str | BadRecord]:
    """What becomes of each record, in order, whatever the number of processes."""
    settings = (tokenizer, data.max_length, data.train_on, data.on_overflow)
    records = iter(records)
    head = list(islice(records, POOL_FROM))
    workers = data.num_workers or _cores()
    if len(head) < POOL_FROM or workers == 1:
        outcomes = map(partial(_outcome, settings), chain(head, records))
    else:
        outcomes = _pooled(_chunks(chain(head, records)), workers, settings)
    return iter(tqdm(outcomes, desc="tokenising", unit=" records", delay=2, file=sys.stderr))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(records: Iterator[Raw | BadRecord]) -> Iterator[list[Raw | BadRecord]]:
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def _pooled(
    chunks: Iterator[list[Raw | BadRecord]], workers: int, settings: tuple[Any, ...]
) -> Iterator[Example | str | BadRecord]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(settings,)) as pool:
        pending: deque[Any] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) > 4 * workers:  # so that a large source is never held whole
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_settings: tuple[Any, ...] = ()
"""A worker process's own; set once, so that the tokenizer is not sent with every chunk."""


def _start_worker(settings: tuple[Any, ...]) -> None:
    global _settings
    _settings = settings


def _work(chunk: list[Raw | BadRecord]) -> list[Example | str | BadRecord]:
    return [_outcome(_settings, record) for record in chunk]


def _outcome(
    settings: tuple[PreTrainedTokenizerFast, int, TrainOn, OnOverflow], record: Raw | BadRecord
) -> Example | str | BadRecord:
    """The example of a record, the reason it is dropped for, or what is wrong with it."""
    tokenizer, max_length, train_on, on_overflow = settings
    if isinstance(record, BadRecord):
        return record
    try:
        example = render.render(shapes.to_conversation(record.fields, record.origin), tokenizer, train_on)
    except BadRecord as bad:
        return bad
    if not example.weight:
        return audit.UNSUPERVISED
    fitting = render.fit(example, max_length, on_overflow, record.origin)
    if fitting is None:
        return audit.TOO_LONG
    return fitting if fitting.weight else audit.CUT_OFF
