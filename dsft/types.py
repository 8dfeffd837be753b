"""The plain values that travel between rooms: a record, an example, a batch.

They live below every room that makes or reads them, so that `data`, `tasks` and `engine` can share them
without importing each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100
"""The label of a token that is not supervised (PyTorch's `cross_entropy` default)."""

HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
"""A Chinese character, as a regular expression."""


@dataclass(kw_only=True)
class Record:
    """One record as its task reads it. Steps that clean or augment text use these methods, and know no task.

    Attributes:
        origin: Where it came from, for messages to people: `file:line`, or `pydoc:textwrap.dedent`.
        weight: What it counts in loss, gradient and evaluation; 0 or more, finite.
        metadata: Those of its fields that say nothing to the task.
        notes: What the audit counts records by, such as a field that was set aside.
        said: What it says itself, where a prompt or examples that others might have too were added; else empty.
    """

    origin: str = ""
    weight: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    said: tuple[str, ...] = ()

    def texts(self) -> dict[str, str]:
        """Its texts that people wrote, by a name for each that stays the same."""
        raise NotImplementedError

    def protected_spans(self) -> dict[str, list[tuple[int, int]]]:
        """Characters (begin, end) of these texts that must stay as they are, such as those that a label is about."""
        return {}

    def with_texts(self, texts: Mapping[str, str]) -> Record:
        """The same record with other texts, by the names of `texts()`."""
        raise NotImplementedError

    def with_examples(self, examples: Sequence[Any]) -> Record:
        """The same record behind others of its kind, which are read and not learnt.

        Raises:
            ValueError: Such a record has nothing before it, or one of the others cannot stand there.
        """
        raise ValueError("a record of this kind takes no few-shot examples (data.few_shot.path)")


@dataclass
class Example:
    """What a task made of a record, or of a part of one.

    Attributes:
        columns: Name -> array, kept in the cache as they are. `ids` are its token ids, int32, shape (tokens,); further
            ones are the task's own, such as `supervised`, bool, shape (tokens,).
        tokens: Tokens that it takes in a row.
        weight: What it adds to the number that the loss of a global step is divided by: its supervised tokens, or 1
            for a label. It is known from the cache, so that no rank has to ask another.
        record: Which record of its data set it was made of.
        truncated: Whether tokens were cut off to fit `data.max_length`.
        number: Which example of its data set it is; noise is drawn by it.
        content: A hash of what its record says; equal for records that say the same.
        group: A hash of its record's group, 0 for none: records of a group are held out together or not at all.
        stratum: A hash of its record's stratum: each is held out by the same share.
        labels: Names of the labels that it brings; all of a data set's are collected (`Entry.report`).
    """

    columns: dict[str, np.ndarray]
    tokens: int
    weight: float
    record: int = 0
    truncated: bool = False
    number: int = 0
    content: int = 0
    group: int = 0
    stratum: int = 0
    labels: tuple[str, ...] = ()

    @property
    def ids(self) -> np.ndarray:
        """Its token ids, int32, shape (tokens,)."""
        return self.columns["ids"]


@dataclass(frozen=True)
class Dropped:
    """A record, or a part of one, that makes no example.

    Attributes:
        reason: Why; it is counted by it.
        verdict: What to say of a data set that no example is left of; `{records}` (how many were read) and `{why}`
            (counts of all reasons) are filled in.
    """

    reason: str
    verdict: str = ""


@dataclass
class Batch:
    """A micro-batch as the device gets it, in one of two layouts.

    Flat: documents end to end in one row, tensors of shape (1, tokens), nothing padded. Padded: a document a row,
    tensors of shape (documents, width), filled up on the right, `attention_mask` among them.

    Attributes:
        tensors: Name -> tensor. `input_ids` int64; `position_ids` int64, flat only, restarting with every document;
            further ones are the task's own. Whatever has to be known before the device can work is found out on the
            host and lies here, so that nothing has to ask the device.
        lengths: Tokens of each document, in order.
        weight: Sum of its examples' weights.
        examples: How many examples of the data set it holds; 0 for a filler batch.
        numbers: Which example of the data set each document is.
        step: Epoch, and number of the optimizer step in it, that the batch belongs to.
        padded: Whether its layout is the padded one.
        even: Whether every target counts 1, so that losses need not be multiplied.
    """

    tensors: dict[str, torch.Tensor]
    lengths: list[int]
    weight: float
    examples: int
    numbers: list[int]
    step: tuple[int, int] = (0, 0)
    padded: bool = False
    even: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of real examples (a filler batch has none)."""
        return sum(self.lengths) if self.examples else 0

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(self, tensors={k: t.to(device, non_blocking=True) for k, t in self.tensors.items()})


@dataclass(frozen=True)
class Probe:
    """What a trained model answered, by which a model that is written from it is recognised.

    Attributes:
        ids: Token ids of real text, int64, shape (1, tokens), one document.
        logits: The trained model's in evaluation mode, float32, shape (1, tokens, vocabulary).
    """

    ids: torch.Tensor
    logits: torch.Tensor
