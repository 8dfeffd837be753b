"""Texts written from texts by an encoder-decoder: translation, summarisation and the like."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dsft.config.schema import OnOverflow, TaskConfig
from dsft.data.blocks import TARGET
from dsft.data.sources import Fields
from dsft.errors import UserError
from dsft.model.kind import SEQ2SEQ
from dsft.tasks import media, texts, weights
from dsft.tasks.fit import TOO_LONG
from dsft.tasks.forward import Forward, decoder_ids
from dsft.tasks.generate import Prompt
from dsft.tasks.nll import token_metrics
from dsft.tasks.task import Context, Outcome, Sampling, Task, View, text_of
from dsft.types import IGNORE_INDEX, Batch, Dropped, Example, Record

SIDES = {"text": "max_length", "text_target": "max_target_length"}
"""The two texts as a tokenizer's arguments, and settings of the data's section that say how long they may be."""

LANGUAGES = {"source_language": "src_lang", "target_language": "tgt_lang"}
"""Settings, and the tokenizer's attributes that they set."""

SHOWN = 8
"""Languages that a message lists at most."""

CUT = "targets that were cut off, whose end is not learnt"
NOTHING = "source or target texts without tokens"


@dataclass(kw_only=True)
class Pair(Record):
    """A text, and what is to be written from it.

    Attributes:
        written: `source` and `target`, of which the latter is left out where it is to be told; or a text for each of
            several languages.
    """

    written: dict[str, str]

    def texts(self) -> dict[str, str]:
        return self.written

    def with_texts(self, texts: Mapping[str, str]) -> Pair:
        return replace(self, written={name: texts.get(name, text) for name, text in self.written.items()})


def _pair(source: str, target: str, fields: Fields, origin: str) -> Pair:
    """The record of a row with two fields.

    Raises:
        ValueError: One is no text, or empty; the message names the field.
    """
    media.refuse_fields(fields)
    written = {}
    for name, field in (("source", source), ("target", target)):
        written[name] = text_of(fields[field], field, empty=False)
        media.refuse_placeholders(written[name], field)
    return Pair(written=written, weight=weights.of_record(fields), origin=origin)


def _translation(fields: Fields, origin: str) -> Pair:
    """The record of a row with texts by language.

    Raises:
        ValueError: There are none, or one is no text or empty; the message names the field.
    """
    value = fields["translation"]
    if not isinstance(value, dict) or len(value) < 2:
        raise ValueError("field `translation` is an object with a text for each of two or more languages")
    written = {name: text_of(text, f"translation.{name}", empty=False) for name, text in value.items()}
    return Pair(written=written, weight=weights.of_record(fields), origin=origin)


SHAPES: dict[tuple[str, ...], Callable[[Fields, str], Pair]] = {
    **{
        pair: partial(_pair, *pair)
        for pair in (
            ("source", "target"),
            ("src", "tgt"),
            ("article", "highlights"),
            ("document", "summary"),
            ("dialogue", "summary"),
            ("article", "summary"),
            ("text", "summary"),
            ("content", "summary"),
            ("content", "title"),
            ("text", "target"),
            ("input", "output"),
            ("prompt", "completion"),
        )
    },
    ("translation",): _translation,
}


def _source(field: str, fields: Fields, origin: str) -> Pair:
    """The record of a row with a source alone."""
    media.refuse_fields(fields)
    text = text_of(fields[field], field, empty=False)
    media.refuse_placeholders(text, field)
    return Pair(written={"source": text}, weight=weights.of_record(fields), origin=origin)


ASKED: dict[tuple[str, ...], Callable[[Fields, str], Pair]] = {
    (name,): partial(_source, name) for name in dict.fromkeys(names[0] for names in SHAPES if len(names) == 2)
}


def ready(tokenizer: PreTrainedTokenizerBase, settings: TaskConfig) -> None:
    """Let the tokenizer frame texts for their languages, where it distinguishes any.

    Raises:
        UserError: It does not know a language.
    """
    for setting, attribute in LANGUAGES.items():
        language = getattr(settings, setting)
        if language is None or not hasattr(tokenizer, "src_lang"):
            continue
        known = _languages(tokenizer)
        if language not in known:
            raise UserError(
                f"task.{setting}={language}: the tokenizer of model.path does not know this language; it knows "
                f"{', '.join(known[:SHOWN])}{f' and {len(known) - SHOWN} more' if len(known) > SHOWN else ''}."
            )
        setattr(tokenizer, attribute, language)


def _languages(tokenizer: Any) -> list[str]:
    """Codes of a tokenizer's languages."""
    codes = getattr(tokenizer, "lang_code_to_token", None) or getattr(tokenizer, "lang_code_to_id", None)
    return sorted(codes or tokenizer.extra_special_tokens or tokenizer.all_special_tokens)


def encode(record: Pair, context: Context) -> list[Example | Dropped] | Dropped:
    """Source and target as the tokenizer frames each; either is cut where it is too long.

    The end of a target that was cut is not learnt: it is not the text's.

    Raises:
        ValueError: Of several languages it has not those that are asked for.
        UserError: It is too long, and that is an error or it is to be split.
    """
    data, task = context.data, context.task
    if data.on_overflow is OnOverflow.split:
        raise UserError(
            f"data.on_overflow=split with task={task.name}: no part of a source text belongs to a part of the target. "
            "Choose truncate, drop or error."
        )
    _refuse_idle_languages(record, context)
    if not record.weight:
        return Dropped(texts.NO_WEIGHT)
    source_text, target_text = _chosen(record.written, task)
    source = _side(record, context, "text", source_text)
    if isinstance(source, Dropped):
        return source
    target = _side(record, context, "text_target", target_text)
    if isinstance(target, Dropped):
        return target
    counts = np.full(len(target.ids), record.weight, np.float32)
    if target.cut:
        counts[len(counts) - len(frame(context.tokenizer, "text_target")[1]) :] = 0
        record.notes.add(CUT)
    weight = float(counts.sum(dtype=np.float64))
    columns = {"ids": source.ids, TARGET: target.ids, "counts": counts}
    return [Example(columns, len(source.ids) + len(target.ids), weight, truncated=source.cut or target.cut)]


class _Side(NamedTuple):
    """A text's ids with the special tokens around them, int32, and whether it was cut."""

    ids: np.ndarray
    cut: bool


def _side(record: Pair, context: Context, side: str, text: str) -> _Side | Dropped:
    """What becomes of a text of a side (a key of SIDES).

    Raises:
        UserError: It is too long, and that is an error; or nothing has room beside the special tokens.
    """
    tokenizer, data, setting = context.tokenizer, context.data, SIDES[side]
    ids = tokenizer(**{side: text}, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    before, after = frame(tokenizer, side)
    limit = getattr(data, setting)
    room = limit - len(before) - len(after)
    if not ids:
        return Dropped(NOTHING)
    if room < 1:
        raise UserError(f"data.{setting}={limit} has no room for a text beside its special tokens: raise it")
    if len(ids) > room and data.on_overflow is OnOverflow.drop:
        return Dropped(TOO_LONG)
    if len(ids) > room and data.on_overflow is OnOverflow.error:
        raise UserError(
            f"{record.origin}: {len(ids) + limit - room} tokens, but data.{setting} is {limit}; raise it, or choose "
            "data.on_overflow=truncate or drop"
        )
    return _Side(np.array([*before, *ids[:room], *after], np.int32), len(ids) > room)


def _refuse_idle_languages(record: Pair, context: Context) -> None:
    """Refuse a language that neither the tokenizer nor the record distinguishes."""
    given = [name for name in LANGUAGES if getattr(context.task, name) is not None]
    if given and {*record.written} == {"source", "target"} and not hasattr(context.tokenizer, "src_lang"):
        raise UserError(
            f"task.{given[0]}={getattr(context.task, given[0])} does nothing with {record.origin}: the tokenizer of "
            "model.path has no languages, and the record has no texts by language (field `translation`). Leave "
            f"task.{given[0]} out."
        )


def _chosen(written: Mapping[str, str], task: TaskConfig) -> tuple[str, str]:
    """The source and the target text of a record.

    Raises:
        ValueError: Of several languages it has not those that are asked for.
    """
    prefix = task.source_prefix or ""
    if {*written} == {"source", "target"}:
        return prefix + written["source"], written["target"]
    found = []
    for name in LANGUAGES:
        language = getattr(task, name)
        if language not in written:
            raise ValueError(
                f"field `translation` has texts for {', '.join(written)}, and task.{name} is "
                f"{language or 'not given'}: name one of them; or, where the tokenizer has other codes, say which is "
                "which by data.columns={source: translation.CODE, target: translation.CODE}"
            )
        found.append(written[language])
    return prefix + found[0], found[1]


@lru_cache(maxsize=8)
def frame(tokenizer: Any, side: str) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text of a side (a key of SIDES)."""
    plain, framed = (
        tokenizer(**{side: "a"}, add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)
    )
    places = range(len(framed) - len(plain) + 1)
    begin = next(at for at in places if framed[at : at + len(plain)] == plain)
    return framed[:begin], framed[begin + len(plain) :]


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    """Ids of the source, those of the target, and as labels those of the target that count."""
    target, counts = example.columns[TARGET].astype(np.int64), example.columns["counts"]
    return {
        "input_ids": example.ids.astype(np.int64),
        "decoder_labels": target,
        "labels": np.where(counts > 0, target, IGNORE_INDEX),
        "target_weights": counts.astype(np.float32),
    }


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    """Summed negative log-likelihood of the target's tokens, in nats, each times what its record counts; in training
    it may be smoothed."""
    nll = forward.nll(batch, settings.label_smoothing if forward.model.training else 0.0)
    return Outcome(nll.total, {"correct": nll.correct})


def sample(sampling: Sampling, example: Example, context: Context) -> dict[str, str]:
    """What the model writes for an example."""
    parts = {"prompt": example.ids.tolist(), "reference": example.columns[TARGET].tolist()}
    parts["answer"] = _generated(sampling, parts["prompt"], context.tokenizer)
    return {name: context.tokenizer.decode(part, skip_special_tokens=True) for name, part in parts.items()}


def ask(record: Pair, context: Context) -> Prompt:
    """The source of a record, cut as in training where it is too long; beside the target, if it has one.

    Raises:
        ValueError: It has no tokens, or is to be left out for its length.
    """
    _refuse_idle_languages(record, context)
    whole = {*record.written} == {"source"}
    source, *target = [(context.task.source_prefix or "") + record.written["source"]] if whole else _chosen(
        record.written, context.task
    )  # fmt: skip
    made = _side(record, context, "text", source)
    if isinstance(made, Dropped):
        raise ValueError(made.reason)
    told: dict[str, Any] = {"truncated": True} if made.cut else {}
    return Prompt(made.ids.tolist(), told | ({"reference": target[0]} if target else {}))


def begin(model: Any, tokenizer: Any) -> list[int]:
    """What the decoder has read before it writes the first token of a text."""
    before, after = frame(tokenizer, "text_target")
    ids = torch.tensor([[*before, *after]], device=model.device)
    return beginning(model, ids, 1 + len(before))[0].tolist()


def _generated(sampling: Sampling, ids: list[int], tokenizer: Any) -> list[int]:
    begun = torch.tensor([begin(sampling.model, tokenizer)], device=sampling.device)
    # otherwise it is put in front once more
    settings = {"decoder_start_token_id": int(begun[0, 0])}
    return sampling.generate(ids, tokenizer.pad_token_id, sys.maxsize, decoder_input_ids=begun, settings=settings)


def beginning(model: Any, target: torch.Tensor, count: int) -> torch.Tensor:
    """What a decoder has read before it writes the first token of a text: (1, count).

    Args:
        model: The encoder-decoder.
        target: Ids of any target with its special tokens, or of these alone, (1, tokens).
        count: One for the token that the model begins with, and those that stand before a text.
    """
    return decoder_ids(model, target)[:, :count]


METRICS = token_metrics("target")

TASK = Task(
    shapes=SHAPES,
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=SEQ2SEQ,
    metrics=METRICS,
    target="target_tokens",
    encoded=frozenset({"source_prefix", "source_language", "target_language"}),
    ready=ready,
    settings=frozenset(
        "data.max_target_length model.logits_chunk task.source_prefix task.source_language task.target_language "
        "task.label_smoothing train.samples train.sample_tokens".split()
    ),
    sample=sample,
    asked=ASKED,
    ask=ask,
    begin=begin,
    asks_by=frozenset({"data.max_length", "data.on_overflow"}),
)
