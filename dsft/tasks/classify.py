"""Classification of texts, or of pairs of them: one label each, or several at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dsft.config.schema import TaskConfig, Thresholds
from dsft.data.dataset import Prepared
from dsft.data.sources import Fields
from dsft.metrics import Metric, classification, judged, mean
from dsft.model.head import MULTI, SINGLE, Head
from dsft.model.kind import SEQUENCE
from dsft.tasks import labels as naming
from dsft.tasks import texts
from dsft.tasks.forward import Forward
from dsft.tasks.labels import Labels
from dsft.tasks.task import Answers, Context, Examples, Outcome, Records, Task, View
from dsft.types import Batch, Dropped, Example

THRESHOLDS = "thresholds"

SHOWN = 100
"""Labels of which a table shows at most which were taken for which."""


@dataclass(kw_only=True)
class Labelled(texts.Texts):
    """A text, or two, with labels.

    Attributes:
        labels: Names of its labels; None where they are to be told.
    """

    labels: tuple[str, ...] | None


def _labelled(names: tuple[str, ...], label: str | None, fields: Fields, origin: str) -> Labelled:
    """The record that a row holds, without labels where no field has them.

    Raises:
        ValueError: A text is missing or empty, or a label is none; the message names the field.
    """
    labels = None if label is None else _labels(fields[label], label)
    return Labelled(**texts.read(names, fields, origin), labels=labels)


def _labels(value: Any, field: str) -> tuple[str, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    found = [naming.name_of(one, f"{field}[{n}]" if value is values else field) for n, one in enumerate(values)]
    if len(set(found)) < len(found):
        raise ValueError(f"field `{field}` has the same label twice")
    return tuple(found)


SHAPES: dict[tuple[str, ...], Callable[[Fields, str], Labelled]] = {
    (*names, label): partial(_labelled, names, label) for label in ("label", "labels") for names in texts.PAIRS
}
ASKED: dict[tuple[str, ...], Callable[[Fields, str], Labelled]] = {
    names: partial(_labelled, names, None) for names in texts.PAIRS
}


def encode(record: Labelled, context: Context) -> list[Example | Dropped] | Dropped:
    """A text's tokens as the tokenizer frames them, and hashes of its labels.

    Raises:
        ValueError: It has other than one label where it is to have one.
        UserError: As `texts.parts`.
    """
    if record.labels is not None and not context.task.multi_label and len(record.labels) != 1:
        raise ValueError(
            f"it has {len(record.labels)} labels: set task.multi_label=true if a record may have several, or none"
        )
    parts = texts.parts(record, context)
    if isinstance(parts, Dropped):
        return parts
    made: list[Example | Dropped] = []
    for part in parts:
        if record.labels is not None:
            part.columns[naming.COLUMN] = naming.keys(record.labels)
        # a record's labels are counted once
        names = record.labels or () if part is parts[0] else ()
        made.append(Example(part.columns, len(part.columns["ids"]), part.weight, truncated=part.cut, labels=names))
    return made


def settle(context: Context, data: Prepared, own: list[str]) -> Context:
    """The context with all labels, and what each counts; `own` are those that the model's head has been trained for.

    Raises:
        UserError: As `labels.collected` and `labels.weights`.
    """
    names = naming.collected(data.labels, context.task.labels, own)
    every = Labels(names)
    train, column = data.train, data.train.entry.columns[naming.COLUMN]
    records = float(train.weights.sum())
    # 0 for what is held out; one that is taken several times counts as often
    weights = np.bincount(train.selection, train.weights, len(train.entry))
    counts = np.bincount(every.numbers(column.data), np.repeat(weights, np.diff(column.offsets)), len(names))
    return replace(context, labels=replace(every, weights=naming.weights(names, counts, records, context.task)))


def head(context: Context) -> Head:
    """The head that a model gets."""
    task = context.task
    return Head(
        labels=context.labels.names,
        problem=MULTI if task.multi_label else SINGLE,
        seed=context.seed,
        init=task.head_init,
        dropout=task.head_dropout,
        pool=task.pool,
        pad_token_id=context.tokenizer.pad_token_id,
    )


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    """Ids, the number of the label or which there are, and what the record counts.

    In training labels count by how they are balanced; an evaluation is the same with and without.
    """
    if naming.COLUMN not in example.columns:
        return texts.inputs(example.columns)
    training = view.epoch >= 0
    balanced = np.array(context.labels.weights if training else np.ones(len(context.labels.names)), np.float32)
    numbers = context.labels.numbers(example.columns[naming.COLUMN])
    made: dict[str, Any] = {**texts.inputs(example.columns)}
    counts = example.weight
    if context.task.multi_label:
        made["document_target"] = np.isin(np.arange(len(balanced)), numbers).astype(np.float32)
        made["document_positive"] = balanced
    else:
        made["document_target"] = numbers[0]
        counts *= float(balanced[numbers[0]])
    return made | {"document_weight": np.float32(counts)}


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    """Summed loss of the batch's records, each times what it counts: cross entropy in nats; of several labels at once
    the mean over labels of binary cross entropies. In training it may be smoothed and focal.
    """
    logits = forward.logits(batch).float()
    if "document_target" not in batch.tensors:
        return Outcome(logits.sum(dtype=torch.float64) * 0, rows={"logits": logits.detach()})
    target, counts = batch.tensors["document_target"], batch.tensors["document_weight"]
    training = forward.model.training
    smoothing = settings.label_smoothing if training else 0.0
    gamma = settings.focal_gamma if training else 0.0
    if settings.multi_label:
        each = _several(logits, target, batch.tensors["document_positive"], smoothing, gamma)
    else:
        each = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        if gamma:
            each = each * (1 - logits.softmax(-1).gather(1, target[:, None])[:, 0]) ** gamma
    rows = {"logits": logits.detach(), "targets": target, "counts": counts}
    return Outcome((each * counts).sum(dtype=torch.float64), rows=rows)


def _several(
    logits: torch.Tensor, target: torch.Tensor, positive: torch.Tensor, smoothing: float, gamma: float
) -> torch.Tensor:
    """Of each record the mean over labels of binary cross entropies; all of shape (records, labels) but the result."""
    smooth = target * (1 - smoothing) + smoothing / 2
    each = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=positive, reduction="none")
    if gamma:
        right = torch.where(target > 0, logits, -logits).sigmoid()
        each = each * (1 - right) ** gamma
    return each.mean(-1)


def judge(rows: dict[str, np.ndarray], context: Context, data: Examples) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of an evaluation, and what is shown beside them: each label's, and which were taken for which."""
    rows = texts.by_record(rows, context, data, context.task.multi_label)
    logits, targets, counts = rows["logits"], rows["targets"], rows["counts"]
    names, about = context.labels.names, dict[str, Any]()
    if context.task.multi_label:
        halves = np.full(len(names), 0.5)
        numbers = classification.multi_label(logits, targets, counts, halves)
        each = classification.per_label(logits, targets, counts, halves)
        tuned = _thresholds(context)
        if context.decision is None:
            tuned = classification.tuned_thresholds(logits, targets, counts)
        if tuned is not None:
            best = classification.multi_label(logits, targets, counts, tuned)
            numbers |= {f"{name}_tuned": best[name] for name in ("f1_micro", "f1_macro") if name in best}
            about = {THRESHOLDS: dict(zip(names, tuned.tolist()))}
    else:
        numbers = classification.single_label(logits, targets, counts)
        each = classification.per_label(logits, targets, counts)
        if len(names) <= SHOWN:
            confusion = classification.confusion(logits.argmax(-1), targets, counts, len(names))
            about = {"confusion": {"labels": list(names), "true_by_predicted": confusion.tolist()}}
    return numbers, {"labels": dict(zip(names, each))} | about


def _thresholds(context: Context) -> np.ndarray | None:
    """How probable each label has to be, shape (labels,), as an earlier evaluation has found; None where none has."""
    kept = (context.decision or {}).get(THRESHOLDS)
    return np.array([kept[name] for name in context.labels.names]) if kept else None


def decision(context: Context, about: Mapping[str, Any]) -> dict[str, Any]:
    """The thresholds of several labels at once, by which F1 of each is best on the validation set."""
    return {THRESHOLDS: about[THRESHOLDS]} if THRESHOLDS in about else {}


def answer(rows: dict[str, np.ndarray], context: Context, data: Examples, records: Records) -> Answers:
    """The likeliest label; where there may be several all that reach their threshold, or are likelier than not; and how
    probable each is."""
    names, several = context.labels.names, context.task.multi_label
    tuned = _thresholds(context) if context.task.thresholds is Thresholds.tuned else None
    least = np.full(len(names), 0.5) if tuned is None else tuned
    rows, numbers = texts.by_record(rows, context, data, several), dict.fromkeys(texts.records(data).tolist())
    logits = torch.from_numpy(rows["logits"]).double()
    for number, each in zip(numbers, (logits.sigmoid() if several else logits.softmax(-1)).tolist()):
        told = [n for n, p, at in zip(names, each, least) if p >= at] if several else names[int(np.argmax(each))]
        yield number, {"prediction": told, "probabilities": dict(zip(names, each))}


METRICS = {
    "loss": Metric("nats per record", "Loss", "{:.4f}", ("loss", "weight"), mean, better="lower"),
    "accuracy": judged(
        "share of records with every label right", "Accuracy", "accuracy", bar="{label} {value}", headline=True
    ),
    "f1_macro": judged("mean over labels", "F1, macro", "f1_macro", headline=True),
    "f1_micro": judged("over all decisions", "F1, micro", "f1_micro"),
    "f1_weighted": judged("mean over labels by their records", "F1, weighted", "f1_weighted"),
    "precision_macro": judged("mean over labels", "Precision, macro", "precision_macro"),
    "recall_macro": judged("mean over labels", "Recall, macro", "recall_macro"),
    "precision_weighted": judged("mean over labels by their records", "Precision, weighted", "precision_weighted"),
    "recall_weighted": judged("mean over labels by their records", "Recall, weighted", "recall_weighted"),
    "balanced_accuracy": judged("mean recall over labels", "Balanced accuracy", "balanced_accuracy"),
    "mcc": judged("-1 to 1", "Matthews correlation", "mcc", "{:.4f}"),
    "roc_auc": judged("0 to 1", "ROC-AUC", "roc_auc", "{:.4f}", meaning="of several labels the mean over them"),
    "average_precision": judged("0 to 1", "Average precision", "average_precision", "{:.4f}"),
    "calibration_error": judged(
        "share", "Calibration error", "calibration_error", better="lower", meaning="expected, of 15 equal bins"
    ),
    "precision_micro": judged("with several labels at once", "Precision, micro", "precision_micro"),
    "recall_micro": judged("with several labels at once", "Recall, micro", "recall_micro"),
    "f1_samples": judged("mean over records, with several labels at once", "F1, samples", "f1_samples"),
    "hamming_loss": judged("share of decisions, with several labels at once", "Hamming loss", "hamming_loss",
                            better="lower"),
    "f1_micro_tuned": judged("with thresholds tuned on the validation set", "F1, micro, tuned", "f1_micro_tuned"),
    "f1_macro_tuned": judged("with thresholds tuned on the validation set", "F1, macro, tuned", "f1_macro_tuned"),
}  # fmt: skip

TASK = Task(
    shapes=SHAPES,
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=SEQUENCE,
    metrics=METRICS,
    target="records",
    encoded=frozenset({"multi_label", "chunk.length", "chunk.stride", "chunk.pool"}),
    settle=settle,
    head=head,
    problems=frozenset({SINGLE, MULTI}),
    judge=judge,
    decision=decision,
    asked=ASKED,
    answer=answer,
    settings=frozenset(
        "data.balance model.allow_missing task.labels task.multi_label task.balance task.effective_beta "
        "task.chunk.length task.chunk.stride task.chunk.pool task.thresholds "
        "task.label_weights task.focal_gamma task.label_smoothing task.head_init task.head_dropout task.pool".split()
    ),
)
