"""A kind of models: what a task trains, and how such a model is distinguished from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from dsft.errors import UserError


class Inseparable(UserError):
    """A model does not keep documents apart in this layout."""


@dataclass(frozen=True)
class Kind:
    """Models of one kind.

    Attributes:
        auto: Transformers' class that loads them, such as `AutoModelForCausalLM`.
        families: Names (`model_type`) of the architectures that have one.
        noun: What one is called, for messages: `a causal language model`.
        such_as: Some, for messages: `a Llama, Qwen or Gemma`.
        adapters: What peft calls the task.
        encoder: Whether its tokens see what comes after them; None where they may or may not.
        headed: Whether it gets a head of its own, new where its files have none for what is learnt.
        by_document: Whether it answers once for each document, and not at each token.
        two_sided: Whether an encoder reads one text, and a decoder writes another.
    """

    auto: Any
    families: Mapping[str, Any]
    noun: str
    such_as: str
    adapters: str
    encoder: bool | None = False
    headed: bool = False
    by_document: bool = False
    two_sided: bool = False

    def lacks(self, about: Mapping[str, Any]) -> str | None:
        """What a model is instead, by the content of its `config.json`; None if it is of this kind, as far as is known.

        Some architectures can be both an encoder and a decoder: `is_decoder` says which.
        """
        family = about.get("model_type")
        if self.two_sided:
            return None if about.get("is_encoder_decoder") and family in self.families else "no encoder-decoder"
        if about.get("is_encoder_decoder"):
            return "an encoder-decoder"
        if self.encoder is False and family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not about.get("is_decoder"):
            return "an encoder"
        if self.encoder and about.get("is_decoder"):
            return "a decoder"
        if family in CONFIG_MAPPING_NAMES and family not in self.families:
            return "of an architecture without such a model in transformers"
        return None


CAUSAL = Kind(
    auto=AutoModelForCausalLM,
    families=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    noun="a causal language model",
    such_as="a Llama, Qwen or Gemma",
    adapters="CAUSAL_LM",
)
MASKED = Kind(
    auto=AutoModelForMaskedLM,
    families=MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    noun="a masked language model",
    such_as="a BERT, RoBERTa or ModernBERT",
    adapters="FEATURE_EXTRACTION",
    encoder=True,
)
SEQUENCE = Kind(
    auto=AutoModelForSequenceClassification,
    families=MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    noun="a model with a head for whole texts",
    such_as="a BERT, RoBERTa, ModernBERT, Llama or Qwen",
    adapters="SEQ_CLS",
    encoder=None,
    headed=True,
    by_document=True,
)
TOKEN = Kind(
    auto=AutoModelForTokenClassification,
    families=MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    noun="a model with a head for each token",
    such_as="a BERT, RoBERTa, ModernBERT, Llama or Qwen",
    adapters="TOKEN_CLS",
    encoder=None,
    headed=True,
)
ANSWERS = Kind(
    auto=AutoModelForQuestionAnswering,
    families=MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    noun="a model with a head for the ends of an answer",
    such_as="a BERT, RoBERTa or ModernBERT",
    # peft 0.21 has a class for questions that keeps the token types to itself (PeftModelForQuestionAnswering.forward)
    adapters="FEATURE_EXTRACTION",
    encoder=True,
    headed=True,
)
SEQ2SEQ = Kind(
    auto=AutoModelForSeq2SeqLM,
    families=MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    noun="an encoder-decoder",
    such_as="a T5, mT5, BART, Marian or NLLB",
    adapters="SEQ_2_SEQ_LM",
    two_sided=True,
)


def logits_of(output: Any) -> torch.Tensor:
    """A model's logits; those of a kind that gives the two ends of an answer side by side, (rows, tokens, 2)."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


def is_two_sided(config: Any) -> bool:
    """Whether a model of this config is an encoder-decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def plain_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A model's logits for whole rows of token ids, by its own way; an encoder-decoder reads them on both sides."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_two_sided(model.config):
        inputs["decoder_input_ids"] = ids
    return logits_of(model(**inputs, use_cache=False))
