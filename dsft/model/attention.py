"""Attention that keeps the documents of a flat row apart, with no padding and no mask tensor.

Documents lie end to end in a row of shape (1, heads, tokens, head_dim). The kernel gets where each begins:
variable-length kernels on CUDA (flash-attn, or torch's own), a loop over documents elsewhere. Transformers models
use it under the attention name NAME, so no model is touched.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, masking_utils
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsft.config.schema import Attention
from dsft.errors import UserError
from dsft.model.kind import Inseparable
from dsft.model.noise import Noise

NAME = "dsft"
"""The `attn_implementation` under which transformers finds this module."""

DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "attn_dropout",
    "attention_dropout_prob",
    "attention_probs_dropout_prob",
    "attn_drop",
    # T5 and its kin have one rate for everything
    "dropout_rate",
)
"""Names under which configs keep the rate of dropout of attention weights."""

HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "output_hidden_states",
}
"""Keyword arguments that models hand down to their attention, though they have no say in its result."""


@dataclass
class Documents:
    """Where the documents of a flat row lie, handed to the model as the keyword argument `documents`.

    Attributes:
        lengths: Tokens of each document.
        cu_seqlens: int32, shape (documents + 1,): cumulative lengths, on the device.
        kernel: Which kernel attends.
        noise: Draws dropout of attention weights.
    """

    lengths: list[int]
    cu_seqlens: torch.Tensor
    kernel: Attention
    noise: Noise | None = None


def cumulative(lengths: list[int]) -> torch.Tensor:
    """Where each document of a flat row begins, and the end of the last: int32, shape (documents + 1,), on the host."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def has_dropout(config: PreTrainedConfig) -> bool:
    """Whether a model's config asks for dropout of attention weights."""
    return any(getattr(config, name, None) for name in DROPOUTS)


def choose_kernel(wanted: Attention, device: torch.device, dtype: torch.dtype, dropout: bool = False) -> Attention:
    """The kernel to use on `device` for `dtype`.

    Args:
        wanted: The setting; `auto` takes the fastest that works, or with dropout the one that draws it exactly.
        device: Where the model computes.
        dtype: What it computes in.
        dropout: Whether attention weights are dropped while training.

    Raises:
        UserError: `wanted` cannot run there.
    """
    half_on_cuda = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    works = {
        Attention.flash: half_on_cuda and importlib.util.find_spec("flash_attn") is not None,
        Attention.torch_varlen: half_on_cuda and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        Attention.per_document: True,
    }
    if wanted is Attention.auto:
        return Attention.per_document if dropout else next(kernel for kernel, runs in works.items() if runs)
    if not works[wanted]:
        raise UserError(
            f"model.attention={wanted.value} needs a CUDA device, precision bf16 or fp16, and its package; here the "
            f"device is {device.type} and the type {str(dtype).removeprefix('torch.')}. Use model.attention=auto."
        )
    if dropout and wanted is Attention.torch_varlen:
        raise UserError(
            "model.attention=torch_varlen: this kernel has no dropout of attention weights, which the model's "
            "config.json asks for. Use model.attention=per_document (the same noise for any split of the work) or "
            "model.attention=flash (noise of its own), or set the dropout to 0 in config.json."
        )
    return wanted


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each document, in the signature that transformers calls.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, head_dim).
        key: (1, key_value_heads, tokens, head_dim); `value` likewise.
        attention_mask: Used only without `documents` (generation).
        scaling: Factor of the scores; None is 1 / sqrt(head_dim).
        dropout: Dropout on the attention weights; models give 0 in evaluation.
        is_causal: Whether tokens see only what comes before; None asks the module.
        documents: Where the documents lie; None hands over to transformers' own SDPA.
        sliding_window: How many tokens back a token sees, itself included, and if not causal ahead; None for all.
        rest: What else a model may hand over; anything that could change the result is refused.

    Returns:
        Output of shape (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        Inseparable: The model asks for an attention variant that is not implemented here.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if documents is None:
        rest |= {"scaling": scaling, "dropout": dropout, "is_causal": causal, "sliding_window": sliding_window}
        return _by_transformers(module, query, key, value, attention_mask, **rest)
    _refuse_what_is_missing(module, {"attention_mask": attention_mask, **rest}, max(documents.lengths))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if documents.kernel is not Attention.per_document:
        return _variable_length(query, key, value, documents, scale, sliding_window, causal, dropout), None
    if dropout:
        return _with_dropout(module, query, key, value, documents, scale, sliding_window, causal, dropout), None
    return _per_document(query, key, value, documents.lengths, scale, sliding_window, causal), None


def _by_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    is_causal: bool,
    sliding_window: int | None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' own SDPA, for generation."""
    if module.training:
        raise Inseparable(f"{type(module).__name__} got no document boundaries: its model does not hand them down.")
    if attention_mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        # `_mask` cannot tell a prompt without padding from a flat row, and makes no mask for either
        attention_mask = _visible(query.shape[2], key.shape[2], sliding_window, query.device, is_causal)
    sdpa, options = ALL_ATTENTION_FUNCTIONS["sdpa"], {"is_causal": is_causal, "sliding_window": sliding_window}
    return sdpa(module, query, key, value, attention_mask, **options, **rest)


def _refuse_what_is_missing(module: torch.nn.Module, asked: dict, longest: int) -> None:
    """Refuse a layer that asks for more than plain attention, rather than give it something else."""
    missing = sorted(
        name for name, value in asked.items() if value is not None and value is not False and name not in HARMLESS
    )
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    if chunk and longest > chunk:
        missing.append(f"attention_chunk_size={chunk} (the longest document has {longest} tokens)")
    if missing:
        raise Inseparable(
            f"{type(module).__name__} asks for attention with {', '.join(missing)}, which flat rows cannot have. "
            "Use data.packing=padded, or another model."
        )


def _per_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """Attention by a loop over documents; shapes as in `attention`."""
    pieces = zip(*(t[0].split(lengths, dim=1) for t in (query, key, value)))
    return torch.cat([_one_document(q, k, v, scale, window, causal) for q, k, v in pieces]).unsqueeze(0)


def _one_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """One document by torch's fused kernel: (heads, tokens, head_dim) in, (tokens, heads, head_dim) out."""
    tokens = query.shape[1]
    band = _visible(tokens, tokens, window, query.device, causal) if window is not None and tokens > window else None
    output = F.scaled_dot_product_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=band,
        is_causal=causal and band is None,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return output[0].transpose(0, 1)


def _with_dropout(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """The loop over documents with the weights at hand, to drop some of them; shapes as in `attention`."""
    noise = documents.noise
    assert noise is not None, "a model that drops attention weights has a noise"
    groups = query.shape[1] // key.shape[1]
    key, value = (t[0].repeat_interleave(groups, dim=0) for t in (key, value))
    outputs, begin = [], 0
    for tokens in documents.lengths:
        rows = slice(begin, begin + tokens)
        scores = (query[0, :, rows] @ key[:, rows].transpose(1, 2)) * scale
        visible = _visible(tokens, tokens, window or tokens, query.device, causal)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
        weights = noise.attention_dropout(module, weights, begin, dropout)
        outputs.append((weights @ value[:, rows]).transpose(0, 1))
        begin += tokens
    noise.attended(module)
    return torch.cat(outputs).unsqueeze(0)


def _visible(queries: int, keys: int, window: int, device: torch.device, causal: bool) -> torch.Tensor:
    """True where a query sees a key, bool, (queries, keys); the last query stands at the last key."""
    ahead = keys - queries
    last = ahead if causal else ahead + window - 1
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(last).triu(ahead + 1 - window)


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """All documents in one CUDA kernel; shapes as in `attention`."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (tokens, heads, head_dim)
    ends, longest = documents.cu_seqlens, max(documents.lengths)
    left = -1 if window is None else window - 1
    reach = (left, 0 if causal else left)
    if documents.kernel is Attention.flash:
        from flash_attn import flash_attn_varlen_func

        output = flash_attn_varlen_func(
            *(q, k, v, ends, ends, longest, longest),
            dropout_p=dropout,
            softmax_scale=scale,
            causal=causal,
            window_size=reach,
        )
    elif dropout:
        raise UserError(
            "this model drops attention weights while it trains, which model.attention=torch_varlen cannot: use "
            "model.attention=per_document, or model.attention=flash with noise of its own."
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        groups = q.shape[1] // k.shape[1]
        options: dict[str, Any] = {"scale": scale, "window_size": reach}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = groups > 1
        elif groups > 1:  # torch before 2.13
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        output = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
    return output.unsqueeze(0)


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask tensor for flat rows; transformers' own where generation has padded its prompts."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _without_asking(prepare: Callable[..., tuple]) -> Callable[..., tuple]:
    """transformers asks the device in every forward pass whether positions begin anew, to mask documents: not ours."""

    def prepared(
        config: Any,
        inputs_embeds: Any,
        attention_mask: Any,
        past_key_values: Any,
        position_ids: Any,
        *rest: Any,
        **more: Any,
    ) -> tuple:
        if config._attn_implementation == NAME:
            position_ids = None  # `_mask` does not look at what is found
        return prepare(config, inputs_embeds, attention_mask, past_key_values, position_ids, *rest, **more)

    return prepared


masking_utils._preprocess_mask_arguments = _without_asking(masking_utils._preprocess_mask_arguments)
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
