"""Regression on texts, or on pairs of them: one number each, or several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dsft.config.schema import ChunkPool, RegressionLoss, TaskConfig
from dsft.data.dataset import Prepared
from dsft.data.sources import Fields
from dsft.errors import UserError
from dsft.metrics import Metric, judged, mean
from dsft.metrics.regression import regression
from dsft.model.head import REGRESSION, Head
from dsft.model.kind import SEQUENCE
from dsft.tasks import texts
from dsft.tasks.forward import Forward
from dsft.tasks.labels import Labels
from dsft.tasks.task import Answers, Context, Examples, Outcome, Records, Task, View
from dsft.types import Batch, Dropped, Example

COLUMN = "numbers"
"""The column of what is to be predicted, float64."""


@dataclass(kw_only=True)
class Rated(texts.Texts):
    """A text, or two, with numbers.

    Attributes:
        numbers: What is to be predicted; None where it is to be told.
    """

    numbers: tuple[float, ...] | None


def _rated(names: tuple[str, ...], field: str | None, fields: Fields, origin: str) -> Rated:
    if field is None:
        return Rated(**texts.read(names, fields, origin), numbers=None)
    value = fields[field]
    values = value if isinstance(value, list | tuple) else [value]
    numbers = tuple(_number(one, f"{field}[{n}]" if value is values else field) for n, one in enumerate(values))
    if not numbers:
        raise ValueError(f"field `{field}` is empty")
    return Rated(**texts.read(names, fields, origin), numbers=numbers)


def _number(value: Any, field: str) -> float:
    """A number, which CSV holds as text.

    Raises:
        ValueError: It is none, or not finite; the message names the field.
    """
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"field `{field}` is {value!r:.40}, and a finite number is needed")
    return number


SHAPES: dict[tuple[str, ...], Callable[[Fields, str], Rated]] = {
    (*names, field): partial(_rated, names, field)
    for field in ("label", "labels", "score", "value", "target")
    for names in texts.PAIRS
}

ASKED: dict[tuple[str, ...], Callable[[Fields, str], Rated]] = {
    names: partial(_rated, names, None) for names in texts.PAIRS
}


def encode(record: Rated, context: Context) -> list[Example | Dropped] | Dropped:
    """A text's tokens as the tokenizer frames them, and its numbers.

    Raises:
        ValueError: It has another number of numbers than `task.labels` names.
        UserError: As `texts.parts`.
    """
    named = context.task.labels
    if record.numbers is not None and named and len(record.numbers) != len(named):
        raise ValueError(f"it has {len(record.numbers)} numbers, and task.labels names {len(named)}")
    if context.task.chunk.pool is ChunkPool.vote:
        raise UserError("task.chunk.pool=vote: chunks vote for labels, not for numbers. Choose mean, max or first.")
    parts = texts.parts(record, context)
    if isinstance(parts, Dropped):
        return parts
    for part in parts:
        if record.numbers is not None:
            part.columns[COLUMN] = np.array(record.numbers, np.float64)
    return [Example(part.columns, len(part.columns["ids"]), part.weight, truncated=part.cut) for part in parts]


def settle(context: Context, data: Prepared, own: list[str]) -> Context:
    """The context with the names of the numbers, and what is a standard deviation and the mean of each in training.

    Raises:
        UserError: Records have different numbers of numbers.
    """
    columns = [part.entry.columns[COLUMN] for part in (data.train, data.validation, data.test) if part]
    sizes = {int(size) for column in columns for size in np.unique(np.diff(column.offsets))}
    if len(sizes) > 1:
        raise UserError(
            f"task=regress: some records have {min(sizes)} number(s), and some {max(sizes)}: give each the same, or "
            "name them all in task.labels, so that the others are malformed"
        )
    (size,) = sizes
    names = tuple(context.task.labels) or (tuple(own) if len(own) == size else tuple(f"y{n}" for n in range(size)))
    train = data.train
    numbers = train.entry.columns[COLUMN].data.reshape(-1, size)[train.selection]
    shift = np.average(numbers, axis=0, weights=train.weights)
    scale = np.sqrt(np.average((numbers - shift) ** 2, axis=0, weights=train.weights))
    scale[scale == 0] = 1.0
    if not context.task.standardise:
        shift, scale = np.zeros(size), np.ones(size)
    return replace(context, labels=Labels(names, scale=tuple(scale.tolist()), shift=tuple(shift.tolist())))


def head(context: Context) -> Head:
    """The head that a model gets."""
    task, labels = context.task, context.labels
    return Head(
        labels=labels.names,
        problem=REGRESSION,
        seed=context.seed,
        init=task.head_init,
        dropout=task.head_dropout,
        pool=task.pool,
        pad_token_id=context.tokenizer.pad_token_id,
        scale=labels.scale,
        shift=labels.shift,
    )


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    """Ids, the numbers, what each is divided by in the loss, and what the record counts."""
    made: dict[str, Any] = {**texts.inputs(example.columns)}
    if COLUMN not in example.columns:
        return made
    made["document_target"] = example.columns[COLUMN].astype(np.float32)
    made["document_scale"] = np.array(context.labels.scale, np.float32)
    return made | {"document_weight": np.float32(example.weight)}


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    """Summed loss of the batch's records, each the mean over its numbers times what it counts; errors are counted in
    standard deviations of the training data."""
    logits = forward.logits(batch).float()
    if "document_target" not in batch.tensors:
        return Outcome(logits.sum(dtype=torch.float64) * 0, rows={"logits": logits.detach()})
    target, counts = batch.tensors["document_target"], batch.tensors["document_weight"]
    error = (logits - target) / batch.tensors["document_scale"]
    match settings.regression_loss:
        case RegressionLoss.mse:
            each = error.square()
        case RegressionLoss.mae:
            each = error.abs()
        case RegressionLoss.huber:
            each = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=settings.huber_delta)
    rows = {"logits": logits.detach(), "targets": target, "counts": counts}
    return Outcome((each.mean(-1) * counts).sum(dtype=torch.float64), rows=rows)


def judge(rows: dict[str, np.ndarray], context: Context, data: Examples) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of an evaluation, in the targets' own unit, and those of each number by its name."""
    rows = texts.by_record(rows, context, data)
    predictions, targets, counts = rows["logits"], rows["targets"], rows["counts"]
    each = {
        name: regression(predictions[:, n : n + 1], targets[:, n : n + 1], counts)
        for n, name in enumerate(context.labels.names)
    }
    return regression(predictions, targets, counts), {"labels": each} if len(each) > 1 else {}


def answer(rows: dict[str, np.ndarray], context: Context, data: Examples, records: Records) -> Answers:
    """The number, or several by their names."""
    names = context.labels.names
    rows, numbers = texts.by_record(rows, context, data), dict.fromkeys(texts.records(data).tolist())
    for number, each in zip(numbers, rows["logits"].astype(np.float64).tolist()):
        yield number, {"prediction": each[0] if len(names) == 1 else dict(zip(names, each))}


METRICS = {
    "loss": Metric("mean loss of a record", "Loss", "{:.4f}", ("loss", "weight"), mean, better="lower",
                   meaning="errors in standard deviations of the training data"),
    "mse": judged("square of the targets' unit", "Mean squared error", "mse", "{:.4f}", better="lower"),
    "rmse": judged("the targets' unit", "Root mean squared error", "rmse", "{:.4f}", better="lower", headline=True),
    "mae": judged("the targets' unit", "Mean absolute error", "mae", "{:.4f}", better="lower"),
    "r2": judged("at most 1", "R2", "r2", "{:.4f}"),
    "pearson": judged("-1 to 1", "Pearson", "pearson", "{:.4f}", bar="{label} {value}", headline=True),
    "spearman": judged("-1 to 1", "Spearman", "spearman", "{:.4f}", headline=True),
}  # fmt: skip

TASK = Task(
    shapes=SHAPES,
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=SEQUENCE,
    metrics=METRICS,
    target="records",
    encoded=frozenset({"labels", "chunk.length", "chunk.stride", "chunk.pool"}),
    settle=settle,
    head=head,
    problems=frozenset({REGRESSION}),
    judge=judge,
    asked=ASKED,
    answer=answer,
    settings=frozenset(
        "task.chunk.length task.chunk.stride task.chunk.pool "
        "model.allow_missing task.labels task.regression_loss task.huber_delta task.standardise task.head_init "
        "task.head_dropout task.pool".split()
    ),
)
