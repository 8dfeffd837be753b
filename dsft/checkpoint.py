"""Resume state: written whole or not at all, found again, thinned out.

A checkpoint is a directory `checkpoints/step-000020/` with DeepSpeed's files, one `rank-N.pt` per rank, `state.json`,
and the record of its run: `config.yaml`, the `companions/` of an exported model, and in `probe.safetensors` what the
model answered. So a model is made from a checkpoint and the base model alone, and compared with what was trained.

It is written under another name; `manifest.json`, with the size and hash of every file, comes last, and one rename
publishes the whole. A directory without its name or its manifest is no checkpoint. Whether a run may go on from one is
decided by `compare`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes

from dsft.config.effect import text
from dsft.engine import Engine
from dsft.errors import UserError
from dsft.runtime.files import sync_directory, write_bytes, write_json, write_text
from dsft.runtime.seeds import random_state, restore_random_state
from dsft.runtime.world import World
from dsft.types import Batch, Probe

NAME = re.compile(r"step-(\d{6,})")
MANIFEST = "manifest.json"
TAG = "deepspeed"
CONFIG = "config.yaml"
COMPANIONS = "companions"
PROBE = "probe.safetensors"


@dataclass(frozen=True)
class Record:
    """What a checkpoint keeps of its run, beside weights and counters.

    Attributes:
        config: The accepted config as YAML.
        companions: Name to content of the files that stand beside an exported model's weights.
    """

    config: str
    companions: dict[str, bytes]


def save(
    run_dir: Path,
    step: int,
    engine: Engine,
    world: World,
    state: dict[str, Any],
    frozen: bool,
    record: Record | None = None,
    probe: Batch | None = None,
) -> Path:
    """Publish a checkpoint; all ranks call it.

    Args:
        run_dir: The run's directory.
        step: Optimizer steps done.
        engine: Holds weights, optimizer and loss scale.
        world: The ranks.
        state: Everything else a run goes on from (cursor, schedule, counters ...), the same on all ranks; JSON values.
        frozen: Whether weights that are not trained are saved too.
        record: What is kept of the run.
        probe: One document of real text, whose logits are kept.

    Returns:
        The published directory.

    Raises:
        UserError: Some rank could not write, because the disk is full for example. Earlier checkpoints are whole.
    """
    final = run_dir / "checkpoints" / f"step-{step:06d}"
    part = final.with_name(final.name + ".part")
    meta = {"step": step, "world_size": world.size, "zero_stage": engine.stage, "frozen": frozen, **state}
    answered = Probe(probe.tensors["input_ids"], engine.logits(probe)) if probe is not None else None
    try:
        with _together(world, final):
            if world.is_main:
                shutil.rmtree(part, ignore_errors=True)
                (part / TAG).mkdir(parents=True)
                _write_record(part, record, answered)
        _write(part, final, engine, world, meta)
    except UserError:
        if world.is_main:
            shutil.rmtree(part, ignore_errors=True)  # on a full disk every byte of it is in the way
        raise
    return final


def _write(part: Path, final: Path, engine: Engine, world: World, meta: dict[str, Any]) -> None:
    """Every rank writes its files into `part`, and rank 0 publishes the whole."""
    with _together(world, final):
        engine.save(str(part), TAG, meta["frozen"])
        _save_random_state(part / f"rank-{world.rank}.pt")
    with _together(world, final):
        mine = _describe_share(part, world)
    shares = world.gather_objects(mine)
    with _together(world, final):
        if world.is_main:
            _publish(part, final, meta, {name: about for share in shares for name, about in share.items()})


def load(path: Path, engine: Engine, world: World, identity: dict[str, str] | None = None) -> dict[str, Any]:
    """Put weights, optimizer and random states back; all ranks call it on a fresh engine.

    Args:
        path: A checkpoint.
        engine: As fresh as it was built.
        world: The ranks.
        identity: What the run is made of, by setting: `compare`.

    Returns:
        The `state` that `save` was given, with `step` among it.

    Raises:
        UserError: The checkpoint was written by another number of ranks, ZeRO stage or identity.
    """
    state = read_state(path)
    compare(path, state, identity or {}, world.size, engine.stage)
    engine.load(str(path), TAG, state["frozen"])
    restore_random_state(torch.load(path / f"rank-{world.rank}.pt", weights_only=False))
    return state


def compare(path: Path, state: dict[str, Any], identity: dict[str, Any], world_size: int, zero_stage: int) -> None:
    """Decide whether a run may go on from a checkpoint.

    Args:
        path: The checkpoint, for messages.
        state: What `read_state` gave.
        identity: What the run is made of and cannot change on its way, by setting, as JSON values. The state's own
            `identity` has to be equal, except that other data may follow where an epoch is complete.
        world_size: Ranks of the run.
        zero_stage: Its ZeRO stage.

    Raises:
        UserError: It is another run's; the message names the first setting that differs, and both values.
    """
    for what, have, key in (("ranks", world_size, "world_size"), ("ZeRO stage", zero_stage, "zero_stage")):
        if state[key] != have:
            raise UserError(
                f"{path} was written with {what} {state[key]}, and this run has {have}. Start it with {state[key]}, "
                "or use another run_dir."
            )
    then = state.get("identity", {})
    if unknown := [setting for setting in identity if setting not in then]:
        raise UserError(
            f"{path} does not say what its run had for {unknown[0]}: an earlier dsft wrote it, and this one cannot go "
            "on from it. Finish the run with the version that its environment.json names, or choose another run_dir."
        )
    for setting, now in identity.items():
        before = then[setting]
        if before == now or (setting == MODEL and same_model(before, now)):
            continue
        if setting == DATA and not _in_the_way(before, now, state["loader"]):
            continue
        raise UserError(f"{path} {_DIFFERENCES.get(setting, _other_value)(setting, before, now)}")


def same_model(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether both are the same base model, wherever it lies: by its content, or the files that decide its weights."""
    if before is None:
        return False
    return before["fingerprint"] == now["fingerprint"] or before["files"] == now["files"] != {}


def _other_value(setting: str, before: Any, now: Any) -> str:
    then = f"{setting}={text(before)}"
    return (
        f"was saved with {then}, and this run has {text(now)}: that is another run. Give {then}, or choose "
        "another run_dir."
    )


def _in_the_way(before: dict[str, Any], now: dict[str, Any], cursor: dict[str, Any]) -> bool:
    """Whether other data make the place in them mean nothing; between two epochs they do not."""
    return bool(before["key"] != now["key"] and cursor["step_in_epoch"])


def _other_data(setting: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [name for name, value in now["settings"].items() if before["settings"].get(name) != value]
    then = " ".join(f"{name}={text(before['settings'].get(name))}" for name in changed)
    if changed:
        today = " ".join(f"{name}={text(now['settings'][name])}" for name in changed)
        what, restore = f"with {then}, and this run has {today}", f"Give {then}"
    elif before["template"] != now["template"]:
        what, restore = "and the chat template (model.chat_template, or that of model.path) changed since", "Restore it"
    else:
        what = f"and the content of {setting} changed since, or the version of dsft, transformers or tokenizers"
        restore = "Restore it"
    return (
        f"was saved in the middle of an epoch {what}, so its place in the data means nothing now. {restore}, or choose "
        "another run_dir."
    )


def _other_head(setting: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [name for name in now if before.get(name) != now[name]]
    then, today = (", ".join(f"{name} {text(which.get(name))}" for name in changed) for which in (before, now))
    return (
        f"was saved with a head of {then}, and this run's is of {today}: that is another run. Restore the settings of "
        "task.* or the records that it comes from, or choose another run_dir."
    )


def _other_model(setting: str, before: Any, now: Any) -> str:
    before = before or {"name": "an unknown model", "files": {}}
    names = changed_files(before["files"], now["files"])
    what = f"{now['name']}, where {', '.join(names)} differ(s)" if names else now["name"]
    return (
        f"was saved with the base model {before['name']}, and this run has another: {what}. Give model.path the same "
        "model, or choose another run_dir."
    )


def _other_tokens(setting: str, before: list[str] | None, now: list[str]) -> str:
    before = before or []
    gone = [f"{token!r} is missing" for token in before if token not in now]
    new = [f"{token!r} was not there" for token in now if token not in before]
    what = (gone + new)[:TOKENS_SHOWN] or ["they come in another order"]
    more = f" and {len(gone + new) - TOKENS_SHOWN} more differ" if len(gone + new) > TOKENS_SHOWN else ""
    return (
        f"was saved with {len(before)} new tokens, and {setting} gives {len(now)} now: {', '.join(what)}{more}. Give "
        "the same tokens in the same order, or choose another run_dir."
    )


DATA = "data.train"
MODEL = "model.path"
NEW_TOKENS = "data.new_tokens"
HEAD = "task.labels"
TOKENS_SHOWN = 4
_DIFFERENCES = {DATA: _other_data, MODEL: _other_model, NEW_TOKENS: _other_tokens, HEAD: _other_head}
"""How a difference is said, where setting and values alone do not say it."""


def changed_files(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of files that differ, are missing or are new, from name to digest then and now."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def read_state(path: Path) -> dict[str, Any]:
    """The plain part of a checkpoint: step, cursor, schedule, counters."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def read_record(path: Path) -> tuple[Record, Probe]:
    """What a checkpoint keeps of its run, and what the model answered.

    Raises:
        UserError: It keeps none of that: it was written by an earlier version.
    """
    try:
        config = (path / CONFIG).read_text(encoding="utf-8")
        tensors = load_file(path / PROBE)
    except OSError as problem:
        raise UserError(
            f"{path} does not say what its model is made of ({problem}); an earlier dsft wrote it"
        ) from None
    root = path / COMPANIONS
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    companions = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    return Record(config, companions), Probe(tensors["ids"], tensors["logits"])


def checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=_step)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file of its manifest has its size and hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        return f"no readable {MANIFEST} ({problem})"
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _describe(file) != expected:
            return f"{name} has another hash than when it was written"
    return None


def newest_whole(run_dir: Path, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; `note(message)` is called for each that is skipped."""
    for path in reversed(checkpoints(run_dir)):
        if (problem := damage(path)) is None:
            return path
        note(f"passing over {path}: {problem}")
    return None


def clean(run_dir: Path) -> None:
    """Remove what a kill in the middle of writing has left behind."""
    for part in (run_dir / "checkpoints").glob("*.part"):
        shutil.rmtree(part)


def choose(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `train.resume` goes on from, or None to start anew; only rank 0 decides. Nothing is changed.

    Raises:
        UserError: The run directory holds a run that `train.resume=never` would overwrite, or PATH is damaged.
    """
    if resume == "never":
        if checkpoints(run_dir):
            raise UserError(
                f"run_dir={run_dir} holds checkpoints, and train.resume=never would overwrite them. Choose another "
                "run_dir, delete this one, or use train.resume=auto."
            )
        return None
    own = newest_whole(run_dir, lambda message: print(message, file=sys.stderr))
    if own is None and checkpoints(run_dir):
        raise UserError(
            f"run_dir={run_dir} holds checkpoints, but none of them is whole. Delete its checkpoints/ to start anew, "
            "or choose another run_dir."
        )
    path = Path(resume).expanduser().absolute()
    if resume == "auto" or own is not None:
        if resume != "auto" and own is not None and path.resolve() != own.resolve():
            # a run that began from PATH and was stopped goes on from where it came to, not from PATH again
            print(
                f"note: train.resume={resume} is passed over, as run_dir={run_dir} holds a run that has come to "
                f"{own.name} and goes on from there. To go on from {path.name}, choose another run_dir.",
                file=sys.stderr,
            )
        return own
    if problem := damage(path):
        raise UserError(f"train.resume={path} is no whole checkpoint: {problem}")
    return path


def retain(run_dir: Path, step: int, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the best and the last `keep_last` up to `step`.

    Later ones are no part of the run any more: they were damaged, or it went on from an earlier one.
    """
    found = checkpoints(run_dir)
    past = [path for path in found if _step(path) <= step]
    for path in found:
        if path not in past[-keep_last:] and _step(path) != best_step:
            shutil.rmtree(path)


def find(run_dir: Path, which: str) -> Path:
    """The checkpoint called `best`, `last` or by its step.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    all_ = checkpoints(run_dir)
    have = ", ".join(p.name for p in all_) or "none"
    if not all_:
        raise UserError(f"{run_dir}/checkpoints holds no checkpoint")
    if which == "last":
        return all_[-1]
    if which == "best":
        best = next((read_state(p)["best_step"] for p in reversed(all_) if damage(p) is None), None)
        which = str(best) if best is not None else which
    named = {str(_step(path)): path for path in all_}
    if which not in named:
        raise UserError(f"{run_dir} has no checkpoint {which!r}; it has: {have}")
    return named[which]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint of any ZeRO stage and number of ranks, whole, on the CPU.

    Returns:
        Parameter name (of the model, without the task's prefix) to tensor: in the type that was trained in, and in
        fp32 from ZeRO-3, whose whole weights exist only as the optimizer's parts.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if read_state(path)["zero_stage"] < 3:
        file = path / TAG / "mp_rank_00_model_states.pt"
        named = torch.load(file, map_location="cpu", weights_only=False)["module"]
    else:
        named = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG, exclude_frozen_parameters=False)
    return {name.removeprefix("model."): tensor for name, tensor in named.items()}


def _step(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    assert found is not None, f"{path} is no checkpoint"
    return int(found[1])


def _write_record(part: Path, record: Record | None, probe: Probe | None) -> None:
    if record is not None:
        write_text(part / CONFIG, record.config)
        for name, content in record.companions.items():
            file = part / COMPANIONS / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    if probe is not None:
        write_bytes(part / PROBE, tensor_bytes({"ids": probe.ids.cpu().contiguous(), "logits": probe.logits}))


@contextmanager
def _together(world: World, final: Path) -> Iterator[None]:
    """Inside, a failure to write on one rank is a UserError on every rank, so that nobody waits for it."""
    failure = None
    try:
        yield
    except OSError as problem:
        free = shutil.disk_usage(final.parents[1]).free  # torch reports a full disk as a riddle
        failure = UserError(
            f"cannot write the checkpoint {final}: {problem} ({free / 2**20:,.0f} MiB are free there). Earlier "
            "checkpoints are whole: make room, and the same command goes on from the last of them."
        )
    world.all_succeed(failure)


def _save_random_state(file: Path) -> None:
    try:
        torch.save(random_state(), file)
    except RuntimeError as problem:  # what torch makes of a full disk
        raise OSError(str(problem)) from problem


def _describe_share(directory: Path, world: World) -> dict[str, dict[str, Any]]:
    """Size and hash of this rank's share of the files below `directory`."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): _describe(p) for p in files[world.rank :: world.size]}


def _publish(part: Path, final: Path, meta: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Add the plain part and the manifest, and let the whole take its name."""
    write_json(part / "state.json", meta)
    files["state.json"] = _describe(part / "state.json")
    write_json(part / MANIFEST, {"step": meta["step"], "files": dict(sorted(files.items()))})
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    sync_directory(final.parent)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}
