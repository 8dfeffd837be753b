"""What causal language modelling makes of a record, and everything that this depends on."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from dsft.config.schema import DataConfig, OnOverflow, TrainOn
from dsft.data import dataset, render, shapes
from dsft.data.blocks import Encode
from dsft.data.sources import Raw
from dsft.types import Dropped, Example

TOO_LONG = "longer than data.max_length (data.on_overflow=drop)"
UNSUPERVISED = "no supervised tokens"
CUT_OFF = "no supervised tokens left after truncation to data.max_length"

MASKED = (
    "every label is masked; no token of {records} records would be learnt ({why}). Likely causes: prompts longer than "
    "data.max_length, so that truncation cuts the answers off; a chat template whose {{% generation %}} marks enclose "
    "nothing; data.train_on not fitting the records"
)


def encoder(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, tokenizer_fingerprint: str
) -> tuple[Encode, dict[str, Any]]:
    """What makes examples of records, and its recipe."""
    encode = partial(
        _encode,
        tokenizer=tokenizer,
        max_length=data.max_length,
        train_on=data.train_on,
        on_overflow=data.on_overflow,
    )
    recipe = {
        "tokenizer": tokenizer_fingerprint,
        "chat_template": tokenizer.chat_template,
        "max_length": data.max_length,
        "train_on": data.train_on.value,
        "on_overflow": data.on_overflow.value,
        "code": _code_version(),
    }
    return encode, recipe


@cache
def _code_version() -> list[str]:
    code = dataset.code_version([__file__, str(render.__file__), str(shapes.__file__)])
    return [code, transformers.__version__, tokenizers.__version__]


def _encode(
    record: Raw, tokenizer: PreTrainedTokenizerFast, max_length: int, train_on: TrainOn, on_overflow: OnOverflow
) -> list[Example] | Dropped:
    """The example of a record, or the reason it is dropped for.

    Raises:
        BadRecord: It is malformed.
    """
    example = render.render(shapes.to_conversation(record.fields, record.origin), tokenizer, train_on)
    if not example.weight:
        return Dropped(UNSUPERVISED, MASKED)
    fitting = render.fit(example, max_length, on_overflow, record.origin)
    if fitting is None:
        return Dropped(TOO_LONG)
    return [fitting] if fitting.weight else Dropped(CUT_OFF, MASKED)
