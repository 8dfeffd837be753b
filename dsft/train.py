"""Composition root: from a config to the objects of a run, and into the loop. No arithmetic here."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from dsft import __version__, checkpoint, loop
from dsft.config import check, cli, effect, load
from dsft.config.schema import Config, Method, Precision
from dsft.config.zero import stage
from dsft.data import audit as audits
from dsft.data import dataset, render, sources
from dsft.data.batch import collate
from dsft.data.encode import encoder
from dsft.data.loader import Loader
from dsft.data.pack import Planner
from dsft.ds_config import build as build_ds_config
from dsft.engine import Engine, building
from dsft.errors import UserError
from dsft.evaluate import Evaluator
from dsft.metrics import METRICS
from dsft.model import attention, export, rows, tuning, vocabulary
from dsft.model import load as models
from dsft.model.noise import Noise
from dsft.model.rehearsal import rehearse
from dsft.model.stopping import Stopping, find_stopping
from dsft.optim import Schedule, parameter_groups
from dsft.runtime.files import write_json, write_text
from dsft.runtime.locks import hold
from dsft.runtime.place import Place
from dsft.runtime.seeds import seed_everything
from dsft.runtime.signals import REQUEUE_CODE, StopRequest, exit_when_terminated
from dsft.runtime.world import World, computes_bf16, computes_fp16, describe, join, leave
from dsft.tasks.causal_lm import CausalLM, probe_tokens
from dsft.tracking import NullTracker, Progress, Tracker, WandbSink
from dsft.tracking.report import summary, write_report
from dsft.types import Batch, Example, Probe

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
PROBE_TOKENS = 32
"""Tokens of the document by which an exported model is recognised."""

PROBE_BYTES = 16 * 2**20
"""What the logits of that document may take in a checkpoint."""

PROBE_SEARCH = 1000
"""Examples among which one with a new token is looked for."""

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "tokenizers")


@dataclass(frozen=True)
class Plan:
    """All that is found out before ranks meet, by each for itself; nothing of it has touched the run directory.

    Attributes:
        sizes: Batch sizes.
        precision: What `precision=auto` means here.
        ds: The whole DeepSpeed config.
        source: The base model.
        text_config: The config of its language model.
        tokenizer: Its tokenizer, with the new tokens.
        words: What is new in it.
        stopping: Where its answers end.
        companions: Files that stand beside an exported model's weights.
        train_set: Training examples.
        validation: Validation examples, or None.
        audit: What became of the records.
        planner: Which examples make which step.
        total_steps: When the run is over.
    """

    sizes: Any
    precision: Precision
    ds: dict[str, Any]
    source: models.ModelSource
    text_config: Any
    tokenizer: Any
    words: vocabulary.Vocabulary
    stopping: Stopping
    companions: dict[str, bytes]
    train_set: dataset.TokenDataset
    validation: dataset.TokenDataset | None
    audit: dict[str, Any]
    planner: Planner
    total_steps: int


def run(config: Config, place: Place) -> int:
    """Fine-tune as `config` says.

    Args:
        config: All settings.
        place: Where this process stands among the ranks.

    Returns:
        Exit code: 0 when the run is finished, REQUEUE_CODE when it was asked to stop and can go on.

    Raises:
        UserError: Something that a person can mend. Before the run is accepted, nothing in its directory has changed.
    """
    exit_when_terminated()
    with hold(Path(config.run_dir).expanduser()) if place.rank == 0 else nullcontext():
        try:
            return _run(config, place)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk is full: {problem.filename or config.run_dir}. Make room, and the same command goes on "
                "from the last checkpoint."
            ) from problem


def _run(config: Config, place: Place) -> int:
    """Build everything, decide whether the run is accepted, and only then write."""
    plan = _plan(config, place)
    stop = StopRequest()
    world = join(place)
    # decided by rank 0 alone: hosts may stand in different working directories
    run_dir = Path(world.broadcast(str(Path(config.run_dir).expanduser().absolute())))
    identity = _identity(config, plan)
    resume_from, saved = _choose(config, plan, run_dir, identity, world)
    seed_everything(config.train.seed, config.train.deterministic)
    engine = _engine(config, plan, world)
    _check_engine(config, plan, engine)
    tracker = _tracker(config, run_dir, world, plan.total_steps, saved)
    the_loop = _loop(config, plan, engine, world, stop, tracker, run_dir, identity)
    if resume_from:
        tuning.check_adapters(engine.module.model, saved["adapters"])
        the_loop.resume(resume_from, identity)
    # the first forward pass, in which the task refuses a model that it cannot train exactly
    engine.evaluate(the_loop.probe)
    _begin(config, plan, the_loop, resume_from, saved)
    signal = the_loop.run()
    if signal is None and config.train.export:
        _export(plan, the_loop)
    code = _conclude(run_dir, signal, world, tracker)
    leave()
    return code


def _plan(config: Config, place: Place) -> Plan:
    """Everything that needs no other rank; reading and tokenising may take hours, and no process group can time out."""
    sizes = check.resolve_batch(config.batch, place.world_size)
    precision = _precision(config.precision)
    ds = build_ds_config(
        config.deepspeed.json,
        micro_batch_size=sizes.micro_batch_size,
        gradient_accumulation_steps=sizes.gradient_accumulation_steps,
        world_size=place.world_size,
        precision=precision.value,
        fp16=config.fp16,
        max_grad_norm=config.optim.max_grad_norm,
    )
    given = cli.given()
    _warn(place, check.check(config, ds, place.world_size, METRICS, given))
    # a missing file is told before a model is converted
    data_on_hub = None in [sources.files(spec) for spec in effect.sources(config).values()]
    new_tokens = vocabulary.read(config.data.new_tokens) if config.data.new_tokens else []
    model_on_hub = models.on_hub(config.model.path)
    idle = effect.by_place(config, model_on_hub=model_on_hub, data_on_hub=data_on_hub)
    _warn(place, effect.enforce(config, idle, given))
    model = _plan_model(config, precision, place, new_tokens)
    tokenizer = model["tokenizer"]
    encode, recipe = encoder(config.data, tokenizer, models.tokenizer_fingerprint(tokenizer))
    train_set, validation, audit = dataset.prepare(config.data, encode, recipe, config.train.seed)
    planner = Planner(
        train_set.lengths,
        config.data.packing,
        config.data.max_length,
        config.data.pack_window,
        config.train.seed,
        sizes.global_batch_size,
    )
    audit |= {"example": audits.example_spans(train_set[0], tokenizer), "packing": planner.describe()}
    total_steps = planner.total_steps(_epochs(config), config.train.max_steps)
    data = {"train_set": train_set, "validation": validation, "audit": audit, "planner": planner}
    plan = Plan(sizes=sizes, precision=precision, ds=ds, total_steps=total_steps, **model, **data)
    _check_lengths(config, place, plan)
    return plan


def _check_lengths(config: Config, place: Place, plan: Plan) -> None:
    """Refuse what the lengths of records and run show to be wrong or without effect."""
    lengths, validation = plan.train_set.lengths, plan.validation
    check.check_rotation(
        config,
        switches_after=models.rotation_switch(plan.text_config),
        micro_batch_size=plan.sizes.micro_batch_size,
        train=lengths.tolist(),
        validation=validation.lengths.tolist() if validation else [],
    )
    length = effect.Length(
        held_out=len(validation or []),
        all_supervised=bool((plan.train_set.weights == lengths - 1).all()),
        total_steps=plan.total_steps,
        steps_to_decay=plan.planner.total_steps(effect.decays_every(config), plan.total_steps),
    )
    given = cli.given()
    _warn(place, effect.enforce(config, effect.by_length(config, length, given), given))


def _plan_model(config: Config, precision: Precision, place: Place, new_tokens: list[str]) -> dict[str, Any]:
    """The plan's part about the model: what is trained, and that it can be written in the end."""
    source = models.resolve(config.model.path, config.model.revision, config.data.cache_dir)
    tokenizer = models.load_tokenizer(source, config.model.chat_template)
    text_config = models.load_config(source).get_text_config()
    words, idle = _prepare_vocabulary(config, text_config, tokenizer, new_tokens)
    _warn(place, idle)
    stopping = find_stopping(source, tokenizer, render.turn_end(tokenizer))
    companions = export.companion_files(tokenizer, stopping.generation_config)
    if place.rank == 0 and config.train.export:
        destination = Path(config.run_dir).expanduser() / "model"
        rehearse(source, tokenizer, words, companions, config.tuning, DTYPES[precision], destination)
    return {
        "source": source,
        "text_config": text_config,
        "tokenizer": tokenizer,
        "words": words,
        "stopping": stopping,
        "companions": companions,
    }


def _choose(
    config: Config, plan: Plan, run_dir: Path, identity: dict[str, Any], world: World
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its state, if there is one, and all ranks and the checkpoint agree to it."""
    for what, value in {
        "data.new_tokens": plan.words.identity,
        "the training data (data.*)": plan.train_set.key,
        "the validation data (data.*)": plan.validation.key if plan.validation else "none",
        "the model (model.path)": plan.source.fingerprint,
        "precision": plan.precision.value,
    }.items():
        world.agree(what, value)

    def choose() -> tuple[Path | None, dict[str, Any]]:
        path = checkpoint.choose(run_dir, config.train.resume)
        state = checkpoint.read_state(path) if path else {}
        if path:
            checkpoint.compare(path, state, identity, world.size, stage(plan.ds))
        return path, state

    return world.from_main(choose)


def _loop(config, plan: Plan, engine: Engine, world: World, stop, tracker, run_dir: Path, identity) -> loop.Loop:
    data, sizes = plan.train_set, plan.sizes
    loader = Loader(
        data,
        data.lengths,
        data.weights,
        plan.planner,
        world.rank,
        world.size,
        sizes.micro_batch_size,
        sizes.gradient_accumulation_steps,
    )
    adapters = tuning.adapters(engine.module.model)
    return loop.Loop(
        engine=engine,
        loader=loader,
        evaluator=_evaluator(config, plan, world),
        schedule=Schedule(config.schedule, plan.total_steps),
        tracker=tracker,
        world=world,
        stop=stop,
        train=config.train,
        total_steps=plan.total_steps,
        peak_lr=config.optim.lr,
        run_dir=run_dir,
        save_frozen=_save_frozen(engine),
        extra_state=lambda: {
            "identity": identity,
            "adapters": adapters,
            "new_tokens": plan.words.state_dict(),
            "wandb_id": world.broadcast(tracker.run_id),
        },
        record=checkpoint.Record(load.to_yaml(config), plan.companions),
        probe=_probe(data, plan.words, engine),
    )


def _begin(config: Config, plan: Plan, the_loop: loop.Loop, resume_from: Path | None, saved: dict[str, Any]) -> None:
    """The run is accepted: write down what is about to happen, and leave nothing of what happened later."""
    tracker, world, run_dir = the_loop.tracker, the_loop.world, the_loop.run_dir
    environment = _environment(world)
    foreign = resume_from is not None and resume_from.parents[1] != run_dir

    def write() -> int:
        dropped = tracker.rewind(saved.get("step", -1))
        checkpoint.clean(run_dir)
        if config.tracking.wandb:
            plain = yaml.safe_load(load.to_yaml(config))
            # a run that begins from another's checkpoint is a run of its own
            run_id = None if foreign else saved.get("wandb_id")
            tracker.attach(WandbSink(config.tracking, run_dir, config.name, plain, run_id, tracker.note))
        write_json(run_dir / "environment.json", environment)
        audit = plan.audit | {"new_tokens": plan.words.audit(plan.train_set.entry.columns["ids"].data)}
        _describe_run(config, plan.ds, run_dir, tracker, audit)
        audits.show(audit, plan.train_set[0], plan.tokenizer, Console(stderr=True))
        tracker.note(_headline(the_loop.engine, plan, run_dir))
        trained = config.tuning.method is Method.full or config.tuning.new_tokens
        for line in [*plan.words.notes(audit["new_tokens"], trained), plan.stopping.note]:
            if line:
                tracker.note(line)
        return dropped

    dropped = world.from_main(write)
    if resume_from:
        if foreign:
            # the best checkpoint lies in the other run's directory, where nobody would look for it
            the_loop.counters.best = the_loop.counters.best_step = None
        again = f"; {dropped} later row(s) of metrics.jsonl will be made again" if dropped else ""
        tracker.note(f"resuming from {resume_from} at step {saved['step']}{again}")


def _warn(place: Place, warnings: list[str]) -> None:
    """Show what a recipe sets and this run has no use for."""
    for warning in warnings if place.rank == 0 else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _prepare_vocabulary(
    config: Config, text_config, tokenizer, new_tokens: list[str]
) -> tuple[vocabulary.Vocabulary, list[str]]:
    """Add the new tokens, and refuse settings that the chosen model cannot bear, before it is loaded.

    Returns:
        What is new in the tokenizer, and warnings of settings that have no effect with it.
    """
    words = vocabulary.extend(tokenizer, new_tokens, text_config.vocab_size)
    check.check_model(
        max_length=config.data.max_length,
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


def _engine(config: Config, plan: Plan, world: World) -> Engine:
    """The model, prepared for training as the config says, inside its engine."""
    dtype = DTYPES[plan.precision]
    dropout = attention.has_dropout(plan.text_config)
    kernel = attention.choose_kernel(config.model.attention, world.device, dtype, dropout)
    with building(plan.ds) as gather:
        model = models.load_model(plan.source, dtype, attention.NAME)
        rows.grow(model, plan.words, gather)
        model = tuning.apply(model, config.tuning, config.train.seed, plan.words)
    noise = Noise(model, config.train.seed, config.tuning.neftune_alpha)
    models.activation_checkpointing(model, config.activation_checkpointing, noise.checkpointing)
    documents = partial(attention.Documents.of, kernel=kernel, noise=noise)
    task = CausalLM(model, documents, config.model.logits_chunk, noise, probe_tokens(plan.train_set))
    return Engine(task, plan.ds, config.optim, world)


def _check_engine(config: Config, plan: Plan, engine: Engine) -> None:
    """Refuse settings that have no effect on this model, or warn of them."""
    idle = effect.by_model(
        config,
        plan.source.name,
        chunked=engine.module.chunked,
        decayed=any(group["weight_decay"] for group in parameter_groups(engine.module, config.optim)),
        rows_alone=not plan.words.pieces or any(n.endswith(rows.NEW) for n, _ in engine.module.named_parameters()),
    )
    _warn(engine.world.place, effect.enforce(config, idle, cli.given()))


def _evaluator(config: Config, plan: Plan, world: World) -> Evaluator | None:
    if plan.validation is None:
        return None
    return Evaluator(
        plan.validation,
        plan.tokenizer,
        world,
        config.eval.micro_batch_size,
        plan.sizes.micro_batch_size * config.data.max_length,
        config.train.samples,
        config.train.sample_tokens,
        plan.stopping.tokens,
    )


def _tracker(config: Config, run_dir: Path, world: World, total_steps: int, saved: dict[str, Any]):
    if not world.is_main:
        return NullTracker()
    return Tracker(run_dir, Progress(total_steps, saved.get("step", 0), config.tracking.progress))


def _probe(data: dataset.TokenDataset, words: vocabulary.Vocabulary, engine: Engine) -> Batch:
    """A short document of real text, whose logits take at most PROBE_BYTES: around the first new token, if the data
    hold one, else around the first supervised token."""
    logits = engine.module.model.config.get_text_config().vocab_size
    tokens = max(2, min(PROBE_TOKENS, PROBE_BYTES // (4 * logits)))
    searched = range(min(len(data), PROBE_SEARCH)) if words.pieces else ()
    number = next((n for n in searched if (data[n].ids >= words.first).any()), 0)
    example = data[number]
    shown = example.ids >= words.first if words.pieces else example.columns["supervised"]
    begin = max(0, int((shown if shown.any() else example.columns["supervised"]).argmax()) - tokens // 4)
    part = slice(begin, begin + tokens)
    columns = {name: column[part] for name, column in example.columns.items()}
    return collate([Example(columns, tokens=len(columns["ids"]), weight=1.0)])


def _describe_run(config: Config, ds: dict, run_dir: Path, tracker: Tracker, audit: dict[str, Any]) -> None:
    """Write down what is about to happen, and what of it is new since the run began."""
    file = run_dir / "config.yaml"
    if file.exists():
        try:
            changes = load.diff(load.load_yaml(file), config)
        except UserError as problem:
            changes = [f"the config before cannot be read ({problem})"]
        for line in changes:
            tracker.note(f"changed since this run began: {line}")
    write_text(file, load.to_yaml(config))
    write_json(run_dir / "ds_config.json", ds)
    tracker.audit(audit)


def _headline(engine: Engine, plan: Plan, run_dir: Path) -> str:
    counts = tuning.describe(engine.module)
    return (
        f"{counts.trainable:,} of {counts.total:,} parameters are trained ({counts.trainable / counts.total:.2%}), "
        f"{plan.precision.value}, ZeRO-{engine.stage}, {engine.world.size} rank(s), "
        f"{plan.ds['train_batch_size']} rows per step, {plan.total_steps} steps; run_dir {run_dir}"
    )


def _environment(world: World) -> dict[str, Any]:
    """What a result may depend on; all ranks call it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return {
        **describe(world),
        "python": platform.python_version(),
        # a checkout runs without being installed
        "packages": {"dsft": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": found.stdout.strip() or None if found else None,
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _precision(wanted: Precision) -> Precision:
    if wanted is Precision.auto:
        return Precision.bf16 if computes_bf16() else Precision.fp32
    if wanted is Precision.fp16 and not computes_fp16():
        raise UserError("precision=fp16: this CPU has no fp16 arithmetic. Use precision=bf16 or precision=fp32.")
    return wanted


def _epochs(config: Config) -> int | None:
    """Passes over the data; one where the config limits neither these nor the steps."""
    return 1 if config.train.epochs is None and config.train.max_steps is None else config.train.epochs


def _save_frozen(engine: Engine) -> bool:
    """True if nothing is frozen: frozen weights are as the model brought them, and are left out of checkpoints."""
    return all(p.requires_grad for p in engine.module.parameters())


def _identity(config: Config, plan: Plan) -> dict[str, Any]:
    """What a run is made of and cannot change on its way, by setting; what a difference is blamed on first comes first.

    It is kept in each checkpoint, and names the base model to whoever makes the model of one.
    """
    tuned = {f"tuning.{name}": _plain(value) for name, value in vars(config.tuning).items() if name != "neftune_alpha"}
    source = plan.source
    return {
        "train.seed": config.train.seed,
        checkpoint.MODEL: {
            "name": source.name,
            "origin": source.origin,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
            "files": source.files,
        },
        **tuned,
        checkpoint.NEW_TOKENS: [*plan.words.added],
        "precision": plan.precision.value,
        "optim.name": config.optim.name.value,
        "optim.layer_decay": config.optim.layer_decay,
        checkpoint.DATA: _data_identity(config, plan),
    }


def _data_identity(config: Config, plan: Plan) -> dict[str, Any]:
    """The training data's key, and what may be blamed where it differs."""
    settings = ("source train validation validation_share split packages max_records max_length train_on "
                "on_bad_record on_overflow").split()  # fmt: skip
    return {
        "key": plan.train_set.key,
        "settings": {f"data.{name}": _plain(getattr(config.data, name)) for name in settings}
        | {"model.chat_template": config.model.chat_template},
        "template": hashlib.sha256(repr(plan.tokenizer.chat_template).encode()).hexdigest(),
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _export(plan: Plan, the_loop: loop.Loop) -> None:
    """Write `model/` from the weights as they stand, reload it, and compare logits with the training model's."""
    engine, world, directory = the_loop.engine, the_loop.world, the_loop.run_dir / "model"
    probe = Probe(the_loop.probe.tensors["input_ids"], engine.logits(the_loop.probe))
    with engine.inference() as module:
        report = export.write_model(
            module.model,
            plan.companions,
            directory,
            gather=engine.gathered,
            is_writer=world.is_main,
            merge=True,
            dtype=DTYPES[plan.precision],
            probe=probe,
        )
    world.all_succeed(None)  # nobody ends before the writer has
    the_loop.tracker.note(f"exported {directory}; {report}")


def _conclude(run_dir: Path, signal: str | None, world: World, tracker) -> int:
    """Write the report, show the result, say how to go on."""
    if world.is_main:
        tracker.finish()
        write_report(run_dir)
        if signal:
            print(f"stopped by {signal}; the same command goes on from the checkpoint", file=sys.stderr)
        else:
            Console(stderr=True).print(summary(run_dir))
    return REQUEUE_CODE if signal else 0
