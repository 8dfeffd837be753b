"""Causal language modelling: the loss of the supervised tokens."""

from __future__ import annotations

import torch
from torch import nn

from dsft.errors import UserError
from dsft.metrics import Tally
from dsft.tasks.nll import nll_of_logits, plain_head
from dsft.types import IGNORE_INDEX, Batch

PROBE = 8
"""Tokens of each of the two documents by which a model shows that it keeps documents apart."""


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
            UserError: On the first call: this model's documents would see each other.
        """
        if not self._checked:
            self._check(batch.input_ids.device)
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
        hidden = _plain(self.model).base_model(**inputs).last_hidden_state[0]
        return head(hidden[at], targets, self._chunk)

    @torch.no_grad()
    def _check(self, device: torch.device) -> None:
        """Compare two documents in one row with the same two alone, under transformers' own attention.

        Not every model can keep documents apart: some do not hand the boundaries down, some count positions by
        themselves, and recurrent or convolutional layers run on across the boundary.
        """
        training = self.training
        self.eval()
        ids = torch.arange(2 * PROBE, device=device) % self.model.config.get_text_config().vocab_size
        positions = torch.arange(PROBE, device=device).repeat(2)
        documents = self._documents([PROBE, PROBE], device)
        row = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, documents=documents)
        pair = ids.view(2, PROBE)
        alone = self.model(input_ids=pair, attention_mask=torch.ones_like(pair), use_cache=False)
        self.train(training)
        expected = alone.logits.flatten(0, 1).float()
        deviation = float((row.logits[0].float() - expected).norm() / expected.norm())
        # rounding stays well below the root of the type's precision, and a leak far above
        if not deviation < torch.finfo(alone.logits.dtype).eps ** 0.5:
            raise UserError(
                f"{type(_plain(self.model)).__name__} does not keep the documents of a row apart: its answers in a row "
                f"and alone deviate by {deviation:.1e} (relative). Use another model."
            )
        self._checked = True


def _plain(model):
    """The transformers model inside its adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _inputs(batch: Batch, documents) -> dict:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "documents": documents,
    }
