"""A model with the loss of its task, as the one module that the engine trains."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dsft.config.schema import Attention
from dsft.errors import UserError
from dsft.metrics import Tally
from dsft.model.noise import Noise
from dsft.tasks import isolation
from dsft.tasks.forward import Forward
from dsft.tasks.task import Outcome
from dsft.types import Batch


class TaskModule(nn.Module):
    """Takes a batch and gives its summed loss.

    Args:
        model: A transformers model, possibly wrapped by peft.
        loss: The task's (`Task.loss`), with its settings.
        kernel: Which attention kernel flat rows get.
        logits_chunk: Targets whose logits exist at once.
        noise: Draws all of the model's randomness while it trains.
        probe: From `isolation.probe_tokens`.
        padded: The layout of the batches that will come.
        alone: Whether each of them holds a single document, which then needs no check.
        by_document: Whether the model answers once for each document.

    Attributes:
        noise: The same.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Forward, Batch], Outcome],
        kernel: Attention,
        logits_chunk: int,
        noise: Noise,
        probe: torch.Tensor,
        padded: bool = False,
        alone: bool = False,
        by_document: bool = False,
    ):
        super().__init__()
        self.model = model
        # no module, so that the head does not stand twice in the module tree
        self._forward = Forward(model, kernel, noise, logits_chunk, by_document)
        self._loss, self._kernel = loss, kernel
        self.noise = noise
        self._probe = probe
        self._padded, self._alone = padded, alone
        self._checked = False

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model inside its adapters, if there are any."""
        return self._forward.plain

    @property
    def chunked(self) -> bool:
        """Whether logits are computed chunk by chunk, as far as is known before the first batch."""
        return self._forward.head is not None

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Tally]:
        """The summed loss of a batch.

        Returns:
            The loss, a float64 scalar to go backward from, and its Tally: `loss`, `weight` and the task's own; in
            evaluation mode with the task's rows.

        Raises:
            UserError: On the first call: this model's documents would see each other, or its noise would depend on
                the split of the work.
        """
        if not self._checked:
            self._check(batch.tensors["input_ids"].device)
        if self.training:
            self.noise.begin(batch)
        with self.noise.drawing() if self.training else nullcontext():
            loss, sums, rows = self._loss(self._forward, batch)
        kept = {} if self.training else {name: [row] for name, row in rows.items()}
        return loss, Tally({"loss": loss.detach(), "weight": batch.tensors["weight"], **sums}, kept)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits at every position of the layout, row after row, or of every document: `Forward.logits`."""
        return self._forward.logits(batch)

    def _check(self, device: torch.device) -> None:
        """Make sure that documents are kept apart, that the head gets what it gets in the model, and what is drawn."""
        first, _, second = probe = self._probe.to(device)
        pair = isolation.probe_batch(first, second, self._padded)
        forward, training = self._forward, self.training
        with torch.no_grad(), self._first_pass():
            self.eval()
            logits = forward.logits(pair) if self._alone else isolation.check(forward, probe, self._padded)
            forward.learn_head(pair, logits, isolation.same)
            self.train()
            sizes = (pair, isolation.probe_batch(second[:-1], first, self._padded))
            exempt = not self._padded and self._kernel is Attention.flash
            self.noise.rehearse(*(partial(self._rehearse, batch) for batch in sizes), exempt=exempt)
            self.train(training)
        self._checked = True

    def _rehearse(self, batch: Batch) -> None:
        self.noise.begin(batch)
        self._forward.logits(batch)

    @contextmanager
    def _first_pass(self) -> Iterator[None]:
        """Inside, what the code of the model or of its adapters cannot do is a UserError that says what to try."""
        try:
            yield
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # whatever it comes up with
            place = traceback.extract_tb(problem.__traceback__)[-1]
            advice = "Use another model, or another version of transformers."
            if hasattr(self.model, "peft_config"):
                advice = (
                    "It may not bear adapters on all the layers that tuning.target_modules names: name linear layers "
                    "of the attention, such as tuning.target_modules=[q_proj,k_proj,v_proj,o_proj], or use tuning=full."
                )
            raise UserError(
                f"{type(self._forward.plain).__name__} fails in its first forward pass: {type(problem).__name__}: "
                f"{problem} ({Path(place.filename).name}:{place.lineno}). {advice}"
            ) from problem
