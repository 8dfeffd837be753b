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

    @property
    def chunked(self) -> bool:
        """Whether logits are computed chunk by chunk, as far as is known before the first batch."""
        return self._head[0] is not None

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
        if self._neftune is not None:
            self._neftune.lengths = batch.lengths
        at = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        # a batch without targets still goes all the way, so that ranks under ZeRO stay in step: one position that
        # then counts for nothing
        weight = 1.0 if batch.supervised else 0.0
        at = at if batch.supervised else torch.zeros(1, dtype=torch.int64, device=at.device)
        targets = batch.labels[0, at].clamp(min=0)
        nll, correct = self._nll(batch, at, targets)
        loss = nll * weight
        count = torch.tensor(float(batch.supervised), dtype=torch.float64, device=loss.device)
        return loss, Tally({"nll": loss.detach(), "correct": correct * weight, "supervised": count})

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits at every position, shape (tokens, vocabulary)."""
        return self.model(**self._row(batch)).logits[0]

    def _nll(self, batch, at, targets):
        inputs = self._row(batch)
        head = self._head[0]
        if head is None:
            return nll_of_logits(self.model(**inputs, logits_to_keep=at).logits[0], targets)
        return head(self._hidden(inputs)[at], targets, self._chunk)

    def _row(self, batch: Batch) -> dict:
        documents = self._documents(batch.lengths, batch.input_ids.device)
        return _inputs(batch.input_ids, batch.position_ids, documents)

    def _hidden(self, inputs: dict) -> torch.Tensor:
        """What the head is given at every position, shape (tokens, hidden size)."""
        return _plain(self.model).base_model(**inputs).last_hidden_state[0]

    def _check(self, device: torch.device) -> None:
        """Make sure that documents get the same logits in a row as alone, and the head what it gets in the model.

        Not every model can keep documents apart: some do not hand the boundaries down, some count positions by
        themselves, and recurrent or convolutional layers run on across the boundary.
        """
        training = self.training
        self.eval()
        ids = torch.arange(2 * PROBE, device=device) % self.model.config.get_text_config().vocab_size
        positions = torch.arange(PROBE, device=device).repeat(2)
        row = _inputs(ids[None], positions[None], self._documents([PROBE, PROBE], device))
        pair = ids.view(2, PROBE)
        with torch.no_grad():
            logits = self.model(**row).logits[0]
            # transformers' own attention, with positions of its own
            alone = self.model(input_ids=pair, attention_mask=torch.ones_like(pair), use_cache=False).logits
            of_head = self._head[0](self._hidden(row)) if self._head[0] is not None else logits
        self.train(training)
        if _differ(logits, alone.flatten(0, 1)):
            raise UserError(
                f"{type(_plain(self.model)).__name__} does not keep the documents of a row apart: its logits are not "
                "the same in a row as alone. Use another model."
            )
        if _differ(of_head, logits):
            self._head = [None]
        self._checked = True


def _differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether more than rounding lies between them: it stays well below the root of the type's precision."""
    found, expected, limit = found.float(), expected.float(), torch.finfo(expected.dtype).eps ** 0.5
    return not (found - expected).norm() < limit * expected.norm()


def _plain(model):
    """The transformers model inside its adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _inputs(ids: torch.Tensor, positions: torch.Tensor, documents) -> dict:
    return {"input_ids": ids, "position_ids": positions, "use_cache": False, "documents": documents}
