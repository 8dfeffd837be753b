"""`launch/train.py`: fine-tune a model.

Everything is built in memory, then the run is accepted, and only then something is written.
"""

from __future__ import annotations

import errno
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dsft import __version__, assemble, checkpoint, loop
from dsft.assemble import Plan
from dsft.config import load
from dsft.config.schema import Config, Method
from dsft.config.zero import stage
from dsft.data import audit as audits
from dsft.engine import Engine
from dsft.errors import UserError
from dsft.model import export, tuning
from dsft.model import head as heads
from dsft.optim import Schedule
from dsft.runtime.files import write_json, write_text
from dsft.runtime.locks import hold
from dsft.runtime.place import Place
from dsft.runtime.seeds import seed_everything
from dsft.runtime.signals import REQUEUE_CODE, StopRequest, exit_when_terminated
from dsft.runtime.world import World, describe, join, leave
from dsft.tracking import NullTracker, Progress, Tracker, WandbSink
from dsft.tracking.report import summary, write_report
from dsft.types import Probe

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "tokenizers")


def run(config: Config, place: Place) -> int:
    """Fine-tune as `config` says.

    Args:
        config: All settings.
        place: Where this process stands among the ranks.

    Returns:
        Exit code: 0 when the run is finished, REQUEUE_CODE when it was asked to stop and can go on.

    Raises:
        UserError: Something that the user can fix. Before the run is accepted, nothing in its directory has changed.
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
    plan = assemble.plan(config, place)
    stop = StopRequest()
    world = join(place)
    # decided by rank 0 alone: hosts may stand in different working directories
    run_dir = Path(world.broadcast(str(Path(config.run_dir).expanduser().absolute())))
    identity = assemble.identity(config, plan)
    resume_from, saved = _choose(config, plan, run_dir, identity, world)
    seed_everything(config.train.seed, config.train.deterministic)
    engine, plan = assemble.engine(config, plan, world)
    tracker = _tracker(config, plan, run_dir, world, saved)
    the_loop = _loop(config, plan, engine, world, stop, tracker, run_dir, identity)
    if resume_from:
        tuning.check_adapters(engine.module.model, saved["adapters"])
        the_loop.resume(resume_from, identity)
    _begin(config, plan, the_loop, resume_from, saved)
    signal = the_loop.run()
    if signal is None and config.train.export:
        _export(plan, the_loop)
    code = _conclude(plan, run_dir, signal, world, tracker)
    leave()
    return code


def _choose(
    config: Config, plan: Plan, run_dir: Path, identity: dict[str, Any], world: World
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its state, if there is one, and all ranks and the checkpoint agree to it."""
    for what, value in {
        "data.new_tokens": plan.model.words.identity,
        "the training data (data.*)": plan.train_set.key,
        "the validation data (data.*)": plan.validation.key if plan.validation else "none",
        "the test data (data.*)": plan.test.key if plan.test else "none",
        "the model (model.path)": plan.model.source.fingerprint,
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


def _loop(
    config: Config,
    plan: Plan,
    engine: Engine,
    world: World,
    stop: StopRequest,
    tracker: Tracker | NullTracker,
    run_dir: Path,
    identity: dict[str, Any],
) -> loop.Loop:
    adapters = tuning.adapters(engine.module.model)
    return loop.Loop(
        engine=engine,
        loader=assemble.loader(plan, world),
        evaluator=assemble.evaluator(config, plan, world),
        tester=assemble.tester(config, plan, world),
        metrics=plan.metrics,
        schedule=Schedule(config.schedule, plan.total_steps, plan.metrics[config.schedule.metric].better),
        tracker=tracker,
        world=world,
        stop=stop,
        train=config.train,
        total_steps=plan.total_steps,
        peak_lr=engine.peak_lr,
        run_dir=run_dir,
        save_frozen=_save_frozen(engine),
        extra_state=lambda: {
            "identity": identity,
            "adapters": adapters,
            "new_tokens": plan.model.words.state_dict(),
            "wandb_id": world.broadcast(tracker.run_id),
        },
        decide=partial(plan.task.decision, plan.collator.context) if plan.task.decision else None,
        record=checkpoint.Record(load.to_yaml(config), plan.model.companions),
        probe=assemble.probe(plan),
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
            tracker.attach(WandbSink(config.tracking, run_dir, config.name, plain, run_id, plan.metrics, tracker.note))
        write_json(run_dir / "environment.json", environment)
        packing = plan.planner.describe(plan.sizes.micro_batch_size) | ({"why": plan.why} if plan.why else {})
        new_tokens = plan.model.words.audit(plan.train_set.entry.columns["ids"].data)
        audit = plan.audit | {"packing": packing, "new_tokens": new_tokens}
        _describe_run(config, plan.ds, run_dir, tracker, audit)
        audits.show(audit, plan.train_set[0], plan.model.tokenizer, Console(stderr=True))
        if plan.why:
            tracker.note(f"data.packing=auto takes {plan.packing.value}: {plan.why}")
        tracker.note(_headline(the_loop.engine, plan, run_dir))
        if head := plan.model.source.head:
            new = getattr(the_loop.engine.module.plain, "new_parameters", [])
            tracker.note(heads.describe(head, new))
        trained = config.tuning.method is Method.full or config.tuning.new_tokens
        for line in [*plan.model.words.notes(audit["new_tokens"], trained), plan.model.stopping.note]:
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


def _tracker(config: Config, plan: Plan, run_dir: Path, world: World, saved: dict[str, Any]) -> Tracker | NullTracker:
    if not world.is_main:
        return NullTracker()
    progress = Progress(plan.metrics, plan.total_steps, saved.get("step", 0), config.tracking.progress)
    return Tracker(run_dir, plan.metrics, progress)


def _describe_run(
    config: Config, ds: dict, run_dir: Path, tracker: Tracker | NullTracker, audit: dict[str, Any]
) -> None:
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


def _save_frozen(engine: Engine) -> bool:
    """True if nothing is frozen: frozen weights are as the model brought them, and are left out of checkpoints."""
    return all(p.requires_grad for p in engine.module.parameters())


def _export(plan: Plan, the_loop: loop.Loop) -> None:
    """Write `model/` from the weights as they stand, reload it, and compare logits with the training model's."""
    engine, world, directory = the_loop.engine, the_loop.world, the_loop.run_dir / "model"
    assert the_loop.probe is not None
    probe = Probe(the_loop.probe.tensors["input_ids"], engine.logits(the_loop.probe))
    with engine.inference() as module:
        heads.keep_decision(module.plain.config, the_loop.decision)
        report = export.write_model(
            module.model,
            plan.model.companions,
            directory,
            gather=engine.gathered,
            is_writer=world.is_main,
            merge=True,
            dtype=plan.dtype,
            kind=plan.task.kind,
            probe=probe,
        )
    world.all_succeed(None)  # nobody ends before the writer has
    the_loop.tracker.note(f"exported {directory}; {report}")


def _conclude(plan: Plan, run_dir: Path, signal: str | None, world: World, tracker: Tracker | NullTracker) -> int:
    """Write the report, show the result, say how to go on."""
    if world.is_main:
        tracker.finish()
        write_report(run_dir, plan.metrics)
        if signal:
            print(f"stopped by {signal}; the same command goes on from the checkpoint", file=sys.stderr)
        else:
            Console(stderr=True).print(summary(run_dir, plan.metrics))
    return REQUEUE_CODE if signal else 0
