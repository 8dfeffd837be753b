"""Whether a model keeps the documents of a batch apart, found out by its answers and not by a list of models."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dsft.errors import UserError
from dsft.model.attention import cumulative
from dsft.model.kind import Inseparable, plain_logits
from dsft.model.noise import token_keys
from dsft.tasks.forward import Forward
from dsft.types import Batch, Example

PROBE = 11
"""Tokens of each of the documents by which a model shows that it keeps documents apart. Two of them are as many as no
model has heads, experts or features, so that no other dimension is taken for that of tokens."""

SHORT = 7
"""Tokens of the second document where rows are padded."""

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


def probe_batch(first: torch.Tensor, second: torch.Tensor, padded: bool) -> Batch:
    """Two documents in a flat row; or padded, the second one cut to SHORT tokens.

    Args:
        first: int64, shape (tokens,).
        second: int64, shape (PROBE,).
        padded: The layout.
    """
    lengths = [len(first), SHORT if padded else len(second)]
    positions = torch.arange(PROBE, device=first.device)
    if padded:
        mask = positions[: lengths[0]] < torch.tensor(lengths, device=first.device)[:, None]
        ids = torch.stack([first, second[: lengths[0]].where(mask[1], first)])
        laid = {"input_ids": ids, "attention_mask": mask.long()}
    else:
        laid = {"input_ids": torch.cat([first, second])[None], "documents": cumulative(lengths)}
        laid["position_ids"] = torch.cat([positions[:length] for length in lengths])[None]
    noise = token_keys(0, (0, 0), lengths, [0, 1], lengths[0] if padded else None)
    tensors = laid | {"noise": noise, "lengths": torch.tensor(lengths)}
    return Batch(tensors, lengths, 0.0, 2, [0, 1], padded=padded).to(first.device)


def check(forward: Forward, probe: torch.Tensor, padded: bool) -> torch.Tensor:
    """Make sure that a document gets the same logits beside any other, and alone.

    Not every model can keep documents apart in a flat row: some do not hand the boundaries down, some count positions
    by themselves, and recurrent or convolutional layers run on across the boundary. A leak shows where another first
    document changes the second one's logits, which should not move at all: the shapes are the same. How much they may
    move all the same (experts get other numbers of tokens) is measured by transformers' own attention over two rows of
    equal length, which cannot leak. Padded rows are held to the same; there, what fills them up changes as well.

    Args:
        forward: Around the model, in evaluation mode.
        probe: From `probe_tokens`, on the model's device.
        padded: Which layout is checked.

    Returns:
        Logits of the batch of the first and the second document: `Forward.logits`.

    Raises:
        Inseparable: The documents change each other.
        UserError: Its logits are not finite.
    """
    first, other, second = probe
    name = type(forward.plain).__name__
    logits = forward.logits(probe_batch(first, second, padded))
    if logits.isnan().any() or logits.isposinf().any():
        half = next(forward.model.parameters()).dtype is torch.float16
        raise UserError(
            f"{name} gives logits that are not finite before any training: "
            + ("use precision=bf16 or precision=fp32." if half else "the weights in model.path are damaged.")
        )
    tokens = SHORT if padded else PROBE
    here = slice(1, 2) if forward.by_document else slice(PROBE, PROBE + tokens)
    moved = change(forward.logits(probe_batch(other, second, padded))[here], logits[here])
    expected = _alone(forward, first, second[:tokens])
    rounding = change(_alone(forward, other, second[:tokens]), expected)
    # the median, since the logits of single tokens may be ill-conditioned
    differs = change(logits[here], expected).median()
    if not (moved.max() <= 10 * rounding.max() + UNCHANGED and differs < torch.finfo(logits.dtype).eps ** 0.5):
        where = "padded rows" if padded else "the documents of a row"
        remedy = "Use data.packing=padded, or another model."
        if padded:
            remedy = "Let it have one document at a time: batch.micro_batch_size=1 eval.micro_batch_size=1."
        raise Inseparable(f"{name} does not keep {where} apart: its logits are not the same there as alone. {remedy}")
    return logits


def _alone(forward: Forward, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The second document's logits by the model's own way for two rows of equal length; (tokens or 1, outputs)."""
    pair = torch.stack([first[: len(second)], second])
    logits = plain_logits(forward.model, pair)[1]
    return logits[None] if forward.by_document else logits


def change(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far each position's logits are from others, relative to their 2-norm; float64, shape (positions,)."""
    found, expected = found.double(), expected.double()
    size = expected.where(expected.abs() < MASKED, 0).norm(dim=-1)
    return (found - expected).where(found != expected, 0).norm(dim=-1) / size.clamp(min=1e-30)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    return found.shape == expected.shape and bool(change(found, expected).max() <= UNCHANGED)


def document(ids: torch.Tensor, padded: bool) -> Batch:
    """A batch of one document without targets; `ids` are int64, shape (1, tokens)."""
    tokens = ids.shape[1]
    flat = {"position_ids": torch.arange(tokens)[None], "documents": cumulative([tokens])}
    layout = {"attention_mask": torch.ones_like(ids)} if padded else flat
    nothing = torch.zeros(1, dtype=torch.int64)
    targets = {"target_at": nothing, "target_ids": nothing, "target_weights": torch.zeros(1)}
    tensors = {"input_ids": ids, "lengths": torch.tensor([tokens]), **layout, **targets}
    tensors["weight"] = torch.zeros((), dtype=torch.float64)
    return Batch(tensors, [tokens], 0.0, 1, [0], padded=padded)
