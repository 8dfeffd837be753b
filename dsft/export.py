"""Composition root of `launch/export.py`: a run's checkpoint becomes a model directory, on one process and the CPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from dsft import checkpoint
from dsft.config import load
from dsft.config.schema import Method
from dsft.errors import UserError
from dsft.model import export as writing
from dsft.model import load as models
from dsft.model import rows, tuning, vocabulary

PROBE = "def add(a, b):\n    return a + b  # The quick brown fox costs $3.14, 敏捷的棕色狐狸。\n"
"""Text whose logits are compared; words, code, digits and Chinese, so that many rows of the embedding are met."""


def export(
    run_dir: Path, which: str = "last", merge: bool = True, output: Path | None = None
) -> tuple[Path, writing.Report]:
    """Write the model of a checkpoint, reload it and compare logits.

    Args:
        run_dir: Directory of a run, of any ZeRO stage and number of ranks.
        which: `best`, `last` or a step.
        merge: With LoRA, a whole model; otherwise the adapters alone.
        output: Where to write; default `run_dir/model`.

    Returns:
        The written directory, and how far its logits are from those of the checkpoint's model.

    Raises:
        UserError: No such run or checkpoint, a damaged one, a full disk, or a written model that is another.
    """
    run_dir = Path(run_dir).expanduser()
    output = Path(output).expanduser() if output else run_dir / "model"
    config = load.load_yaml(run_dir / "config.yaml")
    if not merge and config.tuning.method is not Method.lora:
        raise UserError(
            f"merge=false writes adapters alone, but {run_dir} was run with tuning={config.tuning.method.value}, "
            "which has none. Leave it out."
        )
    writing.check_replaceable(output)
    path = checkpoint.find(run_dir, which)
    if problem := checkpoint.damage(path):
        raise UserError(f"{path} is no whole checkpoint: {problem}")
    source = models.resolve(config.model.path, config.model.revision, config.data.cache_dir)
    tokenizer = models.load_tokenizer(source, config.model.chat_template)
    dtype = _dtype(run_dir)
    model = models.load_model(source, dtype, "eager")
    new_tokens = checkpoint.read_state(path)["new_tokens"]
    words = vocabulary.extend(tokenizer, new_tokens, model.config.get_text_config().vocab_size)
    if words.pieces and not merge:
        raise UserError(
            f"merge=false writes adapters alone, but {run_dir} was run with {len(words.pieces)} new tokens, whose rows "
            f"the base model {config.model.path} lacks. Leave merge=false out."
        )
    rows.grow(model, words, lambda parameters: nullcontext())
    model = tuning.apply(model, config.tuning, config.train.seed, words)
    put_weights(model, checkpoint.weights(path), str(path))
    writing.write_model(
        model,
        tokenizer,
        output,
        gather=lambda parameters: nullcontext(),
        is_writer=True,
        merge=merge,
        dtype=dtype,
    )
    probe = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.eval()(input_ids=probe, use_cache=False).logits
    return output, writing.verify(output, probe, expected, dtype)


def put_weights(model: nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Overlay the model's weights with those of a checkpoint.

    Args:
        model: As `tuning.apply` made it; tied weights may come under either name.
        weights: By the model's names; frozen ones may be left out.
        origin: Where they came from, for messages.

    Raises:
        UserError: A trained weight is missing, or one is of another model.
    """
    state = model.state_dict()
    strange = sorted(name for name, tensor in weights.items() if name not in state or state[name].shape != tensor.shape)
    given = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in weights}
    missing = sorted(name for name, p in model.named_parameters() if p.requires_grad and id(p) not in given)
    if strange or missing:
        which = f"lacks {missing[0]!r}" if missing else f"holds {strange[0]!r}, which the model has not in that shape"
        raise UserError(
            f"{origin} does not fit the model in config.yaml: it {which} (and {len(missing) + len(strange) - 1} more). "
            "Was model.path or tuning changed after the run?"
        )
    for name, tensor in weights.items():
        state[name].copy_(tensor)


def _dtype(run_dir: Path) -> torch.dtype:
    """The type that the run computed in, which `precision=auto` settled on the machine of the run."""
    file = run_dir / "ds_config.json"
    try:
        ds = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}). It is written when the run begins.") from error
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds.get(key, {}).get("enabled"):
            return dtype
    return torch.float32
