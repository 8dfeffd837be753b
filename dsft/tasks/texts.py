"""A text, or two, of which something is to be said as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np

from dsft.config.schema import ChunkPool, OnOverflow
from dsft.data.sources import Fields
from dsft.errors import UserError
from dsft.tasks import media, weights
from dsft.tasks.fit import TOO_LONG
from dsft.tasks.task import Context, Examples, text_of
from dsft.tasks.windows import windows
from dsft.types import Dropped, Record

NO_WEIGHT = "weight 0"

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text",),
    ("sentence",),
    ("content",),
)
"""Fields with the text, or with two; of a row the first that it has."""


@dataclass(kw_only=True)
class Texts(Record):
    """A text, or two.

    Attributes:
        written: Field -> text, one or two.
    """

    written: dict[str, str]

    def texts(self) -> dict[str, str]:
        return self.written

    def with_texts(self, texts: Mapping[str, str]) -> Self:
        return replace(self, written={name: texts.get(name, text) for name, text in self.written.items()})


def read(names: tuple[str, ...], fields: Fields, origin: str) -> dict[str, Any]:
    """What a row says in some fields, as arguments of a record of this kind.

    Raises:
        ValueError: A text is missing or empty, or there is more than text; the message names the field.
    """
    media.refuse_fields(fields)
    written = {name: text_of(fields[name], name, empty=False) for name in names}
    for name, text in written.items():
        media.refuse_placeholders(text, name)
    return {"written": written, "weight": weights.of_record(fields), "origin": origin}


class Part(NamedTuple):
    """A text, or a chunk of it, as the tokenizer frames it.

    Attributes:
        columns: `ids` and, where the tokenizer gives any, `token_types`.
        weight: What it counts: a record's weight is shared out among its chunks.
        cut: Whether it was cut off.
    """

    columns: dict[str, np.ndarray]
    weight: float
    cut: bool = False


def parts(record: Texts, context: Context) -> list[Part] | Dropped:
    """A record's tokens as the tokenizer frames them, cut where they are too long, or in chunks.

    Raises:
        ValueError: Beside one text of a pair there is no room for a chunk of the other.
        UserError: It is too long, and that is an error; or is to be split, which nothing said of the whole bears.
    """
    tokenizer, data, chunk = context.tokenizer, context.data, context.task.chunk
    if data.on_overflow is OnOverflow.split:
        raise UserError(
            f"data.on_overflow=split with task={context.task.name}: what is learnt is said of the whole text, not of "
            "its parts. Choose truncate, drop or error; or read it in chunks, by task.chunk.length."
        )
    if not record.weight:
        return Dropped(NO_WEIGHT)
    written = list(record.written.values())
    encoding = tokenizer(*written, truncation=False, verbose=False)
    length = len(encoding["input_ids"])
    if chunk.length is not None and length > chunk.length:
        return _chunks(record, encoding, context)
    if length > data.max_length:
        if data.on_overflow is OnOverflow.drop:
            return Dropped(TOO_LONG)
        if data.on_overflow is OnOverflow.error:
            raise UserError(
                f"{record.origin}: {length} tokens, but data.max_length is {data.max_length}; raise it, or choose "
                "data.on_overflow=truncate or drop"
            )
        # of a pair the longer text is cut
        encoding = tokenizer(*written, truncation="longest_first", max_length=data.max_length, verbose=False)
    columns = _columns(encoding, np.arange(len(encoding["input_ids"])), context)
    return [Part(columns, record.weight, length > data.max_length)]


def _chunks(record: Texts, encoding: Any, context: Context) -> list[Part]:
    chunk = context.task.chunk
    assert chunk.length is not None, "there are chunks"
    owners = np.array([-1 if owner is None else owner for owner in encoding.sequence_ids()])
    (inside,) = np.nonzero(owners == np.bincount(owners[owners >= 0]).argmax())
    first, last = int(inside[0]), int(inside[-1]) + 1
    room = chunk.length - (len(owners) - (last - first))
    if room < 1:
        raise ValueError(f"beside one of its texts task.chunk.length={chunk.length} has no room for the other")
    step = min(chunk.stride or max(room // 2, 1), room)
    found = windows(last - first, room, room - step)
    if chunk.pool is ChunkPool.first:
        found = found[:1]
    whole = np.arange(len(owners))
    return [
        Part(
            _columns(encoding, np.r_[whole[:first], whole[first + begin : first + end], whole[last:]], context),
            record.weight / len(found),
        )
        for begin, end, *_ in found
    ]


def _columns(encoding: Any, kept: np.ndarray, context: Context) -> dict[str, np.ndarray]:
    """Columns of those tokens of an encoding that are kept."""
    ids = _without_padding(np.array(encoding["input_ids"], np.int32)[kept], context)
    columns = {"ids": ids}
    if "token_type_ids" in encoding:
        columns["token_types"] = np.array(encoding["token_type_ids"], np.int8)[kept][: len(ids)]
    return columns


def records(data: Examples) -> np.ndarray:
    """Number of the record that each example is of, int64."""
    return np.array([data[number].record for number in range(len(data))], np.int64)


def by_record(
    rows: dict[str, np.ndarray], context: Context, data: Examples, several: bool = False
) -> dict[str, np.ndarray]:
    """A row for each record in place of one for each of its chunks, in the order of records.

    What most chunks say comes as logits of (votes + mean probability) / (chunks + 1): of as many votes the more
    probable one is taken.

    Args:
        rows: `logits`, `counts` and others that all chunks of a record share, in the order of examples.
        context: How chunks are pooled.
        data: The examples.
        several: Whether outputs are decided one by one, as of several labels at once.
    """
    if context.task.chunk.length is None:
        return rows
    numbers = records(data)
    begins = np.flatnonzero(np.diff(numbers, prepend=-1))
    pooled = {name: values[begins] for name, values in rows.items()}
    if "counts" in rows:
        pooled["counts"] = np.add.reduceat(rows["counts"], begins)
    logits, chunks = rows["logits"], np.diff(begins, append=len(numbers))[:, None]
    match context.task.chunk.pool:
        case ChunkPool.mean | ChunkPool.first:
            pooled["logits"] = np.add.reduceat(logits, begins) / chunks
        case ChunkPool.max:
            pooled["logits"] = np.maximum.reduceat(logits, begins)
        case ChunkPool.vote:
            pooled["logits"] = _votes(logits.astype(np.float64), begins, chunks, several)
    return pooled


def _votes(logits: np.ndarray, begins: np.ndarray, chunks: np.ndarray, several: bool) -> np.ndarray:
    if several:
        votes, chances = logits > 0, 1 / (1 + np.exp(-logits))
    else:
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        votes = np.arange(logits.shape[1]) == logits.argmax(-1)[:, None]
    counted = np.add.reduceat(votes.astype(np.float64), begins)
    share = (counted + np.add.reduceat(chances, begins) / chunks) / (chunks + 1)
    return np.log(share) - np.log1p(-share) if several else np.log(share)


def inputs(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A record's tokens as the model takes them."""
    made = {"input_ids": columns["ids"].astype(np.int64)}
    if "token_types" in columns:
        made["token_type_ids"] = columns["token_types"].astype(np.int64)
    return made


def _without_padding(ids: np.ndarray, context: Context) -> np.ndarray:
    """The ids without padding at their end: transformers' decoders answer at the last token that is none, and some
    tokenizers end a text with the token that they also pad with."""
    kept = np.flatnonzero(ids != (-1 if context.tokenizer.pad_token_id is None else context.tokenizer.pad_token_id))
    if not len(kept):
        raise ValueError("it has no tokens but padding")
    return ids[: kept[-1] + 1]
