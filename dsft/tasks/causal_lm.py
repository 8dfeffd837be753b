"""Causal language modelling: the loss of the supervised tokens."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from dsft.config.schema import Attention
from dsft.errors import UserError
from dsft.metrics import Tally
from dsft.tasks.nll import nll_of_logits, plain_head
from dsft.types import IGNORE_INDEX, Batch, Example

PROBE = 11
"""Tokens of each of the documents by which a model shows that it keeps documents apart. Two of them are as many as no
model has heads, experts or features, so that no other dimension is taken for that of tokens."""

UNCHANGED = 1e-6
"""Relative change of a position's logits that can be rounding where nothing but another document changed."""

MASKED = 3e4
"""Logits beyond are no answers: some models so mask what is no token, with infinity or the least number of fp16."""


def probe_tokens(examples: Iterable[Example]) -> torch.Tensor:
    """Three documents of real tokens for the check of a model: the first, one that takes its place, and the second.

    Tokens of real records, since a model's answers to special tokens in a row are ill-conditioned.

    Returns:
        int64, shape (3, PROBE); the first two rows differ at every position where the data allows it.
    """
    found: list[int] = []
    for example in examples:
        found += example.ids.tolist()
        if len(found) >= 3 * PROBE:
            break
    tokens = torch.tensor(found).repeat(-(-3 * PROBE // len(found)))[: 3 * PROBE].view(3, PROBE)
    different = next((t for t in found if t != found[0]), abs(found[0] - 1))
    same = tokens[0] == tokens[1]
    tokens[1] = torch.where(same, torch.where(tokens[0] == different, found[0], different), tokens[1])
    return tokens


class CausalLM(nn.Module):
    """A model with its loss, as the one module that the engine trains.

    Args:
        model: A transformers causal language model, possibly wrapped by peft, that attends with `dsft`'s attention.
        documents: Makes the attention's description of a row from its document lengths.
        logits_chunk: Supervised tokens whose logits exist at once.
        noise: `model.noise.Noise`: draws all of the model's randomness while it trains.
        probe: From `probe_tokens`.

    Attributes:
        noise: The same.
    """

    def __init__(self, model, documents, logits_chunk: int, noise, probe: torch.Tensor):
        super().__init__()
        self.model = model
        # kept out of the module tree, where the head would stand twice
        self._head = [plain_head(model)]
        self._documents = documents
        self._chunk = logits_chunk
        self.noise = noise
        self._probe = probe
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
            UserError: On the first call: this model's documents would see each other, or its noise would depend on
                the split of the work.
        """
        if not self._checked:
            self._check(batch.tensors["input_ids"].device)
        if self.training:
            self.noise.begin(batch.step, batch.lengths, batch.numbers, batch.tensors["input_ids"].device)
        at = (batch.tensors["labels"][0] != IGNORE_INDEX).nonzero()[:, 0]
        # a batch without targets still goes all the way, so that ranks under ZeRO stay in step: one position that
        # then counts for nothing
        weight = 1.0 if batch.weight else 0.0
        at = at if batch.weight else torch.zeros(1, dtype=torch.int64, device=at.device)
        targets = batch.tensors["labels"][0, at].clamp(min=0)
        with self.noise.drawing() if self.training else nullcontext():
            nll, correct = self._nll(batch, at, targets)
        loss = nll * weight
        count = torch.tensor(float(batch.weight), dtype=torch.float64, device=loss.device)
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
        documents = self._documents(batch.lengths, batch.tensors["input_ids"].device)
        return _inputs(batch.tensors["input_ids"], batch.tensors["position_ids"], documents)

    def _hidden(self, inputs: dict) -> torch.Tensor:
        """What the head is given at every position, shape (tokens, hidden size)."""
        return _plain(self.model).base_model(**inputs).last_hidden_state[0]

    def _check(self, device: torch.device) -> None:
        """Make sure that documents are kept apart, that the head gets what it gets in the model, and what is drawn."""
        first, other, second = self._probe.to(device)
        lengths = [PROBE, PROBE]
        positions = torch.arange(PROBE, device=device).repeat(2)

        def row(begin: torch.Tensor) -> dict:
            documents = self._documents(lengths, device)
            return _inputs(torch.cat([begin, second])[None], positions[None], documents)

        training = self.training
        with torch.no_grad(), self._first_pass():
            self.eval()
            logits = self._check_isolation(row, first, other, second)
            head = self._head[0]
            if head is not None and _change(head(self._hidden(row(first))), logits).max() > UNCHANGED:
                self._head = [None]
            self.train()
            self.noise.begin((0, 0), lengths, [0, 1], device)
            documents = row(first)["documents"]
            self.noise.rehearse(lambda: self.model(**row(first)), exempt=documents.kernel is Attention.flash)
            self.train(training)
        self._checked = True

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
                f"{type(_plain(self.model)).__name__} fails in its first forward pass: {type(problem).__name__}: "
                f"{problem} ({Path(place.filename).name}:{place.lineno}). {advice}"
            ) from problem

    def _check_isolation(self, row, first, other, second) -> torch.Tensor:
        """Make sure that a document gets the same logits behind any other, and alone.

        Not every model can keep documents apart: some do not hand the boundaries down, some count positions by
        themselves, and recurrent or convolutional layers run on across the boundary. A leak shows where another first
        document changes the second one's logits, which should not move at all: the shapes are the same. How much they
        may move all the same (experts get other numbers of tokens) is measured by transformers' own attention over
        two rows, which cannot leak.

        Returns:
            The logits of the first row, (2 * PROBE, vocabulary).
        """

        def alone(begin: torch.Tensor) -> torch.Tensor:
            pair = torch.stack([begin, second])
            return self.model(input_ids=pair, attention_mask=torch.ones_like(pair), use_cache=False).logits[1]

        logits = self.model(**row(first)).logits[0]
        if logits.isnan().any() or logits.isposinf().any():
            half = next(self.parameters()).dtype is torch.float16
            raise UserError(
                f"{type(_plain(self.model)).__name__} gives logits that are not finite before any training: "
                + ("use precision=bf16 or precision=fp32." if half else "the weights in model.path are damaged.")
            )
        moved = _change(self.model(**row(other)).logits[0, PROBE:], logits[PROBE:])
        expected = alone(first)
        rounding = _change(alone(other), expected)
        # the median, since the logits of single tokens may be ill-conditioned
        differs = _change(logits[PROBE:], expected).median()
        if not (moved.max() <= 10 * rounding.max() + UNCHANGED and differs < torch.finfo(logits.dtype).eps ** 0.5):
            raise UserError(
                f"{type(_plain(self.model)).__name__} does not keep the documents of a row apart: its logits are not "
                "the same in a row as alone. Use another model."
            )
        return logits


def _change(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far each position's logits are from others, relative to their 2-norm; float64, shape (positions,)."""
    found, expected = found.double(), expected.double()
    size = expected.where(expected.abs() < MASKED, 0).norm(dim=-1)
    return (found - expected).where(found != expected, 0).norm(dim=-1) / size.clamp(min=1e-30)


def _plain(model):
    """The transformers model inside its adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _inputs(ids: torch.Tensor, positions: torch.Tensor, documents) -> dict:
    return {"input_ids": ids, "position_ids": positions, "use_cache": False, "documents": documents}
