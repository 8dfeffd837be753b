"""Settings that must agree with each other: every rule is small, and all that fail are reported together."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from dsft.config import effect
from dsft.config.schema import (
    BatchConfig,
    Config,
    Method,
    OptimName,
    Packing,
    ScheduleConfig,
    Source,
    TrainConfig,
    TrainOn,
    is_text,
    is_text_list,
    is_text_map,
    is_text_or_null,
    knobs,
    known,
)
from dsft.config.zero import offloads_optimizer, offloads_parameters, stage
from dsft.errors import UserError

DEFAULT_MICRO_BATCH_SIZE = 4


@dataclass(frozen=True)
class BatchSizes:
    """Rows per forward pass of one rank, forward passes per optimizer step, and rows per optimizer step."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int


def check(
    config: Config,
    ds: dict[str, Any],
    world_size: int,
    tasks: Mapping[str, Collection[str]],
    metrics: Collection[str],
    given: Collection[str] | None = None,
) -> list[str]:
    """Refuse settings that contradict each other, or that have no effect where they are given.

    Args:
        config: The whole run.
        ds: What the DeepSpeed JSON holds.
        world_size: Data-parallel ranks.
        tasks: Name of each task -> settings that it reads and some others do not.
        metrics: Those of an evaluation by which one value is better than another.
        given: Settings and groups on the command line; None counts whatever differs from the schema as given.

    Returns:
        Warnings: settings of a recipe that have no effect.

    Raises:
        UserError: Listing everything that is wrong, each with the settings concerned and how to fix it.
    """
    idle, warnings = effect.sort_out(config, [*effect.by_task(config, tasks), *effect.by_config(config)], given)
    problems = [
        *idle,
        *_ranges(config),
        *_empty(config),
        *_data(config),
        *_chunks(config),
        *_tuning(config, "task.head_init" in tasks[config.task.name]),
        *_groups(config),
        *_warmup(config.schedule),
        *_metric_names(config, metrics),
        *_zero(config, ds),
        *_resume(config.train),
        *_batch(config.batch, world_size),
    ]
    if problems:
        raise UserError("\n".join(problems))
    return warnings


def check_task(name: str, tasks: Collection[str]) -> None:
    """Refuse a task that there is not.

    Raises:
        UserError: With the nearest there is.
    """
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=1, cutoff=0.4)
        hint = f"Did you mean task={near[0]}?" if near else f"There are {', '.join(tasks)}."
        raise UserError(f"task.name={name}: there is no such task. {hint}")


def check_model(
    *,
    lengths: Mapping[str, int],
    max_position_embeddings: int | None,
    embeddings: int,
    tokens: int,
    resize: bool,
) -> None:
    """What can be checked only once the model's own config and its tokenizer are known.

    Args:
        lengths: Setting -> tokens of the longest text that it allows.
        max_position_embeddings: Positions that the model was built for; None where it has no such limit.
        embeddings: Rows of the input embedding.
        tokens: The largest id that the tokenizer can give, and one.
        resize: `model.resize_embeddings`.

    Raises:
        UserError: If a row could be longer than the model's positions, or a token have no embedding.
    """
    for name, length in lengths.items():
        if max_position_embeddings is not None and length > max_position_embeddings:
            raise UserError(
                f"{name}={length} is longer than the {max_position_embeddings} positions of the model in model.path: "
                f"give {name}={max_position_embeddings} or less, or another model."
            )
    if tokens > embeddings and not resize:
        raise UserError(
            f"the tokenizer has {tokens} tokens, but the model in model.path has {embeddings} embeddings. Set "
            f"model.resize_embeddings=true to give the {tokens - embeddings} without one the mean of their pieces; or, "
            "where the two do not belong together, give a model.path that holds the model's own tokenizer."
        )


def check_rotation(
    config: Config, *, switches_after: int | None, micro_batch_size: int, train: list[int], validation: list[int]
) -> None:
    """Refuse rows in which a long document would change how the positions of the others are encoded.

    Args:
        config: All settings.
        switches_after: `model.load.rotation_switch`.
        micro_batch_size: Rows of a micro-batch.
        train: Tokens of each training example.
        validation: Tokens of each validation example.

    Raises:
        UserError: Documents of both kinds could share a forward pass.
    """
    alone = config.data.packing is Packing.none and micro_batch_size == 1
    shared = ([] if alone else [train]) + ([] if config.eval.micro_batch_size == 1 else [validation])
    if switches_after is not None and any(min(part) <= switches_after < max(part) for part in shared if part):
        raise UserError(
            f"data.max_length={config.data.max_length}: the model in model.path encodes positions in another way where "
            f"a row has a document of more than {switches_after} tokens (rope_type=longrope), so that documents would "
            f"change each other. Give data.max_length={switches_after} or less, or let every document stand alone: "
            "data.packing=none batch.micro_batch_size=1 eval.micro_batch_size=1."
        )


def resolve_batch(batch: BatchConfig, world_size: int) -> BatchSizes:
    """All three batch sizes from those given, with global = micro x accumulation x ranks.

    Any two give the third. A micro-batch size alone is not accumulated; a global size alone is cut into the largest
    micro-batches up to 4; nothing at all means micro-batches of 4.

    Raises:
        UserError: If the sizes disagree, or do not divide; then with the nearest global sizes that do.
    """
    micro, steps, total = batch.micro_batch_size, batch.gradient_accumulation_steps, batch.global_batch_size
    for name in ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size"):
        if getattr(batch, name) is not None and getattr(batch, name) < 1:
            raise UserError(f"batch.{name}={getattr(batch, name)} must be at least 1.")
    if total is None:
        micro, steps = micro or DEFAULT_MICRO_BATCH_SIZE, steps or 1
        return BatchSizes(micro, steps, micro * steps * world_size)

    unit = (micro or 1) * (steps or 1) * world_size
    factors = {f"batch.micro_batch_size={micro}": micro, f"batch.gradient_accumulation_steps={steps}": steps}
    given = [name for name, value in factors.items() if value is not None]
    if len(given) == 2 and total != unit:
        raise UserError(
            f"{' x '.join(given)} x {world_size} ranks is {unit}, not batch.global_batch_size={total}: leave one of "
            "the three out (KEY=null takes away what a recipe set)."
        )
    if total % unit:
        near = [size for size in (total // unit * unit, (total // unit + 1) * unit) if size]
        raise UserError(
            f"batch.global_batch_size={total} does not divide by {' x '.join([*given, f'{world_size} ranks'])}: "
            f"the nearest sizes that do are {' and '.join(map(str, near))}."
        )
    share = total // unit
    if micro is None and steps is None:
        micro = next(size for size in range(DEFAULT_MICRO_BATCH_SIZE, 0, -1) if share % size == 0)
        steps = share // micro
    return BatchSizes(micro or share, steps or share, total)


def _ranges(config: Config) -> Iterator[str]:
    for name, numbers in known("range").items():
        value = attrgetter(name)(config)
        if value is not None and not (math.isfinite(value) and numbers.holds(value)):
            yield f"{name}={value} must be {numbers.words}."
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas={betas} must be two numbers, each at least 0 and less than 1."


def _empty(config: Config) -> Iterator[str]:
    """Text is never empty: an empty path, for one, would be the working directory."""
    for name, hint in knobs().items():
        value = attrgetter(name)(config)
        if is_text(hint) and value is not None and not value.strip():
            null = ", or null" if is_text_or_null(hint) else ""
            yield f"{name}={value} is empty: give a value{null}, or leave {name} out."
        elif is_text_list(hint) and not all(text.strip() for text in value):
            yield f"{name}={effect.text(value)} holds an empty text: take it out."
        elif is_text_map(hint) and not all(text.strip() for text in [*value, *value.values()]):
            yield f"{name}={effect.text(value)} holds an empty name: take it out."


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.source is Source.files and data.train is None:
        yield "data.source=files without data.train: add data.train=FILE, or choose data=pydoc."
    share = data.validation_share + data.test_share
    if share >= 1 and 0 < data.test_share < 1:
        yield (
            f"data.validation_share={data.validation_share:g} and data.test_share={data.test_share:g} are {share:g} "
            "together, which leaves nothing to train on: lower them."
        )
    if data.few_shot.path is not None and data.train_on is TrainOn.all:
        yield (
            f"data.few_shot.path={data.few_shot.path} with data.train_on=all: examples are read and not learnt, so not "
            "all tokens can be. Choose another data.train_on, or leave the examples out."
        )


def _chunks(config: Config) -> Iterator[str]:
    chunk, room = config.task.chunk, config.data.max_length
    if chunk.length is not None and chunk.length > room:
        yield f"task.chunk.length={chunk.length} is longer than data.max_length={room}: lower it, or raise the latter."
    if chunk.length is not None and chunk.stride is not None and chunk.stride > chunk.length:
        yield (
            f"task.chunk.stride={chunk.stride} is longer than task.chunk.length={chunk.length}, so that tokens between "
            "chunks would not be read: lower it."
        )


def _tuning(config: Config, headed: bool) -> Iterator[str]:
    """With a head of its own a model has always something to train."""
    tuning = config.tuning
    chosen = tuning.trainable or tuning.last_layers is not None or tuning.new_tokens or headed
    if tuning.method is Method.freeze and not chosen:
        yield (
            "tuning.method=freeze without tuning.last_layers, tuning.trainable or tuning.new_tokens would train "
            "nothing: add tuning.last_layers=N, tuning.trainable=[REGULAR_EXPRESSION] or tuning.new_tokens=true."
        )
    if tuning.method is Method.lora and not tuning.target_modules:
        yield "tuning.method=lora with tuning.target_modules=[] would train nothing: name modules, or [all-linear]."
    for name, patterns in (("tuning.trainable", tuning.trainable), ("model.allow_missing", config.model.allow_missing)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{name} has {pattern!r}, which is no regular expression: {error}."


def _groups(config: Config) -> Iterator[str]:
    for number, group in enumerate(config.optim.groups):
        name = f"optim.groups[{number}]"
        if not group.match:
            yield f"{name} names no parameters: give it match=REGULAR_EXPRESSION."
        try:
            re.compile(group.match)
        except re.error as error:
            yield f"{name}.match={group.match!r} is no regular expression: {error}."
        if group.lr is None and group.weight_decay is None:
            yield f"{name} changes nothing: give it an lr or a weight_decay, or leave it out."
        if group.lr is not None and not 0 <= group.lr < math.inf:
            yield f"{name}.lr={group.lr} is a rate, 0 or more."
        if group.weight_decay is not None and not 0 <= group.weight_decay < math.inf:
            yield f"{name}.weight_decay={group.weight_decay} is 0 or more."


def _warmup(schedule: ScheduleConfig) -> Iterator[str]:
    steps, ratio = schedule.warmup_steps, schedule.warmup_ratio
    if steps and ratio:
        yield (
            f"schedule.warmup_steps={steps} and schedule.warmup_ratio={ratio} both set the warm-up: set one of them "
            "to 0."
        )


def _metric_names(config: Config, names: Collection[str]) -> Iterator[str]:
    for knob in ("train.best_metric", "schedule.metric"):
        name = attrgetter(knob)(config)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
            yield f"{knob}={name} is no metric of an evaluation that gets better or worse: {hint}"


def _zero(config: Config, ds: dict[str, Any]) -> Iterator[str]:
    json, now = config.deepspeed.json, stage(ds)
    if offloads_parameters(ds) and now != 3:
        yield (
            f"{json}: zero_optimization.offload_param needs zero_optimization.stage 3, not {now}: choose "
            "deepspeed=zero3_offload, or remove the block."
        )
    if offloads_optimizer(ds) and now == 0:
        yield (
            f"{json}: zero_optimization.offload_optimizer needs zero_optimization.stage 1, 2 or 3, not 0: choose "
            "deepspeed=zero2_offload, or remove the block."
        )
    if config.optim.name is OptimName.muon and config.optim.max_grad_norm > 0:
        yield (
            f"optim.name=muon with optim.max_grad_norm={config.optim.max_grad_norm}: DeepSpeed clips Muon's gradient "
            "before orthogonalising it or after, depending on the ZeRO stage. Set optim.max_grad_norm=0."
        )
    if config.optim.name is OptimName.muon and now == 3 and ds["zero_optimization"].get("reduce_scatter", True):
        yield (
            f"optim.name=muon needs whole gradients, and {json} scatters them (zero_optimization.reduce_scatter): "
            'choose deepspeed=zero2, or a JSON with "reduce_scatter": false.'
        )


def _resume(train: TrainConfig) -> Iterator[str]:
    if train.resume not in ("auto", "never") and not Path(train.resume).expanduser().is_dir():
        yield (
            f"train.resume={train.resume} is neither auto nor never, and there is no such checkpoint directory: "
            "give one, such as runs/NAME/checkpoints/step-000020."
        )


def _batch(batch: BatchConfig, world_size: int) -> Iterator[str]:
    try:
        resolve_batch(batch, world_size)
    except UserError as error:
        yield str(error)
