"""The DeepSpeed dict: a JSON file's ZeRO and communication, and everything else from this config.

Two sources of truth are none, so every key that the config owns is always written, and a JSON that holds one with
any value but "auto" is refused. Knows DeepSpeed 0.19.8's keys without importing it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsft.config.schema import Fp16Config
from dsft.config.zero import offloads_optimizer, offloads_parameters, stage
from dsft.errors import UserError

__all__ = ["build", "find", "offloads_optimizer", "offloads_parameters", "read", "stage"]

REPOSITORY = Path(__file__).resolve().parents[1]

NEVER = 10**9
"""`steps_per_print`: DeepSpeed stays silent, `train.log_every` speaks."""

OWNERS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "fp16": "precision=fp16 and fp16.*",
    "bf16": "precision=bf16",
    "data_types": "precision",
    "torch_autocast": "precision",
    "steps_per_print": "train.log_every",
    "wall_clock_breakdown": "train.log_every",
    "zero_allow_untested_optimizer": "optim.name",
    "zero_force_ds_cpu_optimizer": "optim.implementation",
}
"""Keys that `build` writes, and the setting that decides each."""

ELSEWHERE = {
    "optimizer": "optim=NAME and optim.*",
    "scheduler": "schedule=NAME and schedule.*",
    "bfloat16": "precision=bf16",
    "activation_checkpointing": "activation_checkpointing=none|full|offload",
    **dict.fromkeys(("wandb", "tensorboard", "csv_monitor", "comet"), "tracking=jsonl|wandb"),
    **dict.fromkeys(
        ("gradient_allreduce_op", "managed_gradient_accumulation", "prescale_gradients", "gradient_predivide_factor"),
        "the loss, which is divided by the supervised tokens of the whole global batch",
    ),
}
"""Keys that no JSON may hold, whatever their value, and what decides the matter here."""

GONE = {
    "": (
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    ),
    "zero_optimization": ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"),
}
"""Keys that DeepSpeed 0.19.8 refuses, by block."""

RENAMED = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory inside offload_optimizer or offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
"""Deprecated keys of `zero_optimization`, and what takes their place."""


def _names(text: str) -> list[str]:
    return text.split()


_STAGE3 = _names(
    "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters "
    "max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold "
    "use_all_reduce_for_fetch_params allgather_sequential"
)
KNOWN = {
    "": _names(
        "zero_optimization aio communication_data_type comms_logger flops_profiler compile disable_allgather "
        "disable_python_gc dump_state log_level memory_breakdown timers"
    ),
    "zero_optimization": _names(
        "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
        "allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights "
        "elastic_checkpoint offload_param offload_optimizer sub_group_size ignore_unused_parameters "
        "round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights "
        "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
        "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
        "save_muon_momentum_buffer_in_memory leaf_module"
    )
    + _STAGE3
    + [f"stage3_{name}" for name in _STAGE3],
    "zero_optimization.offload_param": _names("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    "zero_optimization.offload_optimizer": _names(
        "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
        "cpuadam_cores_perc"
    ),
}
"""Keys that a JSON may hold, by block; `zenflow` and the like train by other rules than ours and are not among them."""


def build(
    source: str | Path | dict[str, Any],
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    precision: str,
    fp16: Fp16Config,
    max_grad_norm: float,
) -> dict[str, Any]:
    """The whole DeepSpeed dict of a run, with no "auto" left in it.

    Args:
        source: A DeepSpeed JSON file, or its content.
        micro_batch_size: Rows in one forward pass of one rank.
        gradient_accumulation_steps: Forward passes per optimizer step.
        world_size: Data-parallel ranks.
        precision: `fp32`, `bf16` or `fp16`; already resolved.
        fp16: Loss scaling.
        max_grad_norm: Global 2-norm to clip to; 0 is off.

    Raises:
        UserError: If the JSON cannot be read, or holds a key that is not its own.
    """
    ds = read(source) if isinstance(source, str | Path) else _refuse(source, "the DeepSpeed config")
    # DeepSpeed has fp32 accumulation for half precision under ZeRO only, and raises for it at stage 0.
    accumulation = precision if stage(ds) == 0 else "fp32"
    return {key: value for key, value in ds.items() if key not in OWNERS} | {
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": float(max_grad_norm),
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, **vars(fp16)},
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": accumulation},
        "torch_autocast": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def read(path: str | Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file that keeps to what is its own.

    Raises:
        UserError: Naming the file, and every key that is not its own with the setting that owns it.
    """
    file = find(path)
    try:
        ds = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}).") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(ds, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object {{...}}, not a {type(ds).__name__}.")
    return _refuse(ds, str(path))


def find(path: str | Path) -> Path:
    """Where `path` is: as given or below the working directory, else below the repository.

    Raises:
        UserError: If it is in neither place.
    """
    for place in (Path(path).expanduser(), REPOSITORY / path):
        if place.is_file():
            return place
    shipped = "|".join(sorted(file.stem for file in (REPOSITORY / "ds_configs").glob("*.json")))
    raise UserError(f"deepspeed.json={path}: there is no such file. The ones at hand are deepspeed={shipped}.")


def _refuse(ds: dict[str, Any], name: str) -> dict[str, Any]:
    """`ds` itself, if nothing is wrong with it."""
    problems = [*_block_problems(ds, ""), *_ownership_problems(ds), *_zero_problems(ds.get("zero_optimization", {}))]
    if problems:
        raise UserError("\n".join(f"{name}: {problem}" for problem in problems))
    return ds


def _ownership_problems(ds: dict[str, Any]) -> Iterator[str]:
    for key, value in ds.items():
        if key in ELSEWHERE:
            yield f"{key} is decided by {ELSEWHERE[key]}: remove it from the JSON."
        elif key in OWNERS and any(leaf != "auto" for leaf in _leaves(value)):
            yield f'{key} is decided by {OWNERS[key]}: remove it from the JSON, or write "auto".'


def _zero_problems(zero: Any) -> Iterator[str]:
    if not isinstance(zero, dict):
        yield 'zero_optimization is an object such as {"stage": 2}.'
        return
    if zero.get("stage", 0) not in (0, 1, 2, 3) or isinstance(zero.get("stage"), bool):
        yield f"zero_optimization.stage is {json.dumps(zero['stage'])}: the stages are 0, 1, 2 and 3."
    yield from _block_problems(zero, "zero_optimization")
    for block in ("offload_param", "offload_optimizer"):
        offload = zero.get(block, {})
        if not isinstance(offload, dict):
            yield f'zero_optimization.{block} is an object such as {{"device": "cpu"}}.'
            continue
        yield from _block_problems(offload, f"zero_optimization.{block}")
        device = offload.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            yield f'zero_optimization.{block}.device is {json.dumps(device)}: it can be "none", "cpu" or "nvme".'
        if device == "nvme" and "nvme_path" not in offload:
            yield f'zero_optimization.{block}.device is "nvme" without zero_optimization.{block}.nvme_path: add it.'


def _block_problems(block: dict[str, Any], where: str) -> Iterator[str]:
    """Keys that are gone, renamed or unknown (DeepSpeed would ignore some in silence), and values left to "auto"."""
    known = [*KNOWN[where], *(() if where else (*OWNERS, *ELSEWHERE))]
    for key, value in block.items():
        name = f"{where}.{key}" if where else key
        if key in GONE.get(where, ()):
            yield f"{name} is gone from DeepSpeed 0.19.8: remove it."
        elif where and key in RENAMED:
            yield f"{name} is deprecated: write {RENAMED[key]}."
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
            hint = f"Did you mean {near[0]}?" if near else "remove it."
            yield f"{name} is not a key that DeepSpeed 0.19.8 knows and dsft can train with: {hint}"
        elif value == "auto" and key not in (*OWNERS, *ELSEWHERE):
            yield f'{name} is "auto", which nobody here fills in: write a value, or remove it for DeepSpeed\'s default.'


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value.values() for leaf in _leaves(item)] if isinstance(value, dict) else [value]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands twice in one object: keep one of them.")
    return dict(pairs)
