"""The plain values that travel between rooms: a conversation, an example, a batch.

They live below every room that makes or reads them, so that `data`, `tasks` and `engine` can share them
without importing each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100
"""The label of a token that is not supervised (PyTorch's `cross_entropy` default)."""


@dataclass
class Conversation:
    """One record in the one shape that rendering reads.

    Attributes:
        messages: Chat turns, each `{"role": ..., "content": ..., ...}`; empty for plain text.
        text: Plain text to be learnt as a whole, with no chat template; None for a chat.
        tools: Tool definitions handed to the chat template, or None.
        origin: Where the record came from, for messages to people: `file:line`, or `pydoc:textwrap.dedent`.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    origin: str = ""


@dataclass
class Example:
    """One tokenised record.

    Attributes:
        ids: Token ids, int32, shape (tokens,).
        supervised: True where the token is a target, bool, shape (tokens,). Position 0 is never a target: nothing
            comes before it to predict it from.
        truncated: Whether tokens were cut off to fit `data.max_length`.
        number: Which example of its data set it is; noise is drawn by it.
    """

    ids: np.ndarray
    supervised: np.ndarray
    truncated: bool = False
    number: int = 0


@dataclass
class Batch:
    """A flat, padding-free micro-batch: documents laid end to end, never padded.

    Attributes:
        input_ids: int64, shape (1, tokens).
        labels: int64, shape (1, tokens); already shifted, so `labels[0, t]` is the target of the logits at `t`, and
            IGNORE_INDEX where there is none. A document's last position never has a target.
        position_ids: int64, shape (1, tokens); restart at 0 with every document.
        lengths: Tokens of each document in order; on the host, so that no attention has to ask the device for it.
        supervised: How many labels are not IGNORE_INDEX.
        examples: How many examples of the data set the batch holds; 0 for a filler batch.
        numbers: Which example of the data set each document is.
        step: Epoch, and number of the optimizer step in it, that the batch belongs to.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    supervised: int
    examples: int
    numbers: list[int]
    step: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Tokens of real examples (a filler batch has none)."""
        return self.input_ids.shape[1] if self.examples else 0

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        move = {k: getattr(self, k).to(device, non_blocking=True) for k in ("input_ids", "labels", "position_ids")}
        return replace(self, **move)


@dataclass(frozen=True)
class Probe:
    """What a trained model answered, by which a model that is written from it is recognised.

    Attributes:
        ids: Token ids of real text, int64, shape (1, tokens), one document.
        logits: The trained model's in evaluation mode, float32, shape (1, tokens, vocabulary).
    """

    ids: torch.Tensor
    logits: torch.Tensor
