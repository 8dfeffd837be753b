"""Dropout of `model.noise` as one pass over the tensor on CUDA devices, where its elementwise steps would be eight."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dsft.model.noise import LEVELS, MULTIPLIERS

BLOCK = 1024


@triton.jit
def _drop(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows none but its own
    x, out, tokens, pairs, features, lowest, scale, first: tl.constexpr, second: tl.constexpr, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * size + tl.arange(0, size)
    inside = column < features
    bits = tl.load(tokens + row) ^ tl.load(pairs + column // 2, mask=inside, other=0)
    bits = bits * first
    bits = bits + (bits >> 15)
    bits = bits * second
    bits = bits + (bits >> 16)
    # the low or the high 16 bits, with their sign
    drawn = tl.where(column % 2 == 0, (bits << 16) >> 16, bits >> 16)
    place = row * features + column
    value = tl.load(x + place, mask=inside, other=0.0)
    kept = tl.where(drawn >= lowest, value.to(tl.float32) * scale, 0.0)
    tl.store(out + place, kept.to(value.dtype), mask=inside)


class FusedDrop(torch.autograd.Function):
    """`x` where the draw is kept, scaled; the backward pass draws once more and keeps nothing of the tensor's size."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor, pairs: torch.Tensor, dropped: int) -> torch.Tensor:
        """Drop elements.

        Args:
            ctx: Autograd's.
            x: Shape (1, tokens, ...) or (tokens, ...), on a CUDA device.
            tokens: int32 keys, shape (tokens,).
            pairs: int32 keys of pairs of features, shape (pairs,).
            dropped: How many of LEVELS values of a draw are dropped.
        """
        ctx.save_for_backward(tokens, pairs)
        ctx.dropped = dropped
        return _apply(x, tokens, pairs, dropped)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient, dropped at the same places."""
        tokens, pairs = ctx.saved_tensors
        return _apply(gradient, tokens, pairs, ctx.dropped), None, None, None


def _apply(x: torch.Tensor, tokens: torch.Tensor, pairs: torch.Tensor, dropped: int) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    features = x.numel() // len(tokens)
    grid = (len(tokens), triton.cdiv(features, BLOCK))
    scale = LEVELS / (LEVELS - dropped)
    _drop[grid](x, out, tokens, pairs, features, dropped - LEVELS // 2, scale, *MULTIPLIERS, BLOCK)
    return out
