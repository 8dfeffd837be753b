"""Examples of a data set, made once and kept: every rank maps the same read-only files.

The first process to come builds an entry of the cache while the others wait at a file lock; this is before any process
group exists, so no collective can time out. Nothing here knows what a task makes of a record.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from dsft.config.schema import DataConfig, OnBadRecord, Source
from dsft.data import (
    arrow,
    audit,
    blocks,
    card,
    choice,
    conll,
    delimited,
    document,
    held_out,
    json_decoder,
    json_stream,
    json_text,
    prompting,
    pycode,
    pydoc,
    questions,
    raw,
    sources,
    splits,
    text,
)
from dsft.data import cache as entries
from dsft.data.blocks import TARGET, Encode
from dsft.data.cache import Entry, Writer
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.runtime.once import once_per_host
from dsft.types import Example

MAX_LABELS = 10_000
"""Different labels that a data set may have."""


class TokenDataset:
    """A selection of the examples of one cache entry.

    Args:
        key: Names the content and the selection; equal keys mean equal examples.
        entry: All examples.
        selection: Entry's number of each chosen example, int64, shape (examples,), rising.

    Attributes:
        lengths: Tokens of each example, int32.
        weights: Weight of each, float64.
    """

    def __init__(self, key: str, entry: Entry, selection: np.ndarray) -> None:
        self.key, self.entry, self.selection = key, entry, selection
        self.lengths = entry.tokens[selection]
        self.weights = entry.weights[selection]

    @property
    def truncated(self) -> np.ndarray:
        """Whether each example was cut off, bool."""
        return self.entry.truncated[self.selection]

    @property
    def contents(self) -> np.ndarray:
        """A hash of what each example's record says, uint64."""
        return self.entry.contents[self.selection]

    @property
    def records(self) -> np.ndarray:
        """Which record each example was made of, int64, never falling."""
        return self.entry.records[self.selection]

    @property
    def sides(self) -> list[np.ndarray]:
        """Tokens of each example's own text and of the one that is written from it; nothing where there is none."""
        if TARGET not in self.entry.columns:
            return []
        written = np.diff(self.entry.columns[TARGET].offsets)[self.selection]
        return [self.lengths - written, written]

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, number: int) -> Example:
        place = self.selection[number]
        return Example(
            {name: column[place] for name, column in self.entry.columns.items()},
            tokens=int(self.lengths[number]),
            weight=float(self.weights[number]),
            record=int(self.entry.records[place]),
            truncated=bool(self.entry.truncated[place]),
            number=number,
        )


class Readable(Protocol):
    """Where records come from: `sources.Found` or `pydoc.Documentation`."""

    name: str

    @property
    def key(self) -> str: ...

    def state(self) -> list[Any]: ...

    def fingerprint(self) -> str: ...

    def records(self) -> Iterable[Raw | BadRecord]: ...

    def notes(self) -> dict[str, Any]: ...

    def about(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Prepared:
    """The data of a run.

    Attributes:
        train: Training set.
        validation: Validation set, or None.
        test: Test set, or None.
        audit: What became of the records of each.
        labels: Where they were read -> name of each label -> how many examples have it, and where the first one is.
    """

    train: TokenDataset
    validation: TokenDataset | None
    test: TokenDataset | None
    audit: dict[str, Any]
    labels: dict[str, dict[str, Any]]


def prepare(data: DataConfig, encode: Encode, recipe: dict[str, Any], seed: int) -> Prepared:
    """Training, validation and test set, and the audit of them.

    Without `data.validation`, `data.validation_share` of the kept training records is held out, and likewise for the
    test (`held_out.sides`). All examples of a record are on the same side.

    Args:
        data: What to read.
        encode: What becomes of a record; it may raise BadRecord.
        recipe: Everything but the records that the examples depend on, in JSON types: the settings of `encode`, a
            hash of the tokenizer, the version of the code.
        seed: Seed of the held-out split; it does not enter the cache's key.

    Raises:
        UserError: A record is malformed or too long and may not be left out, or no record is left.
    """
    if data.source is Source.files and not data.train:
        raise UserError("data.train is not set: give a file, directory, glob or hub id, or choose data=pydoc")
    places = sources.places(data)
    found: Readable = places.get("data.train") or pydoc.Documentation(data.packages, data.source)
    key, entry = _entry(found, data, encode, recipe, data.max_records)
    _refuse_absent(found.name, data, entry)
    shares = [0.0 if given else share for given, share in ((data.validation, data.validation_share),
                                                           (data.test, data.test_share))]  # fmt: skip
    train, *held = _split(key, entry, shares, seed)
    assert train is not None, "no share is the whole"
    held_records = sum(audit.count_records(part) for part in held)
    parts: dict[str, Any] = {"train": audit.part(found.name, _report(found, entry, data), train, held_records)}
    given = {"validation": data.validation, "test": data.test}
    sets: dict[str, TokenDataset | None] = dict(zip(given, held))
    labels = {f"data.train={found.name}": entry.report["labels"]}
    for name, spec in given.items():
        if spec:
            own_key, own = _entry(places[f"data.{name}"], data, encode, recipe, None)
            labels[f"data.{name}={spec}"] = own.report["labels"]
            chosen = TokenDataset(own_key, own, np.arange(len(own)))
            parts[name] = audit.part(spec, _report(places[f"data.{name}"], own, data), chosen, 0)
            sets[name] = chosen
        else:
            parts[name] = _held_out_part(found.name, sets[name])
        if parts[name]:
            parts[name]["records_also_trained_on"] = _also(train, sets[name])
    return Prepared(train, sets["validation"], sets["test"], parts, labels)


def _held_out_part(name: str, held: TokenDataset | None) -> dict[str, Any] | None:
    """The audit of what was held out of a source."""
    if held is None:
        return None
    unread = {"read": audit.count_records(held), "bad": []}
    unread |= {key: {} for key in ("dropped", "parts_dropped", "notes", "files")}
    return audit.part(f"held out of {name}", unread, held, 0)


def _also(train: TokenDataset, other: TokenDataset | None) -> int:
    """How many records of another set say what one of the training set says."""
    if other is None:
        return 0
    first = audit.begins(other.records)
    return int(np.isin(other.contents[first], train.contents).sum())


def _report(found: Readable, entry: Entry, data: DataConfig) -> dict[str, Any]:
    """What became of the records, and of the files that they came from; ignored fields are counted at 0 too."""
    notes = {prompting.left_out(name): 0 for name in data.ignore_fields} | entry.report["notes"]
    return {**entry.report, "notes": notes, "files": {**found.about(), "noticed": entry.report["files"]}}


def _refuse_absent(name: str, data: DataConfig, entry: Entry) -> None:
    """Refuse a column that no record has."""
    whole = entry.report["read"] - entry.report["dropped"].get(audit.BAD, 0)
    for path in data.columns.values():
        if entry.report["notes"].get(prompting.absent(path)) == whole:
            raise UserError(f"data.columns names the field `{path}`, which no record of {name} has")


def _split(key: str, entry: Entry, shares: list[float], seed: int) -> list[TokenDataset | None]:
    """The training set and what is held out by each share."""
    begins = audit.begins(entry.records)
    chosen = held_out.sides(entry.contents[begins], entry.groups[begins], entry.strata[begins], shares, seed)
    of_example = chosen[np.cumsum(begins) - 1]
    parts = [np.flatnonzero(of_example == side) for side in range(len(shares) + 1)]
    return [TokenDataset(f"{key}-{_hash(part.data)}", entry, part) if len(part) else None for part in parts]


def code_version(modules: Iterable[str]) -> str:
    """A hash of source files, by which what they make is told from what they made before they were changed."""
    return _hash("\0".join(Path(module).read_text(encoding="utf-8") for module in modules).encode())


@cache
def _own_version() -> str:
    readers = (sources, raw, text, json_text, json_stream, json_decoder, delimited, document, arrow, conll, questions)
    modules = (*readers, prompting, choice, splits, card, pydoc, pycode, blocks, entries)
    return code_version([__file__, *(str(module.__file__) for module in modules)])


def _hash(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _entry(
    found: Readable, data: DataConfig, encode: Encode, recipe: dict[str, Any], limit: int | None
) -> tuple[str, Entry]:
    """Key and entry of a source, which is built if it is not there whole."""
    root = Path(data.cache_dir).expanduser()
    content = once_per_host(
        root / "read" / _hash(found.key.encode(errors="surrogateescape")), found.state, found.fingerprint
    )
    about = {"content": content, "limit": limit, "on_bad_record": data.on_bad_record.value, "code": _own_version()}
    key = _hash(json.dumps({**about, "recipe": recipe}, sort_keys=True).encode())
    directory = root / "tokens" / key
    entry = entries.load(directory)
    if entry is None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            entry = entries.load(directory)
            if entry is None:
                entries.build(directory, partial(_fill, found, limit, data, encode, directory.parent))
                entry = entries.load(directory)
    if entry is None:
        raise UserError(
            f"data.cache_dir={data.cache_dir}: what was just written there does not read the same; its disk is bad"
        )
    return key, entry


def _fill(
    found: Readable, limit: int | None, data: DataConfig, encode: Encode, scratch: Path, writer: Writer
) -> dict[str, Any]:
    """Write all examples, and say what became of the records."""
    dropped: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    verdicts: set[str] = set()
    bad: list[list[str]] = []
    labels: dict[str, list[Any]] = {}
    read = examples = 0
    stop_at_bad = data.on_bad_record is OnBadRecord.error
    for block in blocks.blocks(islice(found.records(), limit), encode, data.num_workers, stop_at_bad, scratch):
        if block.bad and stop_at_bad:
            raise block.bad[0]
        writer.append(block, first_record=read)
        read, examples = read + block.read, examples + len(block.tokens)
        dropped += block.dropped + Counter({audit.BAD: len(block.bad)})
        parts += block.parts_dropped
        notes += block.notes
        verdicts |= block.verdicts
        _collect(labels, block.labels, found.name)
        bad += [[one.origin, one.problem] for one in block.bad[: audit.MAX_LISTED - len(bad)]]
    counts = {
        "read": read,
        "dropped": dict(sorted(dropped.items())),
        "parts_dropped": dict(sorted(parts.items())),
        "notes": audit.notes(notes),
    }
    if not examples:
        raise UserError(_nothing_left(found.name, counts, bad, verdicts))
    return {**counts, "bad": bad, "files": found.notes(), "labels": labels}


def _collect(labels: dict[str, list[Any]], more: dict[str, tuple[int, str]], name: str) -> None:
    """Add a block's labels.

    Raises:
        UserError: There are so many different ones that they are none.
    """
    for label, (count, origin) in more.items():
        labels.setdefault(label, [0, origin])[0] += count
    if len(labels) > MAX_LABELS:
        shown = ", ".join(f"{label!r:.40}" for label in list(labels)[:3])
        raise UserError(
            f"{name}: more than {MAX_LABELS:,} different labels, {shown} among them: name the field with the label by "
            "data.columns={label: FIELD}"
        )


def _nothing_left(name: str, counts: dict[str, Any], bad: list[list[str]], verdicts: set[str]) -> str:
    why = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "it is empty"
    if verdicts:
        return f"{name}: {min(verdicts).format(records=counts['read'], why=why)}"
    first = "".join(f"\n  {origin}: {problem}" for origin, problem in bad[:3])
    return f"{name}: no record is left of {counts['read']} read ({why}){first}"
