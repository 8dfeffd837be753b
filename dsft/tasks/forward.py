"""A model's forward pass over a batch of either layout: what a task's loss is made from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dsft.config.schema import Attention
from dsft.model.attention import Documents
from dsft.model.head import POOLING
from dsft.model.kind import is_two_sided, logits_of
from dsft.model.layout import first_position
from dsft.model.noise import Noise
from dsft.tasks.nll import Asked, Nll, nll_of_logits, plain_head
from dsft.types import Batch


class Forward:
    """Runs a model over batches.

    Args:
        model: A transformers model with a head, possibly wrapped by peft.
        kernel: Which attention kernel flat rows get.
        noise: Draws dropout of attention weights.
        logits_chunk: Targets whose logits exist at once, where the head allows it.
        by_document: Whether the model answers once for each document.

    Attributes:
        model: The same.
        head: Its output head, if logits are only its linear map of what it is given, else None.
    """

    def __init__(
        self, model: PreTrainedModel, kernel: Attention, noise: Noise, logits_chunk: int, by_document: bool = False
    ):
        self.model = model
        self.by_document = by_document
        self._two_sided = is_two_sided(self.plain.config)
        types = getattr(self.plain.config, "type_vocab_size", None) or 0
        self._keeps = "logits_to_keep" in inspect.signature(self.plain.forward).parameters
        self._typed = types > 1 and "token_type_ids" in inspect.signature(self.plain.forward).parameters
        self._documents: Documents | None = None
        if by_document:
            self.plain.base_model.register_forward_hook(self._one_row_each)
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
        if self._two_sided:
            labels = batch.tensors.get("decoder_labels")
            # a batch without targets is read on both sides
            own["decoder_input_ids"] = own["input_ids"] if labels is None else decoder_ids(self.plain, labels)
        if self._typed and "token_type_ids" in batch.tensors:
            own["token_type_ids"] = batch.tensors["token_type_ids"]
        if batch.padded:
            return own | {"attention_mask": batch.tensors["attention_mask"]}
        documents = Documents(batch.lengths, batch.tensors["documents"], self._kernel, self._noise)
        return own | {"position_ids": batch.tensors["position_ids"] + self._first, "documents": documents}

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What the head is given at every position of the layout, row after row: (positions, hidden size)."""
        return self.plain.base_model(**self.inputs(batch)).last_hidden_state.flatten(0, 1)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits at every position of the layout, row after row: (positions, vocabulary); or of every document:
        (documents, labels)."""
        if self.by_document:
            return self._document_logits(batch)
        return logits_of(self.model(**self.inputs(batch))).flatten(0, 1)

    def _document_logits(self, batch: Batch) -> torch.Tensor:
        inputs = self.inputs(batch)
        if hasattr(self.plain, "score"):
            # the head of decoders, a linear map of the last token; transformers looks for that by the padding's id
            ends = batch.tensors["lengths"].cumsum(0) - 1
            if batch.padded:
                ends = torch.arange(len(ends), device=ends.device) * inputs["input_ids"].shape[1]
                ends = ends + batch.tensors["lengths"] - 1
            return self.plain.score(self.plain.base_model(**inputs).last_hidden_state.flatten(0, 1)[ends])
        self._documents = inputs.get("documents")
        try:
            return self.model(**inputs).logits
        finally:
            self._documents = None

    def _one_row_each(self, module: Any, args: tuple, output: Any) -> Any:
        """Forward hook of an encoder: of a flat row the head is given a row for each document, of one token: the first,
        or the mean of all. What comes after sees what it sees in padded rows."""
        if self._documents is None:
            return None
        hidden, begins = output.last_hidden_state[0], self._documents.cu_seqlens[:-1].long()
        if getattr(self.plain.config, POOLING, None) == "mean":
            lengths = self._documents.cu_seqlens.diff().long()
            owner = torch.repeat_interleave(lengths, output_size=len(hidden))
            sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
            rows = (sums.index_add(0, owner, hidden.float()) / lengths[:, None]).to(hidden.dtype)
        else:
            rows = hidden[begins]
        output.last_hidden_state = rows = rows.unsqueeze(1)
        if output.get("pooler_output") is not None:
            output.pooler_output = module.pooler(rows)
        return output

    def target_logits(self, batch: Batch) -> torch.Tensor:
        """Logits where the batch has targets: (targets, vocabulary)."""
        at = batch.tensors["target_at"]
        if batch.padded or not self._keeps:
            return self.logits(batch)[at]
        return self.model(**self.inputs(batch), logits_to_keep=at).logits[0]

    def nll(self, batch: Batch, smoothing: float = 0.0) -> Nll:
        """Negative log-likelihood of the batch's targets, in chunks where the head allows it; a share `smoothing` of
        each is spread over the vocabulary."""
        targets = batch.tensors["target_ids"]
        shares = None if batch.even else batch.tensors.get("target_weights")
        if self.head is None:
            return nll_of_logits(self.target_logits(batch), targets, shares, smoothing)
        if self._bare:
            return self.head(self.hidden(batch)[batch.tensors["target_at"]], targets, shares, self._chunk, smoothing)
        self.head.asked = asked = Asked(batch.tensors["target_at"], targets, shares, self._chunk, smoothing)
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
        if self.plain.base_model is not self.plain:
            hidden = self.hidden(batch)
            self._bare = hidden.shape[-1] == self.head.in_features and same(self.head(hidden), logits)
        else:
            self._bare = False  # as T5, which has no model without its head
        if self._bare:
            return
        outputs: list[torch.Tensor] = []
        hook = self.head.register_forward_hook(lambda *called: outputs.append(called[2].clone()))
        self.model(**self.inputs(batch))
        hook.remove()
        if len(outputs) != 1 or not same(outputs[0].flatten(0, -2), logits):
            self.head = None


def decoder_ids(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """What an encoder-decoder's decoder reads to write `labels`, (documents, tokens): these behind the token that the
    model begins with, as the model itself forms it from labels."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    first = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    return torch.cat([first, labels[:, :-1]], dim=1)
