"""Causal language modelling: the loss of the supervised tokens."""

from __future__ import annotations

import torch
from torch import nn

from dsft.errors import UserError
from dsft.metrics import Tally
from dsft.tasks.nll import nll_of_logits, plain_head
from dsft.types import IGNORE_INDEX, Batch


class CausalLM(nn.Module):
    """A model with its loss, as the one module that the engine trains.

    Args:
        model: A transformers causal language model, possibly wrapped by peft, that attends with `dsft`'s attention.
        documents: Makes the attention's description of a row from its document lengths.
        logits_chunk: Supervised tokens whose logits exist at once.
        neftune: Embedding noise that wants to know each row's document lengths, or None.
    """

    def __init__(self, model, documents, logits_chunk: int, neftune=None):
        super().__init__()
        self.model = model
        # kept out of the module tree, where the head would stand twice
        self._head = [plain_head(model)]
        self._documents = documents
        self._chunk = logits_chunk
        self._neftune = neftune
        self._checked = False

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Tally]:
        """The summed loss of a batch.

        Returns:
            The summed negative log-likelihood in nats, a float64 scalar to go backward from, and its Tally with
            `nll`, `correct` and `supervised`.

        Raises:
            UserError: The model's code does not pass the document boundaries on to its attention.
        """
        documents = self._documents(batch.lengths, batch.input_ids.device)
        if self._neftune is not None:
            self._neftune.lengths = batch.lengths
        at = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        # a batch without targets still goes all the way, so that ranks under ZeRO stay in step: one position that
        # then counts for nothing
        weight = 1.0 if batch.supervised else 0.0
        at = at if batch.supervised else torch.zeros(1, dtype=torch.int64, device=at.device)
        targets = batch.labels[0, at].clamp(min=0)
        nll, correct = self._nll(batch, documents, at, targets)
        self._check(documents)
        loss = nll * weight
        count = torch.tensor(float(batch.supervised), dtype=torch.float64, device=loss.device)
        return loss, Tally({"nll": loss.detach(), "correct": correct * weight, "supervised": count})

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits at every position, shape (tokens, vocabulary)."""
        documents = self._documents(batch.lengths, batch.input_ids.device)
        return self.model(**_inputs(batch, documents)).logits[0]

    def _nll(self, batch, documents, at, targets):
        inputs = _inputs(batch, documents)
        head = self._head[0]
        if head is None:
            return nll_of_logits(self.model(**inputs, logits_to_keep=at).logits[0], targets)
        causal = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        hidden = causal.base_model(**inputs).last_hidden_state[0]
        return head(hidden[at], targets, self._chunk)

    def _check(self, documents) -> None:
        if not self._checked and documents.visits == 0:
            raise UserError(
                f"{type(self.model).__name__} does not hand document boundaries down to its attention, so documents "
                "in a row would see each other. Use another model, or batch.micro_batch_size=1 with data.packing=none."
            )
        self._checked = True


def _inputs(batch: Batch, documents) -> dict:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "documents": documents,
    }
