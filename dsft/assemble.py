"""From a config to the objects of a run: data, model, engine, loader, evaluator. No arithmetic here, and no writing.

Commands, tests and benchmarks share this one composition.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from dsft import checkpoint, tasks
from dsft.config import check, cli, effect
from dsft.config.schema import Config, Packing, Precision, Resampling
from dsft.data import audit as audits
from dsft.data import balance, dataset, sources
from dsft.data import prompting as prompts
from dsft.data.blocks import WEIGHTS
from dsft.data.loader import Loader
from dsft.data.pack import Planner
from dsft.ds_config import build as build_ds_config
from dsft.engine import Engine, building
from dsft.errors import UserError
from dsft.evaluate import Evaluator
from dsft.metrics import Metric, Row, comparable, declare
from dsft.model import attention, export, layout, rows, tuning, vocabulary
from dsft.model import load as models
from dsft.model.head import SINGLE, Head
from dsft.model.kind import Inseparable
from dsft.model.noise import Noise
from dsft.model.rehearsal import rehearse
from dsft.model.stopping import Stopping, find_stopping
from dsft.optim import parameter_groups
from dsft.runtime.place import Place
from dsft.runtime.world import World, computes_bf16, computes_fp16
from dsft.tasks import TASKS, Task, isolation, settings_by_task, template, tokenizer_check
from dsft.tasks.collate import Collator
from dsft.tasks.forward import Forward
from dsft.tasks.labels import COLUMN
from dsft.tasks.module import TaskModule
from dsft.tasks.task import Context, Outcome, reader
from dsft.types import Batch

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}

PROBE_TOKENS = 32
"""Tokens of the document by which an exported model is recognised."""

PROBE_BYTES = 16 * 2**20
"""What the logits of that document may take in a checkpoint."""

PROBE_SEARCH = 1000
"""Examples among which one with a new token is looked for."""


@dataclass(frozen=True)
class Model:
    """What is known of the model before it is loaded.

    Attributes:
        source: The base model.
        config: The config of its language model.
        tokenizer: Its tokenizer, with the new tokens.
        words: What is new in it.
        stopping: Where its answers end.
        companions: Files that stand beside an exported model's weights.
    """

    source: models.ModelSource
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerFast
    words: vocabulary.Vocabulary
    stopping: Stopping
    companions: dict[str, bytes]


@dataclass(frozen=True)
class Plan:
    """All that is found out before ranks meet, by each for itself; nothing of it has touched the run directory.

    Attributes:
        task: What is learnt.
        sizes: Batch sizes.
        precision: What `precision=auto` means here.
        ds: The whole DeepSpeed config.
        model: What is known of the model.
        train_set: Training examples.
        validation: Validation examples, or None.
        test: Test examples, or None.
        audit: What became of the records.
        packing: What `data.packing=auto` means here.
        why: Why it means that; None where the setting itself says it.
        planner: Which examples make which step.
        total_steps: When the run is over.
        collator: Makes batches of examples.
    """

    task: Task
    sizes: check.BatchSizes
    precision: Precision
    ds: dict[str, Any]
    model: Model
    train_set: dataset.TokenDataset
    validation: dataset.TokenDataset | None
    test: dataset.TokenDataset | None
    audit: dict[str, Any]
    packing: Packing
    why: str | None
    planner: Planner
    total_steps: int
    collator: Collator

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return DTYPES[self.precision]

    @property
    def metrics(self) -> dict[str, Metric]:
        """All that the run may record."""
        return _metrics(self.task)


def plan(config: Config, place: Place) -> Plan:
    """Everything that needs no other rank; reading and tokenising may take hours, and no process group can time out.

    Raises:
        UserError: A setting, the model or the data cannot be used, and why.
    """
    check.check_task(config.task.name, TASKS)
    task = TASKS[config.task.name]
    sizes = check.resolve_batch(config.batch, place.world_size)
    precision = precision_of(config.precision)
    ds = _ds_config(config, sizes, precision, place)
    given = cli.given()
    warn(place, check.check(config, ds, place.world_size, settings_by_task(), _comparable(config, task), given))
    # a missing file is named before a model is converted
    acts = {name: found.acts for name, found in sources.places(config.data).items()}
    prompting = prompts.load(config.data, config.train.seed, reader(task, config.data))
    new_tokens = vocabulary.read(config.data.new_tokens) if config.data.new_tokens else []
    model_on_hub = models.on_hub(config.model.path)
    idle = effect.by_place(config, model_on_hub=model_on_hub, acts=acts)
    warn(place, effect.enforce(config, idle, given))
    model = _model(config, task, precision, place, new_tokens)
    doubts = tokenizer_check.check(model.tokenizer, model.config, "model.chat_template" in task.settings)
    warn(place, doubts)
    context = Context(model.tokenizer, config.data, config.task, config.eval, config.train, prompting)
    data = _data(config, task, context)
    warn(place, audits.idle_ignores(data.audit, config.data.ignore_fields))
    data = _balanced(config, data)
    model, context = _settled(task, context, data, model)
    packing, why = _layout(config.data.packing, task, model)
    made = Plan(
        task=task,
        sizes=sizes,
        precision=precision,
        ds=ds,
        model=model,
        train_set=data.train,
        validation=data.validation,
        test=data.test,
        audit=data.audit | {"tokenizer": doubts, "example": audits.example_spans(data.train[0], model.tokenizer)},
        why=why,
        collator=Collator(task, context, packing is Packing.padded),
        **_pack(config, sizes, data.train, packing),
    )
    _check_lengths(config, place, made)
    return made


def _balanced(config: Config, data: dataset.Prepared) -> dataset.Prepared:
    """The data with as many training examples of each label, where that is asked for."""
    how = config.data.balance
    if how is Resampling.none:
        return data
    train, about = balance.resampled(data.train, COLUMN, how, config.train.seed)
    audit = data.audit | {"train": data.audit["train"] | {"balance": about}}
    return replace(data, train=train, audit=audit)


def _settled(task: Task, context: Context, data: dataset.Prepared, model: Model) -> tuple[Model, Context]:
    """What only all records together tell, and the head that the model gets by it."""
    if task.settle:
        context = task.settle(context, data, models.own_labels(model.source) if task.kind.headed else [])
    if task.head:
        model = replace(model, source=replace(model.source, head=task.head(context)))
    return model, context


def _layout(packing: Packing, task: Task, model: Model) -> tuple[Packing, str | None]:
    """What `data.packing=auto` means here, as far as the model's class tells, and why."""
    why = layout.why_padded(task.kind, model.config)
    if packing in (Packing.bfd, Packing.none) and why and task.kind.two_sided:
        raise UserError(f"data.packing={packing.value}: {why}. Leave data.packing out, or give data.packing=padded.")
    if packing is not Packing.auto:
        return packing, None
    return (Packing.padded, why) if why else (Packing.bfd, "the model keeps documents apart")


def _metrics(task: Task) -> dict[str, Metric]:
    return declare(task.metrics, task.target)


def _comparable(config: Config, task: Task) -> list[str]:
    """Metrics by which a run can be judged, as far as its settings let them be formed."""
    metrics = _metrics(task)
    needed = {name: metrics[name].needs for name in comparable(metrics)}
    return [name for name, setting in needed.items() if setting is None or attrgetter(setting)(config) != 0]


def _ds_config(config: Config, sizes: check.BatchSizes, precision: Precision, place: Place) -> dict[str, Any]:
    return build_ds_config(
        config.deepspeed.json,
        micro_batch_size=sizes.micro_batch_size,
        gradient_accumulation_steps=sizes.gradient_accumulation_steps,
        world_size=place.world_size,
        precision=precision.value,
        fp16=config.fp16,
        max_grad_norm=config.optim.max_grad_norm,
    )


def _model(config: Config, task: Task, precision: Precision, place: Place, new_tokens: list[str]) -> Model:
    """What is trained, and that it can be written in the end."""
    source = models.resolve(config.model.path, config.model.revision, config.data.cache_dir, task.kind)
    source = replace(source, allow_missing=tuple(config.model.allow_missing))
    tokenizer = models.load_tokenizer(source, config.model.chat_template)
    if task.ready:
        task.ready(tokenizer, config.task)
    if task.kind.headed:
        source = replace(source, head=_provisional(config, tokenizer))
    text_config = models.load_config(source).get_text_config()
    words, idle = _vocabulary(config, text_config, tokenizer, new_tokens)
    warn(place, idle)
    stopping = find_stopping(source, tokenizer, template.turn_end(tokenizer))
    companions = export.companion_files(tokenizer, stopping.generation_config)
    if place.rank == 0 and config.train.export:
        destination = Path(config.run_dir).expanduser() / "model"
        rehearse(source, tokenizer, words, companions, config.tuning, DTYPES[precision], destination)
    return Model(source, text_config, tokenizer, words, stopping, companions)


def _provisional(config: Config, tokenizer: PreTrainedTokenizerFast) -> Head:
    """A head of some labels, by which the export can be played through before the data tell which there are."""
    task = config.task
    names = tuple(task.labels) or ("0", "1")
    return Head(names, SINGLE, 0, task.head_init, task.head_dropout, task.pool, tokenizer.pad_token_id)


def _vocabulary(
    config: Config, text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, new_tokens: list[str]
) -> tuple[vocabulary.Vocabulary, list[str]]:
    """Add the new tokens, and refuse settings that the chosen model cannot bear, before it is loaded.

    Returns:
        What is new in the tokenizer, and warnings of settings that have no effect with it.
    """
    words = vocabulary.extend(tokenizer, new_tokens, text_config.vocab_size)
    lengths = {"data.max_length": config.data.max_length}
    if "data.max_target_length" in TASKS[config.task.name].settings:
        lengths["data.max_target_length"] = config.data.max_target_length
    check.check_model(
        lengths=lengths,
        max_position_embeddings=getattr(text_config, "max_position_embeddings", None),
        embeddings=text_config.vocab_size,
        tokens=words.size,
        resize=config.model.resize_embeddings,
    )
    idle = effect.by_tokens(
        config,
        tokens=words.size,
        embeddings=text_config.vocab_size,
        new=len(words.pieces),
        added=len(words.added),
    )
    return words, effect.enforce(config, idle, cli.given())


def _data(config: Config, task: Task, context: Context) -> dataset.Prepared:
    """What is trained on and what is held out."""
    recipe = {
        "task": _encoded_by(config, task),
        "tokenizer": models.tokenizer_fingerprint(context.tokenizer),
        "chat_template": context.tokenizer.chat_template,
        "max_length": config.data.max_length,
        "max_target_length": config.data.max_target_length,
        "train_on": config.data.train_on.value,
        "on_rewritten_history": config.data.on_rewritten_history.value,
        "reasoning": config.data.reasoning.value,
        "ignore_fields": sorted(config.data.ignore_fields),
        "group_by_field": config.data.group_by_field,
        "stratify_by_field": config.data.stratify_by_field,
        "on_overflow": config.data.on_overflow.value,
        "prompting": context.prompting.recipe(),
        "code": [_tasks_version(), transformers.__version__, tokenizers.__version__],
    }
    encode = partial(tasks.encode, task=task, context=context)
    return dataset.prepare(config.data, encode, recipe, config.train.seed)


def _encoded_by(config: Config, task: Task) -> dict[str, Any]:
    """The task and those of its settings that examples depend on."""
    return {name: _plain(attrgetter(name)(config.task)) for name in ("name", *sorted(task.encoded))}


@cache
def _tasks_version() -> str:
    """Digest of the code that makes examples."""
    return dataset.code_version(map(str, sorted(Path(tasks.__file__).parent.glob("*.py"))))


def _pack(config: Config, sizes: check.BatchSizes, train_set: dataset.TokenDataset, packing: Packing) -> dict[str, Any]:
    """The plan's part about which examples make which step."""
    data = config.data
    planner = Planner(
        train_set.lengths,
        packing,
        data.max_length,
        data.pack_window,
        config.train.seed,
        sizes.global_batch_size,
        train_set.sides,
    )
    total_steps = planner.total_steps(epochs(config), config.train.max_steps)
    return {"packing": packing, "planner": planner, "total_steps": total_steps}


def _check_lengths(config: Config, place: Place, made: Plan) -> None:
    """Refuse what the lengths of records and run show to be wrong or without effect."""
    lengths, validation = made.train_set.lengths, made.validation
    check.check_rotation(
        config,
        switches_after=models.rotation_switch(made.model.config),
        micro_batch_size=made.sizes.micro_batch_size,
        train=lengths.tolist(),
        validation=[length for part in (validation, made.test) if part for length in part.lengths.tolist()],
    )
    length = effect.Length(
        held_out=len(validation or []),
        all_supervised=bool((made.train_set.weights == lengths - 1).all()),
        total_steps=made.total_steps,
        steps_to_decay=made.planner.total_steps(effect.decays_every(config), made.total_steps),
    )
    given = cli.given()
    warn(place, effect.enforce(config, effect.by_length(config, length, given), given))


def engine(config: Config, made: Plan, world: World) -> tuple[Engine, Plan]:
    """The model, prepared for training as the config says, inside its engine; all ranks call it.

    It takes its first forward pass, in which a model is refused that cannot be trained exactly.

    Returns:
        The engine and the plan; with padded rows, where `data.packing=auto` finds that the model does not keep
        documents apart in a flat one.

    Raises:
        UserError: It cannot be loaded, tuned or trained so, or a setting has no effect on it.
    """
    built = None
    try:
        built = _engine(config, made, world)
        built.evaluate(probe(made))
        return built, made
    except Inseparable as problem:
        if config.data.packing is not Packing.auto or made.packing is Packing.padded:
            raise
        why = str(problem).partition(". ")[0]
    if built:
        built.close()
    packed = _pack(config, made.sizes, made.train_set, Packing.padded)
    padded = replace(made, **packed, why=why, collator=replace(made.collator, padded=True))
    _check_lengths(config, world.place, padded)
    built = _engine(config, padded, world)
    built.evaluate(probe(padded))
    return built, padded


def _engine(config: Config, made: Plan, world: World) -> Engine:
    known, dtype, padded = made.model, made.dtype, made.collator.padded
    dropout = attention.has_dropout(known.config)
    kernel = attention.choose_kernel(config.model.attention, world.device, dtype, dropout)
    implementation = layout.implementation(made.task.kind, known.config, padded)
    with building(made.ds) as gather:
        model = load_tuned(config, known.source, known.words, dtype, implementation, gather)
    noise = Noise(model, config.train.seed, config.tuning.neftune_alpha)
    models.activation_checkpointing(model, config.activation_checkpointing, noise.checkpointing)
    tokens = isolation.probe_tokens(map(made.train_set.__getitem__, range(len(made.train_set))))
    alone = padded and {made.sizes.micro_batch_size, config.eval.micro_batch_size} == {1}
    by_document = made.task.kind.by_document

    def loss(forward: Forward, batch: Batch) -> Outcome:
        return made.task.loss(forward, batch, config.task)

    chunk = config.model.logits_chunk
    module = TaskModule(model, loss, kernel, chunk, noise, tokens, padded, alone, by_document)
    built = Engine(module, made.ds, config.optim, world)
    _check_engine(config, made, built)
    return built


def load_tuned(
    config: Config,
    source: models.ModelSource,
    words: vocabulary.Vocabulary,
    dtype: torch.dtype,
    implementation: str,
    gather: Callable[[list[nn.Parameter]], Any],
) -> nn.Module:
    """The base model with the rows of its new tokens and its adapters, as it is trained; arguments as for their own."""
    model = models.load_model(source, dtype, implementation)
    rows.grow(model, words, gather)
    return tuning.apply(model, config.tuning, config.train.seed, words, source.kind)


def _check_engine(config: Config, made: Plan, built: Engine) -> None:
    """Refuse settings that have no effect on this model, or warn of them."""
    idle = effect.by_model(
        config,
        made.model.source.name,
        chunked=built.module.chunked,
        decayed=any(group["weight_decay"] for group in parameter_groups(built.module, config.optim)),
        rows_alone=not made.model.words.pieces or any(n.endswith(rows.NEW) for n, _ in built.module.named_parameters()),
    )
    warn(built.world.place, effect.enforce(config, idle, cli.given()))


def loader(made: Plan, world: World) -> Loader:
    """This rank's batches of each step."""
    data, sizes = made.train_set, made.sizes
    return Loader(
        data,
        data.lengths,
        data.weights,
        made.planner,
        world.rank,
        world.size,
        sizes.micro_batch_size,
        sizes.gradient_accumulation_steps,
        made.collator.train,
    )


def evaluator(config: Config, made: Plan, world: World) -> Evaluator | None:
    """What evaluates the validation set, if there is one."""
    return _evaluator(config, made, world, made.validation, Row.EVALUATION)


def tester(config: Config, made: Plan, world: World) -> Evaluator | None:
    """What evaluates the test set, if there is one."""
    return _evaluator(config, made, world, made.test, Row.TEST)


def _evaluator(
    config: Config, made: Plan, world: World, data: dataset.TokenDataset | None, row: Row
) -> Evaluator | None:
    if data is None:
        return None
    budget = made.sizes.micro_batch_size * config.data.max_length
    stops = made.model.stopping.tokens
    size = config.eval.micro_batch_size
    return Evaluator(data, made.collator, world, made.metrics, size, budget, stops, row)


def probe(made: Plan) -> Batch:
    """A short document of real text, whose logits take at most PROBE_BYTES: around the first new token, if the data
    hold one, else around the first supervised token."""
    data, words = made.train_set, made.model.words
    tokens = max(2, min(PROBE_TOKENS, PROBE_BYTES // (4 * max(words.size, made.model.config.vocab_size))))
    searched = range(min(len(data), PROBE_SEARCH)) if words.pieces else ()
    number = next((n for n in searched if (data[n].ids >= words.first).any()), 0)
    example = data[number]
    supervised = example.columns.get(WEIGHTS, example.ids >= 0) > 0
    new = example.ids >= words.first
    begin = max(0, int((new if words.pieces and new.any() else supervised).argmax()) - tokens // 4)
    ids = torch.from_numpy(example.ids[begin : begin + tokens].astype("int64"))[None]
    return isolation.document(ids, made.collator.padded)


def identity(config: Config, made: Plan) -> dict[str, Any]:
    """What a run is made of and cannot change on its way, by setting; what a difference is blamed on first comes first.

    It is kept in each checkpoint, and names the base model to whoever makes the model of one.
    """
    tuned = {f"tuning.{name}": _plain(value) for name, value in vars(config.tuning).items() if name != "neftune_alpha"}
    source = made.model.source
    return {
        "task.name": config.task.name,
        "train.seed": config.train.seed,
        checkpoint.MODEL: {
            "name": source.name,
            "origin": source.origin,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
            "files": source.files,
        },
        **tuned,
        checkpoint.NEW_TOKENS: [*made.model.words.added],
        **({checkpoint.HEAD: source.head.identity()} if source.head else {}),
        "precision": made.precision.value,
        "optim.name": config.optim.name.value,
        "optim.layer_decay": config.optim.layer_decay,
        "optim.groups": [group.match for group in config.optim.groups],
        checkpoint.DATA: _data_identity(config, made),
    }


def _data_identity(config: Config, made: Plan) -> dict[str, Any]:
    """The training data's key, and what may be blamed where it differs."""
    settings = (
        "source train validation validation_share test test_share group_by_field stratify_by_field split subset "
        "header columns prompt_template few_shot.path few_shot.count packages max_records max_length "
        "max_target_length train_on on_rewritten_history reasoning ignore_fields balance on_bad_record on_overflow"
    ).split()
    encoded = _encoded_by(config, made.task).items()
    task = {f"task.{name}": value for name, value in encoded if name != "name"}
    return {
        "key": made.train_set.key,
        "settings": {f"data.{name}": _plain(attrgetter(name)(config.data)) for name in settings}
        | {"model.chat_template": config.model.chat_template}
        | task,
        "template": hashlib.sha256(repr(made.model.tokenizer.chat_template).encode()).hexdigest(),
    }


def epochs(config: Config) -> int | None:
    """Passes over the data; one where the config limits neither these nor the steps."""
    return 1 if config.train.epochs is None and config.train.max_steps is None else config.train.epochs


def warn(place: Place, warnings: list[str]) -> None:
    """Show what a recipe sets and this run has no use for, on rank 0."""
    for warning in warnings if place.rank == 0 else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def precision_of(wanted: Precision) -> Precision:
    """What a precision means here.

    Raises:
        UserError: The device does not compute in it.
    """
    if wanted is Precision.auto:
        return Precision.bf16 if computes_bf16() else Precision.fp32
    if wanted is Precision.fp16 and not computes_fp16():
        raise UserError("precision=fp16: this CPU has no fp16 arithmetic. Use precision=bf16 or precision=fp32.")
    return wanted


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
