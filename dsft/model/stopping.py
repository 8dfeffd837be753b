"""Where a model's answers end: what its generation config says, and what the chat template says."""

from __future__ import annotations

import json
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedTokenizerFast

from dsft.errors import UserError
from dsft.model.load import ModelSource, load_config, load_generation_config


@dataclass(frozen=True)
class Stopping:
    """Where answers end.

    Attributes:
        tokens: Token ids that end a sample.
        generation_config: Content of the exported `generation_config.json`: the model's own byte for byte, if that
            ends where the chat template does; None if nothing needs to be said.
        note: What was added to it, for people; None if nothing.
    """

    tokens: list[int]
    generation_config: bytes | None
    note: str | None = None


def find_stopping(source: ModelSource, tokenizer: PreTrainedTokenizerFast, turn_end: int | None) -> Stopping:
    """Where the answers of a model end that is trained with this tokenizer.

    transformers, vLLM and others stop at `eos_token_id` of `generation_config.json`, and at the tokenizer's own end
    token at most beside it, so the turn's end has to stand there. Config and tokenizer stay as they are: their end
    token also ends plain texts.

    Args:
        source: The base model.
        tokenizer: Its tokenizer.
        turn_end: The token with which the chat template ends a turn, or None.

    Raises:
        UserError: The model's `generation_config.json` is no JSON object.
    """
    config, own = load_config(source), load_generation_config(source)
    settings = _settings(source, own)
    known = _listed(settings.get("eos_token_id"))
    ends = known or _listed(config.get_text_config().eos_token_id)
    tokens = list(dict.fromkeys([*ends, *_listed(tokenizer.eos_token_id), *_listed(turn_end)]))
    if turn_end is None or turn_end in known:
        # an old config.json may hold generation settings, and transformers no longer writes them there
        moved = own is None and settings.keys() - _OF_ANY_CONFIG
        return Stopping(tokens, _written(settings) if moved else own)
    settings["eos_token_id"] = [*ends, turn_end] if turn_end not in ends else ends
    note = (
        f"the chat template ends a turn with {tokenizer.convert_ids_to_tokens(turn_end)!r} ({turn_end}), at which the "
        f"model's generation config does not stop (eos_token_id {known or 'none'}): samples stop at it, and the "
        f"exported generation_config.json names it (eos_token_id {settings['eos_token_id']})"
    )
    return Stopping(tokens, _written(settings), note)


_OF_ANY_CONFIG = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"}
"""What transformers makes a generation config of where a model has none."""


def _settings(source: ModelSource, own: bytes | None) -> dict:
    """The model's generation settings as plain values; what transformers makes of its config if it has none."""
    if own is None:
        made = GenerationConfig.from_pretrained(
            source.path, config_file_name="config.json", revision=source.revision, _from_model_config=True
        )
        return {name: value for name, value in json.loads(made.to_json_string()).items() if not name.startswith("_")}
    try:
        settings = json.loads(own)
    except ValueError as problem:
        raise UserError(f"model.path={source.name}: its generation_config.json is no JSON: {problem}") from problem
    if not isinstance(settings, dict):
        raise UserError(f"model.path={source.name}: its generation_config.json is no JSON object")
    return settings


def _written(settings: dict) -> bytes:
    return (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode()


def _listed(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
