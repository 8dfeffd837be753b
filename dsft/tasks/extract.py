"""Answers to questions as parts of a text: where they begin and end, or that there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from dsft.config.schema import OnOverflow, TaskConfig
from dsft.data.dataset import Prepared
from dsft.data.sources import Fields
from dsft.errors import UserError
from dsft.metrics import SHOWN, Metric, answers, judged, mean
from dsft.model.head import SINGLE, Head
from dsft.model.kind import ANSWERS
from dsft.tasks import media, texts, weights
from dsft.tasks.fit import TOO_LONG
from dsft.tasks.forward import Forward
from dsft.tasks.labels import Labels
from dsft.tasks.task import Answers, Context, Examples, Outcome, Records, Task, View, text_of
from dsft.tasks.windows import windows
from dsft.types import Batch, Dropped, Example, Record

THRESHOLD = "no_answer_threshold"

NO_ROOM = "questions that leave no room for the text in data.max_length"
NO_TOKEN = "answers that the tokenizer leaves nothing of"
MOVED = "answers that are not where `answer_start` says, which were looked for nearby"

WITH_ANSWER, WITHOUT_ANSWER = "with an answer", "without an answer"
"""What a question is counted as, where other tasks have labels."""


@dataclass(kw_only=True)
class Question(Record):
    """A question about a text.

    Attributes:
        question: The question.
        context: The text.
        answers: All that count as right, none of a question without an answer; None where it is to be told.
        span: Characters (begin, end) of the first of them in the text; None if there is none.
    """

    question: str
    context: str
    answers: tuple[str, ...] | None
    span: tuple[int, int] | None

    def texts(self) -> dict[str, str]:
        return {"question": self.question, "context": self.context}

    def protected_spans(self) -> dict[str, list[tuple[int, int]]]:
        return {"context": [self.span]} if self.span else {}

    def with_texts(self, texts: Mapping[str, str]) -> Question:
        return replace(self, question=texts.get("question", self.question))


def _question(name: str | None, fields: Fields, origin: str) -> Question:
    """The record that a row holds; `name` is the field with the answers, if there is any.

    Raises:
        ValueError: A text is missing or empty, or the answer is no part of the text; the message names the field.
    """
    media.refuse_fields(fields)
    question, context = (text_of(fields[one], one, empty=False) for one in ("question", "context"))
    media.refuse_placeholders(question, "question")
    media.refuse_placeholders(context, "context")
    if name is None:
        return Question(question=question, context=context, answers=None, span=None, origin=origin)
    given = _answers(fields[name], name, fields.get("answer_start"))
    impossible = fields.get("is_impossible")
    if not isinstance(impossible, bool | None):
        raise ValueError(f"field `is_impossible` is true or false, but this is {impossible!r:.40}")
    if impossible and given:
        raise ValueError(f"field `is_impossible` is true, and `{name}` has an answer")
    if impossible is False and not given:
        raise ValueError(f"field `is_impossible` is false, and `{name}` has no answer")
    record = Question(
        question=question,
        context=context,
        answers=tuple(dict.fromkeys(text for text, _ in given)),
        span=None,
        weight=weights.of_record(fields),
        origin=origin,
    )
    if given:
        record.span, moved = _found(*given[0], context, name)
        record.notes |= {MOVED} if moved else set()
    return record


def _answers(value: Any, field: str, start: Any) -> list[tuple[str, int | None]]:
    """Answers and where they begin, of any of the forms in which they come: a text, a list of texts or of objects with
    `text` and `answer_start`, or an object with a list of each."""
    if isinstance(value, dict) and isinstance(value.get("text"), list | tuple):
        starts = value.get("answer_start")
        starts = [None] * len(value["text"]) if starts is None else starts
        if not isinstance(starts, list | tuple) or len(starts) != len(value["text"]):
            raise ValueError(f"field `{field}` has {len(value['text'])} texts, and not as many in `answer_start`")
        value = [{"text": text, "answer_start": one} for text, one in zip(value["text"], starts)]
    elif isinstance(value, str):
        value = [{"text": value, "answer_start": start}] if value.strip() else []
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"field `{field}` is a text, a list or an object, but this is {type(value).__name__}")
    found = []
    for number, one in enumerate({"text": one} if isinstance(one, str) else one for one in value):
        if not isinstance(one, dict) or not isinstance(one.get("text"), str) or not one["text"].strip():
            raise ValueError(f"field `{field}[{number}]` has no `text` with an answer")
        begin = one.get("answer_start")
        if isinstance(begin, bool) or not isinstance(begin, int | None):
            raise ValueError(f"field `{field}[{number}].answer_start` is a number of characters, not {begin!r:.40}")
        found.append((one["text"], begin))
    return found


def _found(text: str, begin: int | None, context: str, field: str) -> tuple[tuple[int, int], bool]:
    """Characters of an answer in its text, and whether they are not where they are said to be.

    Raises:
        ValueError: It is nowhere.
    """
    if begin is not None and begin >= 0 and context.startswith(text, begin):
        return (begin, begin + len(text)), False
    text = text.strip()
    places = [at for at in range(len(context) - len(text) + 1) if context.startswith(text, at)]
    if not places:
        raise ValueError(f"field `{field}`: the answer {text!r:.40} is no part of `context`")
    near = min(places, key=lambda at: abs(at - (begin or 0)))
    return (near, near + len(text)), begin is not None and begin >= 0


SHAPES: dict[tuple[str, ...], Callable[[Fields, str], Question]] = {
    ("question", "context", name): partial(_question, name) for name in ("answers", "answer")
}

ASKED: dict[tuple[str, ...], Callable[[Fields, str], Question]] = {("question", "context"): partial(_question, None)}


def encode(record: Question, context: Context) -> list[Example | Dropped] | Dropped:
    """Question and text as the tokenizer frames a pair, in overlapping windows of the text where it is too long.

    A window learns where the answer is if it holds all of it, else that it is not there, which is its first token.

    Raises:
        UserError: It is too long, and that is an error or it is to be cut off; or the tokenizer puts no class token in
            front.
    """
    tokenizer, data = context.tokenizer, context.data
    if not record.weight:
        return Dropped(texts.NO_WEIGHT)
    encoding = tokenizer(record.question, record.context, return_offsets_mapping=True, truncation=False, verbose=False)
    _check(encoding["input_ids"][0], context)
    (inside,) = np.nonzero(np.array([part == 1 for part in encoding.sequence_ids()]))
    if not len(inside):
        return Dropped(NO_TOKEN)
    first, last = int(inside[0]), int(inside[-1]) + 1
    length, room = len(encoding["input_ids"]), data.max_length - (len(encoding["input_ids"]) - (last - first))
    if room < 1:
        return Dropped(NO_ROOM)
    if length > data.max_length and data.on_overflow is OnOverflow.drop:
        return Dropped(TOO_LONG)
    if length > data.max_length and data.on_overflow is OnOverflow.error:
        raise UserError(
            f"{record.origin}: {length} tokens, but data.max_length is {data.max_length}: raise it, or leave "
            "data.on_overflow out, for windows"
        )
    span = _token_span(encoding["offset_mapping"][first:last], record)
    if record.span and span is None:
        return Dropped(NO_TOKEN)
    whole = _columns(encoding, slice(first, last))
    return [
        _window(record, whole, (first, last), (begin, end), span)
        for begin, end, *_ in windows(last - first, room, min(context.task.overlap, room // 2))
    ]


def _window(
    record: Question,
    whole: dict[str, np.ndarray],
    text: tuple[int, int],
    window: tuple[int, int],
    span: tuple[int, int] | None,
) -> Example:
    """The example of a window.

    Args:
        record: The question.
        whole: Columns of question and text.
        text: Which of their tokens are of the text.
        window: Which of these are in the window, counted from the text's first; likewise `span`.
        span: The first and the last token of the answer, if there is one.
    """
    (first, last), (begin, end) = text, window
    kept = np.r_[0:first, first + begin : first + end, last : len(whole["ids"])]
    columns = {name: column[kept] for name, column in whole.items()}
    target = (0, 0)
    if span is not None and begin <= span[0] and span[1] < end:
        target = span[0] - begin + first, span[1] - begin + first
    columns["target"] = np.array(target, np.int32)
    # what an evaluation needs of the question as a whole stands in its first window
    columns["context"] = _bytes("" if begin else record.context)
    columns["answers"] = _bytes("" if begin else json.dumps(record.answers or (), ensure_ascii=False))
    labels = () if begin else (WITH_ANSWER if record.answers else WITHOUT_ANSWER,)
    return Example(columns, len(kept), record.weight, labels=labels)


def _check(first: int, context: Context) -> None:
    """Refuse what no record could be encoded by; `first` is the first token of any."""
    if context.tokenizer.cls_token_id != first:
        raise UserError(
            "task=extract: where a text has no answer, a class token before the question is learnt, and the tokenizer "
            "of model.path puts none there: use an encoder, such as a BERT."
        )
    if context.data.on_overflow is OnOverflow.truncate:
        raise UserError(
            "data.on_overflow=truncate with task=extract would cut answers off. Leave it out, for windows; or choose "
            "drop or error."
        )


def _columns(encoding: Any, inside: slice) -> dict[str, np.ndarray]:
    """Columns of a pair's tokens: `ids`, `token_types` where the tokenizer gives any, and the characters of the
    text that each is, `begins` and `ends`; -1 for those that are not `inside` of it."""
    columns = {"ids": np.array(encoding["input_ids"], np.int32)}
    if "token_type_ids" in encoding:
        columns["token_types"] = np.array(encoding["token_type_ids"], np.int8)
    offsets = np.array(encoding["offset_mapping"], np.int32)
    for name, side in (("begins", 0), ("ends", 1)):
        columns[name] = np.full(len(offsets), -1, np.int32)
        columns[name][inside] = offsets[inside, side]
    return columns


def _token_span(offsets: list[tuple[int, int]], record: Question) -> tuple[int, int] | None:
    """The first and the last token of the answer, counted from the text's first; None if there is none."""
    if record.span is None:
        return None
    begin, end = record.span
    inside = [n for n, (b, e) in enumerate(offsets) if b < end and e > begin and b < e]
    return (inside[0], inside[-1]) if inside else None


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def settle(context: Context, data: Prepared, own: list[str]) -> Context:
    """The context with the names of the two outputs, and how a question is said to have no answer where that is left
    to the data."""
    labels = Labels(tuple(own) if len(own) == 2 else ("start", "end"))
    threshold = context.task.no_answer_threshold
    if threshold is None and WITHOUT_ANSWER in next(iter(data.labels.values())):
        threshold = 0.0
    return replace(context, labels=labels, task=replace(context.task, no_answer_threshold=threshold))


def head(context: Context) -> Head:
    """The head that a model gets."""
    return Head(context.labels.names, SINGLE, context.seed, context.task.head_init)


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    """Ids, which tokens are of the text, and where the answer begins and ends among all of them."""
    made: dict[str, Any] = texts.inputs(example.columns)
    made["of_context"] = (example.columns["begins"] >= 0).astype(np.int64)
    made["document_target"] = example.columns["target"].astype(np.int64)
    made["document_weight"] = np.float32(example.weight)
    return made | {"document_number": np.int64(example.number)}


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    """Summed over windows, times what each counts: the mean of the cross entropies of begin and end, in nats, each over
    all of the window's tokens."""
    logits, tensors = forward.logits(batch).float(), batch.tensors
    if "document_target" not in tensors:
        return Outcome(logits.sum(dtype=torch.float64) * 0)
    rows = _by_window(logits, batch, -torch.inf)
    target, counts = tensors["document_target"], tensors["document_weight"]
    each = -rows.log_softmax(1).gather(1, target[:, None])[:, 0].mean(-1)
    total = (each * counts).sum(dtype=torch.float64)
    if forward.model.training:
        return Outcome(total)
    found = _best_spans(rows.detach(), _by_window(tensors["of_context"].flatten(), batch, 0), settings)
    return Outcome(total, rows=found | {"number": tensors["document_number"]})


def _by_window(values: torch.Tensor, batch: Batch, filling: float) -> torch.Tensor:
    """Values of every position of the layout as a row for each document: (documents, tokens of the longest, ...)."""
    if not batch.padded:
        return pad_sequence(list(values.split(batch.lengths)), batch_first=True, padding_value=filling)
    rows = values.unflatten(0, (len(batch.lengths), -1))
    real = torch.arange(rows.shape[1], device=rows.device) < batch.tensors["lengths"][:, None]
    return rows.masked_fill(~real.view(*real.shape, *[1] * (rows.dim() - 2)), filling)


def _best_spans(rows: torch.Tensor, inside: torch.Tensor, settings: TaskConfig) -> dict[str, torch.Tensor]:
    """Of each window the best span of the text, of equally good ones the shortest and first: its first and last token,
    the sum of their logits, and that of no answer."""
    kept = rows.masked_fill(inside[..., None] == 0, -torch.inf)
    start, end = kept.unbind(-1)
    scores = torch.full((len(rows),), -torch.inf, device=rows.device)
    begins, ends = torch.zeros_like(scores, dtype=torch.int64), torch.zeros_like(scores, dtype=torch.int64)
    for further in range(min(settings.max_answer_tokens, rows.shape[1])):
        sums = start[:, : rows.shape[1] - further] + end[:, further:]
        here, at = sums.max(1)
        better = here > scores
        scores = torch.where(better, here, scores)
        begins, ends = torch.where(better, at, begins), torch.where(better, at + further, ends)
    return {"score": scores, "begin": begins, "end": ends, "nothing": rows[:, 0].sum(-1)}


def judge(rows: dict[str, np.ndarray], context: Context, data: Examples) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of an evaluation: a question's answer is the best span of all its windows, or none where the least
    score of none exceeds that by more than the threshold."""
    order = np.argsort(rows["number"])
    rows = {name: values[order] for name, values in rows.items()}
    parts = groupby(range(len(order)), key=lambda number: data[number].record)
    found = _Answered(*map(np.array, zip(*(_answered(rows, list(part), data) for _, part in parts))))
    threshold = _threshold(context)
    scores, empty, counts = found.scores(np.inf if threshold is None else threshold), found.empty, found.counts
    numbers = {"questions": float(counts.sum())} | dict(zip(("exact", "f1"), _means(scores, counts)))
    if not empty.any():
        return numbers, {}
    numbers["no_answer_accuracy"] = _means(scores[empty], counts[empty])[0]
    if empty.all():
        return numbers, {}
    numbers["f1_with_answer"] = _means(scores[~empty], counts[~empty])[1]
    best = answers.no_answer_threshold(found.margins, (found.nothing - found.said)[:, 1] * counts)
    exact, f1 = _means(found.scores(best), counts)
    return numbers, {"best_no_answer_threshold": {"threshold": best, "exact": exact, "f1": f1}}


class _Answered(NamedTuple):
    """What became of questions.

    Attributes:
        said: Scores of the best span, shape (questions, 2).
        nothing: Those of saying that there is no answer.
        margins: By how much nothing scores more than the span, shape (questions,).
        counts: What each counts.
        empty: Whether it has no answer.
    """

    said: np.ndarray
    nothing: np.ndarray
    margins: np.ndarray
    counts: np.ndarray
    empty: np.ndarray

    def scores(self, threshold: float) -> np.ndarray:
        """Scores where those are said to have no answer whose margin is larger than the threshold."""
        return np.where((self.margins > threshold)[:, None], self.nothing, self.said)


def _threshold(context: Context) -> float | None:
    """By how much no answer has to score more; None where every question is answered."""
    given = context.task.no_answer_threshold
    return given if given is not None else (context.decision or {}).get(THRESHOLD)


def decision(context: Context, about: Mapping[str, Any]) -> dict[str, Any]:
    """How a question is said to have no answer, as it was given, or told by the training data."""
    threshold = context.task.no_answer_threshold
    return {} if threshold is None else {THRESHOLD: threshold}


def answer(rows: dict[str, np.ndarray], context: Context, data: Examples, records: Records) -> Answers:
    """A question's answer and where it is in the text, or none; with the logits of both, each the sum of two."""
    rows = {name: values[np.argsort(rows["number"])] for name, values in rows.items()}
    threshold = _threshold(context)
    for number, part in groupby(range(len(data)), key=lambda place: data[place].record):
        numbers = list(part)
        (begin, end), best = _said(rows, numbers, data)
        score, nothing = float(rows["score"][best]), float(rows["nothing"][numbers].min())
        told: dict[str, Any] = {"score": score, "no_answer_score": nothing}
        if threshold is not None and nothing - score > threshold:
            yield number, {"prediction": "", "start": None, "end": None} | told
        else:
            text = records[number].context[begin:end]
            yield number, {"prediction": text, "start": begin, "end": end} | told


def _said(rows: dict[str, np.ndarray], numbers: list[int], data: Examples) -> tuple[tuple[int, int], int]:
    """Characters of a question's best span over all of its windows, without spaces at their ends; and which window."""
    best = max(numbers, key=lambda number: rows["score"][number])
    text, window = data[numbers[0]].columns["context"].tobytes().decode(), data[best].columns
    begin, end = int(window["begins"][rows["begin"][best]]), int(window["ends"][rows["end"][best]])
    part = text[begin:end]
    begin += len(part) - len(part.lstrip())
    return (begin, begin + len(part.strip())), best


def _answered(rows: dict[str, np.ndarray], numbers: list[int], data: Examples) -> tuple[Any, ...]:
    """What became of a question, by its windows; as the attributes of `_Answered`."""
    (begin, end), best = _said(rows, numbers, data)
    first = data[numbers[0]]
    text = first.columns["context"].tobytes().decode()
    said = text[begin:end]
    right = json.loads(first.columns["answers"].tobytes().decode())
    chinese = answers.is_chinese(text)
    of_span, of_nothing = (answers.score(given, right, chinese) for given in (said, ""))
    margin = float(rows["nothing"][numbers].min() - rows["score"][best])
    return of_span, of_nothing, margin, first.weight, not right


def _means(scores: np.ndarray, counts: np.ndarray) -> list[float]:
    return ((scores * counts[:, None]).sum(0) / counts.sum()).tolist()


METRICS = {
    "loss": Metric("nats per window", "Loss", "{:.4f}", ("loss", "weight"), mean, better="lower"),
    "exact": judged("share of questions answered word for word", "Exact match", "exact", **SHOWN),
    "f1": judged(
        "mean over questions", "Answer F1", "f1", meaning="by SQuAD's rules, of Chinese texts by CMRC's", **SHOWN
    ),
    "f1_with_answer": judged("mean over questions with an answer", "Answer F1, with an answer", "f1_with_answer"),
    "no_answer_accuracy": judged(
        "share of questions without an answer", "Accuracy, without an answer", "no_answer_accuracy"
    ),
    "questions": judged("weighted", "Questions", "questions", "{:,.0f}", better=None),
}

TASK = Task(
    shapes=SHAPES,
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=ANSWERS,
    metrics=METRICS,
    target="windows",
    encoded=frozenset({"overlap"}),
    settle=settle,
    head=head,
    judge=judge,
    decision=decision,
    asked=ASKED,
    answer=answer,
    settings=frozenset(
        "model.allow_missing task.overlap task.max_answer_tokens task.no_answer_threshold task.head_init".split()
    ),
)
