"""A whole task in one file: is a statement true? A causal language model is asked at the statement's last token."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch.nn import functional as F

from dsft.config.schema import TaskConfig
from dsft.data.sources import Fields
from dsft.metrics import Metric
from dsft.model.kind import CAUSAL
from dsft.tasks.forward import Forward
from dsft.tasks.task import Context, Outcome, Task, View, text_of
from dsft.types import IGNORE_INDEX, Batch, Dropped, Example, Record

ANSWERS = slice(3, 5)
"""Ids of the tokens whose logits stand for false and true."""


@dataclass(kw_only=True)
class Statement(Record):
    text: str
    true: bool

    def texts(self) -> dict[str, str]:
        return {"text": self.text}

    def with_texts(self, texts: Mapping[str, str]) -> Statement:
        return replace(self, text=texts["text"])


def statement(fields: Fields, origin: str) -> Statement:
    if not isinstance(fields["true"], bool):
        raise ValueError(f"field `true` is true or false, but this is {fields['true']!r}")
    return Statement(text=text_of(fields["text"], "text", empty=False), true=fields["true"], origin=origin)


def encode(record: Statement, context: Context) -> list[Example] | Dropped:
    ids = np.asarray(context.tokenizer(record.text)["input_ids"], np.int32)
    if len(ids) > context.data.max_length:
        return Dropped("longer than data.max_length")
    return [Example({"ids": ids, "true": np.array([record.true])}, tokens=len(ids), weight=1.0)]


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    ids = example.ids.astype(np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[-1] = example.columns["true"][0]
    return {"input_ids": ids, "labels": labels, "target_weights": np.ones(len(ids), np.float32)}


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    logits, targets = forward.target_logits(batch)[:, ANSWERS].float(), batch.tensors["target_ids"]
    counted = batch.tensors["target_weights"].double()  # 0 where a batch has no statement at all
    losses = F.cross_entropy(logits, targets, reduction="none").double()
    return Outcome((losses * counted).sum(), {"right": ((logits.argmax(-1) == targets) * counted).sum()})


TASK = Task(
    shapes={("text", "true"): statement},
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=CAUSAL,
    metrics={
        "loss": Metric("nats per label", "Loss", "{:.4f}", ("loss", "weight"), operator.truediv, better="lower"),
        "accuracy": Metric("share", "Accuracy", "{:.1%}", ("right", "weight"), operator.truediv, better="higher"),
    },
    target="labels",
)
