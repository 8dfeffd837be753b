"""The output head and its loss, without ever holding the logits of a whole batch.

A vocabulary of 150,000 makes logits the largest tensor of a fine-tuning step. Only supervised positions need any, and
they are taken in chunks: each chunk's logits live just long enough to give its loss and its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from dsft.metrics import Metric, mean
from dsft.model.kind import is_two_sided

LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""Config keys by which some models bend their logits after the head (Gemma 2, Cohere, Granite), and the value that
means "not at all"."""


class Nll(NamedTuple):
    """Negative log-likelihood of targets.

    Attributes:
        total: Sum over all of them, in nats, each times what it counts; a float64 scalar to go backward from.
        correct: How many are the first guess, counted in the same way; float64 scalar, detached.
        each: Of each target, in nats, float32, shape (targets,), detached.
    """

    total: torch.Tensor
    correct: torch.Tensor
    each: torch.Tensor


class _Gradients:
    """Gradients of a linear head's inputs, added up from those of its logits, chunk by chunk.

    Args:
        wants_hidden: Whether `hidden` needs one; likewise the next three.
        hidden: What the head is given, (targets, hidden size).
        weight: (vocabulary, hidden size).
        bias: (vocabulary,), or None.
        own: Rows that take the place of `at` in `weight`, or None.
        at: A slice.
    """

    def __init__(
        self,
        wants_hidden: bool,
        wants_weight: bool,
        wants_bias: bool,
        wants_own: bool,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        own: Any,
        at: Any,
    ) -> None:
        self._hidden, self._weight, self._own, self._at = hidden, weight, own, at
        self._of_hidden = torch.empty_like(hidden) if wants_hidden else None
        # fp32, since a bf16 sum over many chunks would lose what the small ones add
        self._of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        self._of_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        self._of_own = torch.zeros_like(own, dtype=torch.float32) if wants_own else None

    @property
    def made(self) -> tuple[torch.Tensor | None, ...]:
        """Of `hidden`, `weight`, `bias` and `own`; None for those that need none."""
        return self._of_hidden, self._of_weight, self._of_bias, self._of_own

    def add(self, rows: slice, grad: torch.Tensor) -> None:
        """Add what comes from the logits of these rows, float32, shape (rows, vocabulary)."""
        own, at = self._own, self._at
        if self._of_bias is not None:
            self._of_bias += grad.sum(0)
        grad = grad.to(self._hidden.dtype)
        if own is not None:
            of_own, grad[:, at] = grad[:, at].clone(), 0
        if self._of_hidden is not None:
            torch.mm(grad, self._weight, out=self._of_hidden[rows])
            if own is not None:
                self._of_hidden[rows] += of_own @ own
        if self._of_own is not None:
            self._of_own += of_own.T @ self._hidden[rows]
        if self._of_weight is not None:
            self._of_weight += grad.T @ self._hidden[rows]


def _of_logits(
    logits: torch.Tensor, log_sum: torch.Tensor, target: torch.Tensor, share: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """The gradient of logits, (targets, vocabulary), in their place; the others have shape (targets, 1)."""
    grad = logits.sub_(log_sum).exp_()
    if smoothing:
        grad -= smoothing / grad.shape[1]
    grad.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=grad.dtype))
    return grad if share is None else grad.mul_(share)


class _ChunkedNll(torch.autograd.Function):
    """Summed negative log-likelihood of a linear head; the gradient is formed in the forward pass, chunk by chunk.

    Forming it there means that no logits are kept or computed twice. The loss is a plain sum, so whatever scale
    comes later (1 / tokens, ranks, the fp16 loss scale) is one factor in `backward`.

    `own`, where it is given, takes the place of the rows `at` (a slice) of `weight`; `shares`, where given, are what
    each target counts. `smoothing` is the share of each target that is spread evenly over the vocabulary
    (arXiv:1512.00567).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        own: torch.Tensor | None,
        at: Any,
        targets: torch.Tensor,
        shares: torch.Tensor | None,
        chunk: int,
        smoothing: float,
        training: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # what needs a gradient is told even where none will be asked for
        wants_hidden, wants_weight, wants_bias, wants_own = (needed and training for needed in ctx.needs_input_grad[:4])
        wanted = wants_hidden, wants_weight, wants_bias, wants_own
        gradients = _Gradients(*wanted, hidden, weight, bias, own, at) if any(wanted) else None
        nll = torch.zeros((), dtype=torch.float64, device=hidden.device)
        correct = torch.zeros((), dtype=torch.float64, device=hidden.device)
        each = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            logits = F.linear(hidden[rows], weight, bias).float()
            if own is not None:
                logits[:, at] = F.linear(hidden[rows], own, None if bias is None else bias[at])
            target = targets[rows, None]
            top = logits.argmax(-1, keepdim=True)
            # subtracting the largest logit first keeps small losses exact
            logits -= logits.gather(1, top)
            log_sum = logits.exp().sum(-1, keepdim=True).log()
            losses, hits = log_sum - logits.gather(1, target), top == target
            if smoothing:
                losses += smoothing * (log_sum - logits.mean(-1, keepdim=True) - losses)
            each[rows] = losses[:, 0]
            share = None if shares is None else shares[rows, None]
            nll += (losses if share is None else losses * share).sum(dtype=torch.float64)
            correct += (hits if share is None else hits * share).sum()
            if gradients is not None:
                gradients.add(rows, _of_logits(logits, log_sum, target, share, smoothing))
        ctx.save_for_backward(*(gradients.made if gradients is not None else (None,) * 4))
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias, own))
        ctx.mark_non_differentiable(correct, each)
        return nll, correct, each

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grad_nll.float()
        hidden, *rest = ctx.saved_tensors
        return (
            None if hidden is None else (hidden * scale).to(ctx.dtypes[0]),
            *(
                None if grad is None else grad.mul_(scale).to(dtype)
                for grad, dtype in zip(rest, ctx.dtypes[1:], strict=True)
            ),
            *(None,) * 6,
        )


def _head_forward(
    self: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    chunk: int = 0,
    smoothing: float = 0.0,
) -> torch.Tensor | Nll:
    """A linear layer's forward that also knows how to return its loss; takes the place of `nn.Linear.forward`.

    With `asked` set, the next call by the model's own code finds the loss too, and returns logits over no vocabulary.

    Where rows of new tokens are trained beside a frozen head (`model.rows`), its loss is that of these rows too.
    """
    asked = self.asked
    if targets is None and asked is None:
        return F.linear(hidden, self.weight, self.bias)
    if targets is None:
        self.asked = None
        how = asked.targets, asked.shares, asked.chunk, asked.smoothing
        asked.found = self.forward(hidden.flatten(0, -2)[asked.at], *how)
        return hidden.new_empty(*hidden.shape[:-1], 0)
    own, bias = getattr(self, "new_weight", None), self.bias
    at: Any = getattr(self, "new_rows", None)
    if hasattr(self, "new_bias"):
        bias = torch.cat([bias[: at.start], self.new_bias, bias[at.stop :]])
    options = chunk, smoothing, torch.is_grad_enabled()
    return Nll(*_ChunkedNll.apply(hidden, self.weight, bias, own, at, targets, shares, *options))


@dataclass
class Asked:
    """The loss that is wanted of a head when the model calls it next.

    Attributes:
        at: Positions of the targets among all that the head is given, row after row.
        targets: Their ids.
        shares: What each counts, or None.
        chunk: Targets whose logits exist at once.
        smoothing: Share of each target that is spread over the vocabulary.
        found: The loss, once the head has been called.
    """

    at: torch.Tensor
    targets: torch.Tensor
    shares: torch.Tensor | None
    chunk: int
    smoothing: float
    found: Nll | None = None


def plain_head(model: PreTrainedModel) -> Any:
    """The output head if logits are just its linear map of what it is given, as far as is known, else None.

    The head's forward learns to return the loss. It stays one call of the head's own module, because ZeRO-3 gathers
    a layer's weights around exactly that call.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    bent = any(getattr(config, key, None) not in (None, neutral) for key, neutral in LOGIT_SETTINGS.items())
    if type(head) is not nn.Linear or bent or not (is_two_sided(config) or hasattr(model, model.base_model_prefix)):
        return None
    return with_loss(head)


def with_loss(head: Any) -> Any:
    """The same layer, whose forward has learnt to return the loss (`_head_forward`)."""
    head.forward, head.asked = _head_forward.__get__(head), None
    return head


def nll_of_logits(
    logits: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor | None = None, smoothing: float = 0.0
) -> Nll:
    """The same from logits, shape (targets, vocabulary)."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)
    hits = logits.detach().argmax(-1) == targets
    if shares is None:
        return Nll(losses.sum(dtype=torch.float64), hits.sum().double(), losses.detach())
    return Nll((losses * shares).sum(dtype=torch.float64), (hits * shares).sum().double(), losses.detach())


def perplexity(loss: float, tokens: float) -> float | None:
    """exp of the mean, infinity beyond a float's range; None of no tokens."""
    if not tokens:
        return None
    return math.exp(loss / tokens) if loss / tokens < 700 else math.inf


def token_metrics(which: str) -> dict[str, Metric]:
    """`loss`, `perplexity` and `token_accuracy` of a task that predicts tokens; `which` says which ones, for people."""
    sums = "loss", "weight"
    return {
        "loss": Metric(f"nats per {which} token", "Loss", "{:.4f}", sums, mean, better="lower"),
        "perplexity": Metric("exp of the loss", "Perplexity", "{:,.4g}", sums, perplexity, better="lower"),
        "token_accuracy": Metric(
            f"share of {which} tokens predicted first",
            "Token accuracy",
            "{:.2%}",
            ("correct", "weight"),
            mean,
            better="higher",
        ),
    }
