"""A text, or two, of which something is to be said as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from dsft.config.schema import OnOverflow
from dsft.data.sources import Fields
from dsft.errors import UserError
from dsft.tasks import media, weights
from dsft.tasks.fit import TOO_LONG
from dsft.tasks.task import Context, text_of
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


def tokens(record: Texts, context: Context) -> tuple[dict[str, np.ndarray], bool] | Dropped:
    """A record's tokens as the tokenizer frames them: columns `ids` and, where it gives any, `token_types`; and whether
    they were cut off.

    Raises:
        UserError: It is too long, and that is an error; or is to be split, which nothing said of the whole bears.
    """
    tokenizer, data = context.tokenizer, context.data
    if data.on_overflow is OnOverflow.split:
        raise UserError(
            f"data.on_overflow=split with task={context.task.name}: what is learnt is said of the whole text, not of "
            "its parts. Choose truncate, drop or error."
        )
    if not record.weight:
        return Dropped(NO_WEIGHT)
    written = list(record.written.values())
    encoding = tokenizer(*written, truncation=False, verbose=False)
    length = len(encoding["input_ids"])
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
    ids = _without_padding(np.array(encoding["input_ids"], np.int32), context)
    columns = {"ids": ids}
    if "token_type_ids" in encoding:
        columns["token_types"] = np.array(encoding["token_type_ids"][: len(ids)], np.int8)
    return columns, length > data.max_length


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
