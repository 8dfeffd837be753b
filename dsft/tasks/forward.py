"""A model's forward pass over a batch of either layout: what a task's loss is made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dsft.config.schema import Attention
from dsft.model.attention import Documents
from dsft.model.layout import first_position
from dsft.model.noise import Noise
from dsft.tasks.nll import Asked, Nll, nll_of_logits, plain_head
from dsft.types import Batch


class Forward:
    """Runs a model over batches.

    Args:
        model: A transformers model with an output head over the vocabulary, possibly wrapped by peft.
        kernel: Which attention kernel flat rows get.
        noise: Draws dropout of attention weights.
        logits_chunk: Targets whose logits exist at once, where the head allows it.

    Attributes:
        model: The same.
        head: Its output head, if logits are only its linear map of what it is given, else None.
    """

    def __init__(self, model: PreTrainedModel, kernel: Attention, noise: Noise, logits_chunk: int):
        self.model = model
        self.head = plain_head(model)
        self._bare = True  # the head is given the base model's output, with nothing between them
        self._kernel, self._noise = kernel, noise
        self._first = first_position(model)
        self._chunk = logits_chunk

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model inside its adapters, if there are any."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's keyword arguments for a batch."""
        own = {"input_ids": batch.tensors["input_ids"], "use_cache": False}
        if batch.padded:
            return own | {"attention_mask": batch.tensors["attention_mask"]}
        documents = Documents(batch.lengths, batch.tensors["documents"], self._kernel, self._noise)
        return own | {"position_ids": batch.tensors["position_ids"] + self._first, "documents": documents}

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What the head is given at every position of the layout, row after row: (positions, hidden size)."""
        return self.plain.base_model(**self.inputs(batch)).last_hidden_state.flatten(0, 1)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits at every position of the layout, row after row: (positions, vocabulary)."""
        return self.model(**self.inputs(batch)).logits.flatten(0, 1)

    def target_logits(self, batch: Batch) -> torch.Tensor:
        """Logits where the batch has targets: (targets, vocabulary)."""
        at = batch.tensors["target_at"]
        if batch.padded:
            return self.logits(batch)[at]
        return self.model(**self.inputs(batch), logits_to_keep=at).logits[0]

    def nll(self, batch: Batch) -> Nll:
        """Negative log-likelihood of the batch's targets, in chunks where the head allows it."""
        targets = batch.tensors["target_ids"]
        shares = None if batch.even else batch.tensors.get("target_weights")
        if self.head is None:
            return nll_of_logits(self.target_logits(batch), targets, shares)
        if self._bare:
            return self.head(self.hidden(batch)[batch.tensors["target_at"]], targets, shares, self._chunk)
        self.head.asked = asked = Asked(batch.tensors["target_at"], targets, shares, self._chunk)
        self.model(**self.inputs(batch))
        assert asked.found is not None, "the first pass has shown that the model calls its head"
        return asked.found

    def learn_head(
        self, batch: Batch, logits: torch.Tensor, same: Callable[[torch.Tensor, torch.Tensor], bool]
    ) -> None:
        """Find out what the head is given, and whether its output is the model's.

        Args:
            batch: Any.
            logits: The model's for it, from `logits`.
            same: Whether two such are the same but for rounding.
        """
        if self.head is None:
            return
        hidden = self.hidden(batch)
        self._bare = hidden.shape[-1] == self.head.in_features and same(self.head(hidden), logits)
        if self._bare:
            return
        outputs: list[torch.Tensor] = []
        hook = self.head.register_forward_hook(lambda *called: outputs.append(called[2].clone()))
        self.model(**self.inputs(batch))
        hook.remove()
        if len(outputs) != 1 or not same(outputs[0].flatten(0, -2), logits):
            self.head = None
