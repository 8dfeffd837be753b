"""How a model gets its documents: in flat rows, kept apart by our attention, or padded, by its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from dsft.model import attention
from dsft.model.kind import Kind


def why_padded(kind: Kind, config: PreTrainedConfig) -> str | None:
    """Why a model cannot keep the documents of a flat row apart, as far as its class tells; None if it may.

    What does not show here, shows in the model's answers: `tasks.isolation.check`.
    """
    if kind.two_sided:
        return "an encoder-decoder reads one text and writes another, so that a row has no single order of tokens"
    model = kind.auto._model_mapping.get(type(config), None)
    if getattr(model, "_is_stateful", False):
        return f"{model.__name__} is recurrent, so that its state would run on from one document to the next"
    return None


def implementation(kind: Kind, config: PreTrainedConfig, padded: bool) -> str:
    """The attention to load a model with (`attn_implementation`).

    In padded rows it is the model's own: SDPA, or the plain one where there is none, where it is asked for what SDPA
    would pass over in silence, or where attention weights are dropped while training, which SDPA would draw by itself.
    """
    if not padded:
        return attention.NAME
    model = kind.auto._model_mapping.get(type(config), None)
    text = config.get_text_config()
    plain = attention.has_dropout(text) or getattr(text, "attn_logit_softcapping", None)
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not plain else "eager"


def first_position(model: nn.Module) -> int:
    """The position id of a document's first token: RoBERTa and its kin count from behind the padding token's id."""
    counting: Iterator[Any] = (
        module for module in model.modules() if hasattr(module, "create_position_ids_from_input_ids")
    )
    return next((module.padding_idx + 1 for module in counting if module.padding_idx is not None), 0)
