"""A tag for each word: named entities (BIO, BIOES) or plain labels, from token lists, CoNLL columns or spans."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dsft.config.schema import OnOverflow, TaskConfig
from dsft.data.dataset import Prepared
from dsft.data.sources import Fields
from dsft.errors import UserError
from dsft.metrics import SHOWN, Metric, classification, entities, judged, mean
from dsft.model.head import SINGLE, Head
from dsft.model.kind import TOKEN
from dsft.tasks import labels as naming
from dsft.tasks import media, texts, weights
from dsft.tasks.fit import TOO_LONG
from dsft.tasks.forward import Forward
from dsft.tasks.labels import Labels
from dsft.tasks.task import Answers, Context, Examples, Outcome, Records, Task, View, text_of
from dsft.tasks.windows import windows
from dsft.types import HAN, IGNORE_INDEX, Batch, Dropped, Example, Record

NO_WORD = "no word of which a token is left"
WORD = re.compile(rf"{HAN}|(?:(?!{HAN})[^\W_])+|[^\w\s]|_")
"""A word of a text: a Chinese character, a run of letters and digits, or any other character that is no space."""

CHINESE = re.compile(HAN)
WITHOUT_TOKEN = "with words that the tokenizer leaves nothing of, which are not learnt"
SHARED = "with words in one token with the word before, which are not learnt"


@dataclass(kw_only=True)
class Tagged(Record):
    """A text, its words and their tags.

    Attributes:
        text: All of it.
        words: Characters (begin, end) of each word, rising.
        tags: Of each word; None where they are to be told.
    """

    text: str
    words: list[tuple[int, int]]
    tags: list[str] | None = None

    def texts(self) -> dict[str, str]:
        return {"text": self.text}

    def protected_spans(self) -> dict[str, list[tuple[int, int]]]:
        return {"text": self.words}

    def with_texts(self, texts: Mapping[str, str]) -> Tagged:
        return replace(self, text=texts.get("text", self.text))


def _from_tokens(words: str, tags: str | None, fields: Fields, origin: str) -> Tagged:
    """The record of a row with a list of words, and one of tags where a field has them.

    Raises:
        ValueError: They are none, or not of a length; the message names the field.
    """
    for name in filter(None, (words, tags)):
        if not isinstance(fields[name], list | tuple) or not fields[name]:
            raise ValueError(f"field `{name}` is a list of one or more, but this is {fields[name]!r:.40}")
    if tags and len(fields[words]) != len(fields[tags]):
        raise ValueError(f"field `{words}` has {len(fields[words])} words, and `{tags}` has {len(fields[tags])} tags")
    text, spans = "", list[tuple[int, int]]()
    for number, value in enumerate(fields[words]):
        word = text_of(value, f"{words}[{number}]", empty=False)
        # Chinese is written without spaces
        apart = text and not (CHINESE.match(text[-1]) and CHINESE.match(word))
        begin = len(text) + bool(apart)
        text += f" {word}" if apart else word
        spans.append((begin, len(text)))
    names = [naming.name_of(tag, f"{tags}[{number}]") for number, tag in enumerate(fields[tags])] if tags else None
    return Tagged(text=text, words=spans, tags=names, weight=weights.of_record(fields), origin=origin)


def _from_spans(name: str, fields: Fields, origin: str) -> Tagged:
    """The record of a text with spans of its characters, `{start, end, label}` or `[start, end, label]`; tags are BIO.

    Raises:
        ValueError: A span is none, lies outside, or overlaps another; the message names it.
    """
    media.refuse_fields(fields)
    text = text_of(fields["text"], "text", empty=False)
    if not isinstance(fields[name], list | tuple):
        raise ValueError(f"field `{name}` is a list of spans, but this is {type(fields[name]).__name__}")
    spans = sorted(_span(value, f"{name}[{number}]", len(text)) for number, value in enumerate(fields[name]))
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise ValueError(f"field `{name}`: spans {one!r} and {other!r} overlap at character {begin}")
    cuts = {place for begin, end, _ in spans for place in (begin, end)}
    words = [part for found in WORD.finditer(text) for part in _cut(found.span(), cuts)]
    tags = [entities.OUTSIDE] * len(words)
    for begin, end, label in spans:
        inside = [n for n, (b, e) in enumerate(words) if begin <= b and e <= end]
        if not inside:
            raise ValueError(f"field `{name}`: the span {label!r} from {begin} to {end} holds no word")
        tags[inside[0]] = f"B-{label}"
        for number in inside[1:]:
            tags[number] = f"I-{label}"
    return Tagged(text=text, words=words, tags=tags, weight=weights.of_record(fields), origin=origin)


def _span(value: Any, field: str, length: int) -> tuple[int, int, str]:
    if isinstance(value, dict):
        value = [value.get(key) for key in ("start", "end", "label")]
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"field `{field}` is no span: {{start, end, label}} or [start, end, label]")
    begin, end, label = value
    if not (type(begin) is type(end) is int and 0 <= begin < end <= length):
        raise ValueError(f"field `{field}` begins at {begin!r} and ends at {end!r} of {length} characters")
    return begin, end, naming.name_of(label, f"{field}.label")


def _cut(word: tuple[int, int], cuts: set[int]) -> list[tuple[int, int]]:
    """A word, cut where a span begins or ends inside."""
    places = [word[0], *sorted(place for place in cuts if word[0] < place < word[1]), word[1]]
    return list(pairwise(places))


SHAPES: dict[tuple[str, ...], Callable[[Fields, str], Tagged]] = {
    **{
        (words, tags): partial(_from_tokens, words, tags)
        for words in ("tokens", "words")
        for tags in ("tags", "ner_tags", "pos_tags", "labels")
    },
    **{("text", name): partial(_from_spans, name) for name in ("spans", "entities")},
}


def _plain(name: str, fields: Fields, origin: str) -> Tagged:
    """The record of a text alone."""
    media.refuse_fields(fields)
    text = text_of(fields[name], name, empty=False)
    words = [found.span() for found in WORD.finditer(text)]
    return Tagged(text=text, words=words, weight=weights.of_record(fields), origin=origin)


ASKED: dict[tuple[str, ...], Callable[[Fields, str], Tagged]] = {
    **{(words,): partial(_from_tokens, words, None) for words in ("tokens", "words")},
    **{(name,): partial(_plain, name) for name in ("text", "sentence", "content")},
}


def encode(record: Tagged, context: Context) -> list[Example | Dropped] | Dropped:
    """A text's tokens, in overlapping windows where it is too long; a word's first token has its tag, in one of them.

    Raises:
        UserError: It is too long, and that is an error or it is to be cut off; or nothing is left beside the overlap.
    """
    if not record.weight:
        return Dropped(texts.NO_WEIGHT)
    tokenizer, data = context.tokenizer, context.data
    encoding = tokenizer(record.text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False,
                         verbose=False)  # fmt: skip
    ids, inside = np.array(encoding["input_ids"], np.int32), ~np.array(encoding["special_tokens_mask"], bool)
    if not inside.any():
        return Dropped(NO_WORD)
    body = slice(int(inside.argmax()), len(ids) - int(inside[::-1].argmax()))
    before, after = ids[: body.start], ids[body.stop :]
    words = _first_tokens(record, encoding["offset_mapping"][body])
    room = data.max_length - len(before) - len(after)
    count = body.stop - body.start
    if count > room and data.on_overflow is OnOverflow.drop:
        return Dropped(TOO_LONG)
    _check_room(record, context, count, room)
    made: list[Example | Dropped] = []
    for begin, end, first, last in windows(count, room, context.task.overlap):
        own = np.where((np.arange(begin, end) >= first) & (np.arange(begin, end) < last), words[begin:end], -1)
        columns = {
            "ids": np.concatenate([before, ids[body][begin:end], after]),
            "words": np.concatenate([before * 0 - 1, own, after * 0 - 1]).astype(np.int32),
        }
        weight = record.weight * int((own >= 0).sum())
        tags = [record.tags[word] for word in own[own >= 0]] if record.tags is not None else []
        if record.tags is not None:
            columns[naming.COLUMN] = naming.keys(tags)
        names = tuple(dict.fromkeys(tags))
        made.append(Example(columns, len(columns["ids"]), weight, labels=names) if weight else Dropped(NO_WORD))
    return made if any(isinstance(part, Example) for part in made) else Dropped(NO_WORD)


def _check_room(record: Tagged, context: Context, count: int, room: int) -> None:
    data, overlap = context.data, context.task.overlap
    if data.on_overflow is OnOverflow.truncate:
        raise UserError(
            "data.on_overflow=truncate with task=tag would leave words without a tag, which no evaluation would miss. "
            "Leave it out, for windows; or choose drop or error."
        )
    if count > room and data.on_overflow is OnOverflow.error:
        raise UserError(
            f"{record.origin}: {count} tokens, and data.max_length={data.max_length} has room for {room}: raise it, or "
            "leave data.on_overflow out, for windows"
        )
    if count > room and overlap >= room:
        raise UserError(
            f"task.overlap={overlap} leaves nothing new in windows of data.max_length={data.max_length}: lower it"
        )


def _first_tokens(record: Tagged, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Of each token the word that it is the first one of, or -1: int32, shape (tokens,)."""
    found = np.full(len(offsets), -1, np.int32)
    token = 0
    for number, (begin, end) in enumerate(record.words):
        while token < len(offsets) and (offsets[token][1] <= begin or offsets[token][0] == offsets[token][1]):
            token += 1
        if token == len(offsets) or offsets[token][0] >= end:
            record.notes.add(WITHOUT_TOKEN)
        elif found[token] >= 0:
            record.notes.add(SHARED)
        else:
            found[token] = number
    return found


def settle(context: Context, data: Prepared, own: list[str]) -> Context:
    """The context with all tags; those that the model has been trained for are kept in their order.

    Raises:
        UserError: As `labels.collected`.
    """
    return replace(context, labels=Labels(naming.collected(data.labels, context.task.labels, own)))


def head(context: Context) -> Head:
    """The head that a model gets."""
    task = context.task
    return Head(context.labels.names, SINGLE, context.seed, task.head_init, task.head_dropout)


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    """Ids, and the number of its tag at the first token of each word; with its record and its place in that."""
    ids, words = example.ids.astype(np.int64), example.columns["words"]
    labels, own = np.full_like(ids, IGNORE_INDEX), words >= 0
    told = naming.COLUMN in example.columns
    # where tags are to be told any one marks the words
    labels[own] = context.labels.numbers(example.columns[naming.COLUMN]) if told else 0
    counts = np.full(len(ids), example.weight / own.sum(), np.float32)
    place = {"target_record": np.full_like(ids, example.record), "target_word": words.astype(np.int64)}
    return {"input_ids": ids, "labels": labels, "target_weights": counts, **place}


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    """Summed cross entropy of the words' tags, in nats, each times what its record counts."""
    tensors = batch.tensors
    logits, target, counts = forward.target_logits(batch).float(), tensors["target_ids"], tensors["target_weights"]
    each = F.cross_entropy(logits, target, reduction="none") * counts
    if "target_record" not in tensors or not batch.examples:
        return Outcome(each.sum(dtype=torch.float64))
    chances = logits.detach().softmax(-1).max(-1)
    rows = {"predicted": chances.indices, "chance": chances.values, "true": target, "counts": counts}
    rows |= {"record": tensors["target_record"], "word": tensors["target_word"]}
    return Outcome(each.sum(dtype=torch.float64), rows=rows)


def judge(rows: dict[str, np.ndarray], context: Context, data: Examples) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of an evaluation: entities strictly, by type and both ends, or words by plain tag; windows of a
    record are joined. Sequences that are not legal are read by the rule of `metrics.entities`."""
    order = np.lexsort((rows["word"], rows["record"]))
    rows = {name: values[order] for name, values in rows.items()}
    right = rows["predicted"] == rows["true"]
    numbers = {"accuracy": float((right * rows["counts"]).sum() / rows["counts"].sum())}
    names = context.labels.names
    if not entities.is_scheme(names):
        table = classification.confusion(rows["predicted"], rows["true"], rows["counts"], len(names))
        by_tag = entities.by_tag(table, names)
        f1 = [row["f1"] for row in by_tag.values()]
        return numbers | {"tag_f1_macro": sum(f1) / len(f1)}, {"labels": by_tag}
    found, at = entities.Found(), 0
    for _, run in groupby(rows["record"].tolist()):
        here = slice(at, at + len(list(run)))
        predicted, true = ([names[tag] for tag in rows[name][here]] for name in ("predicted", "true"))
        found.add(predicted, true, float(rows["counts"][here][0]))
        at = here.stop
    return numbers | found.numbers(), {"labels": found.by_type()}


def answer(rows: dict[str, np.ndarray], context: Context, data: Examples, records: Records) -> Answers:
    """Of each word its tag and how probable that is, windows joined; of entities a legal sequence by the rule of
    `metrics.entities`, and where each is in the text. Words of which no token is left are outside of all."""
    names, scheme = context.labels.names, entities.is_scheme(context.labels.names)
    nothing = entities.OUTSIDE if scheme else None
    for number, record in records.items():
        here = np.flatnonzero(rows["record"] == number)
        tags: list[Any] = [nothing] * len(record.words)
        chances: list[Any] = [None] * len(record.words)
        for word, tag, chance in zip(*(rows[name][here].tolist() for name in ("word", "predicted", "chance"))):
            tags[word], chances[word] = names[tag], chance
        told: dict[str, Any] = {"words": [record.text[begin:end] for begin, end in record.words]}
        if scheme:
            tags = entities.repaired(tags)
            places = [(kind, record.words[b][0], record.words[e - 1][1]) for kind, b, e in entities.entities(tags)]
            told["entities"] = [
                {"start": begin, "end": end, "label": kind, "text": record.text[begin:end]}
                for kind, begin, end in places
            ]
        yield number, {"prediction": tags, "probabilities": chances} | told


METRICS = {
    "loss": Metric("nats per word", "Loss", "{:.4f}", ("loss", "weight"), mean, better="lower"),
    "accuracy": judged("share of words with the right tag", "Tag accuracy", "accuracy", **SHOWN),
    "f1": judged(
        "entities with type and both ends right", "Entity F1", "f1", meaning="left out of plain tags", **SHOWN
    ),
    "precision": judged("share of entities found", "Entity precision", "precision"),
    "recall": judged("share of entities there", "Entity recall", "recall"),
    "f1_macro": judged("mean over types", "Entity F1, macro", "f1_macro"),
    "tag_f1_macro": judged("mean over tags", "Tag F1, macro", "tag_f1_macro", meaning="of plain tags", **SHOWN),
}

TASK = Task(
    shapes=SHAPES,
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=TOKEN,
    metrics=METRICS,
    target="words",
    encoded=frozenset({"overlap"}),
    settle=settle,
    head=head,
    judge=judge,
    asked=ASKED,
    answer=answer,
    settings=frozenset("model.allow_missing task.labels task.overlap task.head_init task.head_dropout".split()),
)
