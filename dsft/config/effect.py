"""When each setting acts. One that does nothing where it is given is a misunderstanding, and is not passed over.

What was given on the command line is refused; what a recipe's YAML brings along, perhaps for other runs than this
one, is a warning. Some show from the config alone, some once it is known where model and data are, some only
when the length of the data is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from dsft.config.schema import (
    Config,
    Method,
    Resampling,
    ScheduleConfig,
    ScheduleName,
    Source,
    TrainOn,
    Unit,
    known,
)
from dsft.errors import UserError


@dataclass(frozen=True)
class Idle:
    """A setting that does nothing in this run.

    Attributes:
        name: The setting.
        message: Names it with its value, says why it does nothing, and what to do.
    """

    name: str
    message: str


@dataclass(frozen=True)
class Length:
    """What the data make of a run.

    Attributes:
        held_out: Validation examples.
        all_supervised: Whether every token of the training examples is learnt.
        total_steps: Optimizer steps until the first limit.
        steps_to_decay: Optimizer steps of the first `decays_every` epochs.
    """

    held_out: int
    all_supervised: bool
    total_steps: int
    steps_to_decay: int


def sort_out(config: Config, idle: Iterable[Idle], given: Collection[str] | None) -> tuple[list[str], list[str]]:
    """Messages of what is to be refused, and of what is to be warned of.

    Args:
        config: The whole run.
        idle: What does nothing, whether it was set or not.
        given: Settings, and groups chosen, on the command line; None where the origin of values is unknown: then
            whatever is not as the schema has it counts as given.
    """
    refused, warned = [], []
    default = Config()
    for one in idle:
        value, usual = attrgetter(one.name)(config), attrgetter(one.name)(default)
        if (value == usual and value in (0, None, [], {})) or (one.name in known("off_at_0") and value == 0):
            continue  # switched off, in so many words
        if getattr(value, "name", None) == "auto":
            continue
        if value != usual if given is None else was_given(one.name, given):
            refused.append(one.message)
        elif value != usual:
            warned.append(one.message)
    return list(dict.fromkeys(refused)), list(dict.fromkeys(warned))


def was_given(name: str, given: Collection[str]) -> bool:
    """Whether the command line gave a setting, by its name or by choosing its group."""
    return name in given or (name in known("by_group") and name.partition(".")[0] in given)


def enforce(config: Config, idle: Iterable[Idle], given: Collection[str] | None) -> list[str]:
    """The warnings of `sort_out`.

    Raises:
        UserError: Something is to be refused.
    """
    refused, warned = sort_out(config, idle, given)
    if refused:
        raise UserError("\n".join(refused))
    return warned


def by_choice(config: Config) -> Iterator[Idle]:
    """What does nothing because of what another setting chooses."""
    for name, when in known("acts").items():
        chosen = attrgetter(when.selector)(config)
        if chosen not in when.values:
            why = f"does nothing with {when.selector}={text(chosen)}: choose {when.choose}, or leave {name} out."
            yield Idle(name, f"{shown(config, name)} {why}")


def by_config(config: Config) -> Iterator[Idle]:
    """What does nothing, as far as the config alone can tell."""
    yield from by_choice(config)
    data, train = config.data, config.train
    if data.validation is not None:
        yield Idle(
            "data.validation_share",
            f"{shown(config, 'data.validation_share')} does nothing with data.validation={data.validation}, which is "
            "another way to say the same: leave one of them out.",
        )
    elif data.validation_share == 0:
        why = "data.validation_share=0 without data.validation holds nothing out"
        yield from _without_evaluation(config, why, "a data.validation_share")
    yield from _without_shares(config)
    yield from _of_records(config)
    if not train.early_stopping_patience:
        yield Idle(
            "train.early_stopping_min_delta",
            f"{shown(config, 'train.early_stopping_min_delta')} does nothing with train.early_stopping_patience=0: set "
            "the patience, or leave the other out.",
        )
    if not train.samples:
        yield Idle(
            "train.sample_tokens",
            f"{shown(config, 'train.sample_tokens')} does nothing with train.samples=0: raise the latter, or leave the "
            "other out.",
        )
    if _warms_up_beyond(config, train.max_steps):
        yield _long_warmup(config, f"train.max_steps={train.max_steps}")
    if train.eval_every == 0:
        for name in _watching(config):
            yield Idle(
                name,
                f"{shown(config, name)} watches evaluations, and train.eval_every=0 has none along the way: raise it.",
            )


def _of_records(config: Config) -> Iterator[Idle]:
    """Settings of how records are chosen, where others leave them nothing to do."""
    data = config.data
    if data.balance is not Resampling.none:
        yield Idle(
            "task.balance",
            f"{shown(config, 'task.balance')} does nothing with data.balance={data.balance.value}, after which every "
            "label has as many records: leave one of them out.",
        )
    for name in ("stride", "pool") if config.task.chunk.length is None else ():
        yield Idle(
            f"task.chunk.{name}",
            f"{shown(config, f'task.chunk.{name}')} does nothing without task.chunk.length: give that too.",
        )
    if config.task.chunk.length is not None:
        yield Idle(
            "data.on_overflow",
            f"{shown(config, 'data.on_overflow')} does nothing with task.chunk.length={config.task.chunk.length}, by "
            "which no text is too long: leave one of them out.",
        )
    if not data.few_shot.path:
        yield Idle(
            "data.few_shot.count",
            f"{shown(config, 'data.few_shot.count')} does nothing without data.few_shot.path: give a file of examples, "
            "or leave it out.",
        )


def _without_shares(config: Config) -> Iterator[Idle]:
    """Settings of what is held out of the training records, where that is nothing."""
    data = config.data
    if data.test is not None:
        yield Idle(
            "data.test_share",
            f"{shown(config, 'data.test_share')} does nothing with data.test={data.test}, which is another way to say "
            "the same: leave one of them out.",
        )
    shares = (data.validation is None and data.validation_share) or (data.test is None and data.test_share)
    for name in () if shares else ("data.group_by_field", "data.stratify_by_field"):
        yield Idle(
            name,
            f"{shown(config, name)} does nothing where no record is held out: give data.validation_share or "
            f"data.test_share, or leave {name} out.",
        )


def by_task(config: Config, tasks: Mapping[str, Collection[str]]) -> Iterator[Idle]:
    """What the chosen task does not read.

    Args:
        config: The whole run.
        tasks: Name of each task -> which of the settings that not every task reads it reads.
    """
    for name in sorted(known("of_some_tasks").keys() - {*tasks[config.task.name]}):
        others = "|".join(task for task, read in tasks.items() if name in read)
        yield Idle(
            name,
            f"{shown(config, name)} does nothing with task={config.task.name}: choose task={others}, or leave {name} "
            "out.",
        )


def by_place(config: Config, *, model_on_hub: bool, acts: Mapping[str, Collection[str]]) -> Iterator[Idle]:
    """What does nothing where model and data are.

    Args:
        config: The whole run.
        model_on_hub: Whether the model is there.
        acts: `data.train` and `data.validation`, as far as files or hub ids -> what of `split`, `subset` and `header`
            has a meaning there.
    """
    if not model_on_hub:
        yield Idle(
            "model.revision",
            f"{shown(config, 'model.revision')} does nothing with model.path={config.model.path}, which is no hub id "
            "but lies here: give that revision's directory as model.path, or leave model.revision out.",
        )
    given = {
        "data.train": f"data={config.data.source.value}",
        "data.validation": "data.validation=null",
        "data.test": "data.test=null",
    }
    given |= {name: f"{name}={value}" for name, value in sources(config).items()}
    read = [words for name, words in given.items() if name != "data.test" or config.data.test]
    for name, place in (
        ("data.split", "data.train"),
        ("data.validation_split", "data.validation"),
        ("data.test_split", "data.test"),
    ):
        if "split" not in acts.get(place, ()):
            yield Idle(
                name,
                f"{shown(config, name)} does nothing with {given[place]}, which is no hub id, and no directory with "
                f"files whose names say a split: give the split's own file as {place}, or leave {name} out.",
            )
    for name, need in (("subset", "hub id or directory with subsets"), ("header", "CSV or TSV file")):
        if not any(name in parts for parts in acts.values()):
            yield Idle(
                f"data.{name}",
                f"{shown(config, f'data.{name}')} does nothing with {' and '.join(read)}: there is no "
                f"{need}. Leave data.{name} out.",
            )


def by_tokens(config: Config, *, tokens: int, embeddings: int, new: int, added: int) -> Iterator[Idle]:
    """What does nothing with this tokenizer.

    Args:
        config: The whole run.
        tokens: The largest id that the tokenizer can give, and one.
        embeddings: Rows of the model's input embedding.
        new: How many of its tokens the model was not trained with.
        added: How many of these `data.new_tokens` has added.
    """
    if not added:
        yield Idle(
            "data.new_tokens",
            f"{shown(config, 'data.new_tokens')} does nothing: all that it names are tokens of the model's vocabulary "
            "already. Leave it out.",
        )
    if tokens <= embeddings:
        yield Idle(
            "model.resize_embeddings",
            f"{shown(config, 'model.resize_embeddings')} does nothing: each of the {tokens} tokens has one of the "
            f"model's {embeddings} embeddings. Leave it out.",
        )
    if not new:
        yield Idle(
            "tuning.new_tokens",
            f"{shown(config, 'tuning.new_tokens')} does nothing: there are no new tokens. Name some with "
            "data.new_tokens=FILE, or leave it out.",
        )


def by_length(config: Config, length: Length, given: Collection[str] | None) -> Iterator[Idle]:
    """What does nothing with these records, in a run of this length."""
    train, steps = config.train, length.total_steps
    run = f"the {steps} steps of this run" if steps > 1 else "the only step of this run"
    if not length.held_out and config.data.validation is None and config.data.validation_share > 0:
        why = "nothing is held out, for there is only one record"
        yield from _without_evaluation(config, why, "more records")
        yield Idle(
            "data.validation_share",
            f"{shown(config, 'data.validation_share')} does nothing: {why}. Give data.validation=FILE, more records, "
            "or data.validation_share=0.",
        )
    elif length.held_out and train.eval_every:
        yield from _too_few_evaluations(config, (steps - 1) // train.eval_every, run)
    if length.all_supervised and config.data.train_on is not TrainOn.all:
        for name in ("data.train_on", "data.on_rewritten_history", "data.reasoning"):
            yield Idle(
                name,
                f"{shown(config, name)} does nothing with these records: every token of them is learnt, as of plain "
                f"texts (field `text`). Give chats, or leave {name} out.",
            )
    if _warms_up_beyond(config, steps) and not _warms_up_beyond(config, train.max_steps):
        yield _long_warmup(config, run)
    yield from _no_decay(config, length, run)
    yield from _too_many_restarts(config, steps, run)
    if given is not None and train.epochs is not None and train.max_steps is not None:
        yield from _other_limit(config, steps, given)


def by_model(config: Config, model: str, *, chunked: bool, decayed: bool, rows_alone: bool) -> Iterator[Idle]:
    """What does nothing with this model and what of it is trained.

    Args:
        config: The whole run.
        model: Its name.
        chunked: Whether its logits can be computed chunk by chunk.
        decayed: Whether weight decay applies to any of its trained parameters.
        rows_alone: Whether rows of new tokens, if there are any, are trained beside a frozen embedding or head.
    """
    if not chunked:
        yield Idle(
            "model.logits_chunk",
            f"{shown(config, 'model.logits_chunk')} does nothing with {model}, whose output head is more than a "
            "linear map, so that all logits exist at once: lower batch.micro_batch_size to save memory, and leave "
            "model.logits_chunk out.",
        )
    if not rows_alone and config.tuning.method is not Method.full:
        yield Idle(
            "tuning.new_tokens",
            f"{shown(config, 'tuning.new_tokens')} does nothing: tuning.trainable or tuning.last_layers trains all "
            "rows of the embedding and of the output head. Leave tuning.new_tokens out.",
        )
    if not decayed:
        yield Idle(
            "optim.weight_decay",
            f"{shown(config, 'optim.weight_decay')} does nothing where only norms, biases and embeddings are trained, "
            "which are never decayed: train more (tuning.*), or leave optim.weight_decay out.",
        )


def decays_every(config: Config) -> int:
    """Steps or epochs (`schedule.unit`) from one decay of a step or exponential schedule to the next."""
    return config.schedule.step_size if config.schedule.name is ScheduleName.step else 1


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of the warm-up in a run of `total_steps`."""
    return schedule.warmup_steps or math.ceil(schedule.warmup_ratio * total_steps)


def sources(config: Config) -> dict[str, str]:
    """Where records are read from, by setting; neither path nor hub id stands for `data=pydoc`."""
    data = config.data
    specs = {"data.train": data.train if data.source is Source.files else None}
    specs |= {"data.validation": data.validation, "data.test": data.test}
    return {name: spec for name, spec in specs.items() if spec is not None}


def shown(config: Config, name: str) -> str:
    """A setting and its value, as written on the command line."""
    return f"{name}={text(attrgetter(name)(config))}"


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {text(one)}" for key, one in value.items()) + "}"
    return value.name if isinstance(value, Enum) else str(value)


def _without_evaluation(config: Config, why: str, remedy: str) -> Iterator[Idle]:
    plateau = config.schedule.name is ScheduleName.plateau
    for name in known("evaluated"):
        if plateau or not name.startswith("schedule."):
            yield Idle(
                name,
                f"{shown(config, name)} acts on evaluations, and {why}: give data.validation=FILE or "
                f"{remedy}, or leave {name} out.",
            )


def _watching(config: Config) -> list[str]:
    """Settings that wait for one evaluation after the other."""
    plateau = ["schedule.name"] if config.schedule.name is ScheduleName.plateau else []
    return plateau + (["train.early_stopping_patience"] if config.train.early_stopping_patience else [])


def _too_few_evaluations(config: Config, evaluations: int, run: str) -> Iterator[Idle]:
    """The first evaluation sets the mark; a plateau acts one later than early stopping."""
    waits = {
        "schedule.name": config.schedule.patience + 2,
        "train.early_stopping_patience": config.train.early_stopping_patience + 1,
    }
    for name in _watching(config):
        if evaluations < waits[name]:
            yield Idle(
                name,
                f"{shown(config, name)} can act at evaluation {waits[name]} at the earliest, and {run} have "
                f"{evaluations} before the end with train.eval_every={config.train.eval_every}: evaluate more often, "
                "train for longer, or lower the patience.",
            )


def _no_decay(config: Config, length: Length, run: str) -> Iterator[Idle]:
    schedule = config.schedule
    if schedule.name not in (ScheduleName.step, ScheduleName.exponential):
        return
    every, warmup = decays_every(config), warmup_steps(schedule, length.total_steps)
    if (length.steps_to_decay if schedule.unit is Unit.epochs else warmup + every) >= length.total_steps:
        after = f" after a warm-up of {warmup} steps" if warmup else ""
        size = " with a fitting schedule.step_size" if schedule.name is ScheduleName.step else ""
        yield Idle(
            "schedule.name",
            f"{shown(config, 'schedule.name')} does nothing in {run}, for its first decay would come after them: "
            f"one is due every {every} {schedule.unit.name}{after}. Choose schedule.unit=steps{size}, "
            "train for longer, or choose schedule=constant.",
        )


def _too_many_restarts(config: Config, steps: int, run: str) -> Iterator[Idle]:
    """A fall of one step is at its peak all the time."""
    schedule = config.schedule
    falls, warmup = schedule.restarts + 1, warmup_steps(schedule, steps)
    if schedule.name is ScheduleName.cosine and schedule.restarts and falls >= steps - warmup:
        after = f" after a warm-up of {warmup}" if warmup else ""
        yield Idle(
            "schedule.restarts",
            f"{shown(config, 'schedule.restarts')} leaves each of the {falls} falls at most one of {run}{after}, "
            "so that the rate stays at its peak. Lower it or train for longer.",
        )


def _other_limit(config: Config, steps: int, given: Collection[str]) -> Iterator[Idle]:
    """A limit in steps or epochs that another one, which nobody asked for now, forestalls."""
    limits = ["train.epochs", "train.max_steps"]
    first = limits[steps == config.train.max_steps]
    (late,) = {*limits} - {first}
    if not was_given(first, given):
        yield Idle(
            late,
            f"{shown(config, late)} does nothing: {shown(config, first)}, which the recipe sets, ends the run first, "
            f"after {steps} steps. Add {first}=null, or leave {late} out.",
        )


def _warms_up_beyond(config: Config, steps: int | None) -> bool:
    return steps is not None and config.schedule.warmup_steps > steps


def _long_warmup(config: Config, run: str) -> Idle:
    return Idle(
        "schedule.warmup_steps",
        f"{shown(config, 'schedule.warmup_steps')} is longer than {run}: the rate would never reach its peak. Lower "
        "the first or train for longer.",
    )
