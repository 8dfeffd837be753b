"""Composition root: from a config to the objects of a run, and into the loop. No arithmetic here."""

from __future__ import annotations

import errno
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml
from rich.console import Console

from dsft import checkpoint, loop
from dsft.config import check, cli, effect, load
from dsft.config.schema import Config, Method, Precision
from dsft.data import audit as audits
from dsft.data import dataset, sources
from dsft.data.batch import collate
from dsft.data.loader import Loader
from dsft.data.pack import Planner
from dsft.ds_config import build as build_ds_config
from dsft.engine import Engine, building
from dsft.errors import UserError
from dsft.evaluate import Evaluator
from dsft.metrics import METRICS
from dsft.model import attention, export, rows, tuning, vocabulary
from dsft.model import load as models
from dsft.optim import Schedule, parameter_groups
from dsft.runtime.files import write_json, write_text
from dsft.runtime.place import Place
from dsft.runtime.seeds import seed_everything
from dsft.runtime.signals import REQUEUE_CODE, StopRequest
from dsft.runtime.world import World, computes_bf16, computes_fp16, describe, join, leave
from dsft.tasks.causal_lm import CausalLM
from dsft.tracking import NullTracker, Progress, Tracker, WandbSink
from dsft.tracking.report import summary, write_report

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
PACKAGES = ("dsft", "torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "tokenizers")


def run(config: Config, place: Place) -> int:
    """Fine-tune as `config` says.

    Args:
        config: All settings.
        place: Where this process stands among the ranks.

    Returns:
        Exit code: 0 when the run is finished, REQUEUE_CODE when it was asked to stop and can go on.

    Raises:
        UserError: Something that a person can mend.
    """
    with _only_run(Path(config.run_dir), place):
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
    specs = [spec for spec in (config.data.train, config.data.validation) if spec is not None]
    data_on_hub = None in [sources.files(spec) for spec in specs]
    new_tokens = vocabulary.read(config.data.new_tokens) if config.data.new_tokens else []
    model_on_hub = models.on_hub(config.model.path)
    idle = effect.by_place(config, model_on_hub=model_on_hub, data_on_hub=data_on_hub)
    _warn(place, effect.enforce(config, idle, given))
    # reading and tokenising may take hours: done before there is a process group that could time out
    source = models.resolve(config.model.path, config.model.revision, config.data.cache_dir)
    tokenizer = models.load_tokenizer(source, config.model.chat_template)
    words, idle = _prepare_vocabulary(config, source, tokenizer, new_tokens)
    _warn(place, idle)
    train_set, validation, audit = dataset.prepare(
        config.data, tokenizer, models.tokenizer_fingerprint(tokenizer), config.train.seed
    )
    planner = Planner(
        train_set.lengths,
        config.data.packing,
        config.data.max_length,
        config.data.pack_window,
        config.train.seed,
        sizes.global_batch_size,
    )
    total_steps = planner.total_steps(_epochs(config), config.train.max_steps)
    audit["packing"] = planner.describe()
    length = effect.Length(
        held_out=len(validation or []),
        all_supervised=bool((train_set.supervised_counts == train_set.lengths - 1).all()),
        total_steps=total_steps,
        steps_to_decay=planner.total_steps(effect.decays_every(config), total_steps),
    )
    _warn(place, effect.enforce(config, effect.by_length(config, length, given), given))

    stop = StopRequest()
    world = join(place)
    # decided by rank 0 alone: hosts may stand in different working directories
    run_dir = Path(world.broadcast(str(Path(config.run_dir).expanduser().absolute())))
    for what, value in {
        "data.new_tokens": words.identity,
        "the training data": train_set.key,
        "the validation data": validation.key if validation else "none",
        "the model": source.fingerprint,
        "the precision": precision.value,
    }.items():
        world.agree(what, value)
    identity = _identity(config, precision, source) | {"data.new_tokens": words.identity}
    seed_everything(config.train.seed, config.train.deterministic)
    engine = _engine(config, ds, source, words, precision, world)
    idle = effect.by_model(
        config,
        source.name,
        chunked=engine.module.chunked,
        decayed=any(group["weight_decay"] for group in parameter_groups(engine.module, config.optim)),
    )
    _warn(place, effect.enforce(config, idle, given))
    resume_from = world.from_main(partial(checkpoint.choose, run_dir, config.train.resume))
    saved = checkpoint.read_state(resume_from) if resume_from else {}
    tracker = _tracker(config, run_dir, world, total_steps, saved)
    environment = _environment(world)
    if world.is_main:
        write_json(run_dir / "environment.json", environment)
        audit["new_tokens"] = words.audit(train_set.arrays["ids"])
        _describe_run(config, ds, run_dir, tracker, audit)
        audits.show(audit, train_set[0], tokenizer, Console(stderr=True))
        tracker.note(_headline(engine, ds, precision, run_dir, total_steps))
        for line in words.notes(audit["new_tokens"], config.tuning.method is Method.full or config.tuning.new_tokens):
            tracker.note(line)
    the_loop = loop.Loop(
        engine=engine,
        loader=Loader(
            train_set,
            train_set.lengths,
            train_set.supervised_counts,
            planner,
            world.rank,
            world.size,
            sizes.micro_batch_size,
            sizes.gradient_accumulation_steps,
        ),
        evaluator=_evaluator(config, validation, tokenizer, world, sizes.micro_batch_size),
        schedule=Schedule(config.schedule, total_steps, planner.steps(0)),
        tracker=tracker,
        world=world,
        stop=stop,
        train=config.train,
        total_steps=total_steps,
        peak_lr=config.optim.lr,
        run_dir=run_dir,
        save_frozen=_save_frozen(engine),
        extra_state=lambda: {
            "data": train_set.key,
            "identity": identity,
            "new_tokens": words.added,
            "wandb_id": world.broadcast(tracker.run_id),
        },
    )
    if resume_from:
        _resume(the_loop, resume_from, train_set.key, identity, tracker)
    signal = the_loop.run()
    if signal is None and config.train.export:
        _export(config, run_dir, engine, tokenizer, train_set[0], precision, world, tracker)
    code = _conclude(run_dir, signal, world, tracker)
    leave()
    return code


def _warn(place: Place, warnings: list[str]) -> None:
    """Show what a recipe sets and this run has no use for."""
    for warning in warnings if place.rank == 0 else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _prepare_vocabulary(
    config: Config, source: models.ModelSource, tokenizer, new_tokens: list[str]
) -> tuple[vocabulary.Vocabulary, list[str]]:
    """Add the new tokens, and refuse settings that the chosen model cannot bear, before it is loaded.

    Returns:
        What is new in the tokenizer, and warnings of settings that have no effect with it.
    """
    text_config = models.load_config(source).get_text_config()
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


def _engine(
    config: Config,
    ds: dict,
    source: models.ModelSource,
    words: vocabulary.Vocabulary,
    precision: Precision,
    world: World,
) -> Engine:
    """The model, prepared for training as the config says, inside its engine."""
    dtype = DTYPES[precision]
    kernel = attention.choose_kernel(config.model.attention, world.device, dtype)
    with building(ds) as gather:
        model = models.load_model(source, dtype, attention.NAME)
        rows.grow(model, words, gather)
        model = tuning.apply(model, config.tuning, config.train.seed, words)
    models.activation_checkpointing(model, config.activation_checkpointing)
    noise = tuning.add_neftune(model, config.tuning.neftune_alpha) if config.tuning.neftune_alpha else None
    task = CausalLM(model, partial(attention.Documents.of, kernel=kernel), config.model.logits_chunk, noise)
    return Engine(task, ds, config.optim, world)


def _evaluator(config: Config, validation, tokenizer, world: World, micro_batch_size: int) -> Evaluator | None:
    if validation is None:
        return None
    return Evaluator(
        validation,
        tokenizer,
        world,
        config.eval.micro_batch_size,
        micro_batch_size * config.data.max_length,
        config.train.samples,
        config.train.sample_tokens,
    )


def _tracker(config: Config, run_dir: Path, world: World, total_steps: int, saved: dict[str, Any]):
    if not world.is_main:
        return NullTracker()
    run_dir.mkdir(parents=True, exist_ok=True)
    progress = Progress(total_steps, saved.get("step", 0), config.tracking.progress)
    sink = None
    if config.tracking.wandb:
        plain = yaml.safe_load(load.to_yaml(config))
        sink = WandbSink(config.tracking, run_dir, config.name, plain, saved.get("wandb_id"), progress.note)
    tracker = Tracker(run_dir, progress, sink)
    if not saved:
        tracker.rewind(-1)
    return tracker


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


def _headline(engine: Engine, ds: dict, precision: Precision, run_dir: Path, total_steps: int) -> str:
    counts = tuning.describe(engine.module)
    return (
        f"{counts.trainable:,} of {counts.total:,} parameters are trained ({counts.trainable / counts.total:.2%}), "
        f"{precision.value}, ZeRO-{engine.stage}, {engine.world.size} rank(s), "
        f"{ds['train_batch_size']} rows per step, {total_steps} steps; run_dir {run_dir}"
    )


def _environment(world: World) -> dict[str, Any]:
    """What a result may depend on; all ranks call it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return {
        **describe(world),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
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


@contextmanager
def _only_run(run_dir: Path, place: Place) -> Iterator[None]:
    """Hold the run directory's lock on rank 0, so that two runs never write into one directory."""
    if place.rank:
        yield
        return
    run_dir = run_dir.expanduser()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another run is using run_dir={run_dir}; wait for it, or choose another run_dir") from None
    except NotImplementedError:
        raise UserError(f"run_dir={run_dir} is on a file system without locks; choose another place") from None
    except OSError as problem:
        raise UserError(f"run_dir={run_dir} cannot be written to: {problem.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _identity(config: Config, precision: Precision, source: models.ModelSource) -> dict[str, str]:
    """What a run is made of and cannot change on its way; by knob."""
    tuned = {f"tuning.{name}": str(value) for name, value in vars(config.tuning).items() if name != "neftune_alpha"}
    return tuned | {
        "model.path": source.fingerprint,
        "precision": precision.value,
        "optim.name": config.optim.name.value,
        "optim.layer_decay": str(config.optim.layer_decay),
    }


def _resume(the_loop: loop.Loop, path: Path, data_key: str, identity: dict[str, str], tracker) -> None:
    """Put everything back to where the checkpoint stood."""
    state = checkpoint.read_state(path)
    if state["data"] != data_key and state["loader"]["step_in_epoch"]:
        raise UserError(
            f"the training data, or how it is rendered, changed since {path} was saved in the middle of an epoch, so "
            "its place in the data means nothing now. Restore the data settings, or choose another run_dir."
        )
    the_loop.resume(path, identity)
    if path.parents[1] != the_loop.run_dir:
        # the best checkpoint lies in the other run's directory, where nobody would look for it
        the_loop.counters.best = the_loop.counters.best_step = None
    dropped = the_loop.world.from_main(lambda: tracker.rewind(state["step"]))
    again = f"; {dropped} later row(s) of metrics.jsonl will be made again" if dropped else ""
    tracker.note(f"resuming from {path} at step {state['step']}{again}")


def _export(config, run_dir: Path, engine: Engine, tokenizer, example, precision, world: World, tracker) -> None:
    """Write `model/` from the weights as they stand, reload it, and compare logits."""
    dtype = DTYPES[precision]
    probe = collate([example])
    directory = run_dir / "model"
    with engine.inference() as module:
        expected = module.logits(probe.to(world.device))
        export.write_model(
            module.model,
            tokenizer,
            directory,
            gather=engine.gathered,
            is_writer=world.is_main,
            merge=True,
            dtype=dtype,
        )
        report = world.from_main(lambda: export.verify(directory, probe.input_ids, expected[None], dtype))
    tracker.note(f"exported {directory}; {report}")


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
