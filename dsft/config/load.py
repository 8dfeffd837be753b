"""From a command line or a file to a `Config`, and from there to text; the only place that knows OmegaConf.

What a person can get wrong here is told in one or a few lines that name the setting and the nearest valid one,
before any process group exists.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import (
    ConfigKeyError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)

from dsft.config import yaml_text
from dsft.config.schema import Config, is_text, is_text_map, knobs
from dsft.errors import UserError

_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_PRECEDENCE = 5.0
"""Seconds that a rank leaves to rank 0 to tell of a mistake."""
_HOW_TO_GIVE = {
    "task.name": "task=NAME, a file of conf/task/",
    "model.path": "model.path=DIR_OR_HUB_ID_OR_GGUF, or model=smollm2_135m",
    "deepspeed.json": "deepspeed.json=FILE, or deepspeed=zero2",
}


_OF_YOUR_OWN = {
    "model": "model.path={}",
    "data": "data=jsonl data.train={}",
    "deepspeed": "deepspeed.json={}",
}
"""How to give what is no choice of a group, but a path or a hub id."""

_AMBIGUOUS = "Ambiguous value for argument "
_ENV = BaseContainer._resolvers["oc.env"]


def register() -> None:
    """Let `conf/config.yaml` begin its defaults list with the schema, and text in YAML be text."""
    ConfigStore.instance().store("schema", node=Config)
    yaml_text.register()
    BaseContainer._resolvers["oc.env"] = _environment_or_text


@contextmanager
def reporting() -> Iterator[None]:
    """Show what a person can mend as a message alone, once per machine where its launcher ends all ranks with the
    first, and exit with code 2.

    Anything else passes through with its traceback; with HYDRA_FULL_ERROR=1 everything does.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints by its own rules and exits
    try:
        yield
    except Exception as error:
        message = shown(error)
        if message is None:
            raise
        if next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "0") != "0":
            # rank 0 tells the same and its launcher ends this rank, unless rank 0 is not there yet or never will be
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_PRECEDENCE)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def shown(error: Exception) -> str | None:
    """What is printed of `error` in place of its traceback; None where the traceback is, as HYDRA_FULL_ERROR=1 asks."""
    return None if _TRACEBACK else explain(error)


def from_hydra(composed: DictConfig) -> Config:
    """The composed config as plain dataclasses; in a sweep, with the run directory that Hydra names for the job.

    Raises:
        UserError: For unknown keys (`+new.key=` too), wrong types, and required values that are missing.
    """
    config = _typed(composed)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "--multirun runs its jobs one after the other in one process, so it cannot run under a launcher. "
                "Start the sweep with `python launch/train.py -m ...`, or one launcher command per job."
            )
        config.run_dir = HydraConfig.get().runtime.output_dir
    return config


def load_yaml(path: str | Path) -> Config:
    """Read back what `to_yaml` wrote, such as `run_dir/config.yaml`.

    Raises:
        UserError: If the file is missing, is not YAML or does not fit the schema; the message names it.
    """
    return parse_yaml(yaml_text.read(path), str(path))


def parse_yaml(text: str, origin: str) -> Config:
    """The config that `to_yaml` wrote as `text`; `origin` names it in messages.

    Raises:
        UserError: If it is not YAML or does not fit the schema.
    """
    content = yaml_text.parse(text, name=origin)
    try:
        return _typed(OmegaConf.create(content))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


def to_yaml(config: Config) -> str:
    """The config as YAML that `load_yaml` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config), escape=True)))


def changed(config: Config, given: Mapping[str, Any]) -> Config:
    """The config with other values, by the dotted names of their settings.

    Raises:
        UserError: One is of a wrong type.
    """
    tree = _plain(asdict(config), escape=True)
    for name, value in given.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value
    return _typed(OmegaConf.create(tree))


def diff(old: Config, new: Config) -> list[str]:
    """Lines such as `optim.lr: 0.0001 -> 0.001`, one per knob that differs."""
    before, after = (_flat(_plain(asdict(c))) for c in (old, new))
    return [f"{name}: {_text(before[name])} -> {_text(after[name])}" for name in after if before[name] != after[name]]


def explain(error: Exception) -> str | None:
    """What to tell the person who caused `error`, or None where it is no mistake of theirs."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _wrong_choice(error)
    if isinstance(error, OverrideParseException):
        if "=" not in str(error.override):
            return f"cannot read {error.override!r}: settings are given as NAME=VALUE, such as optim.lr=1e-4."
        return (
            f"cannot read the override {error.override!r}: {error.message.splitlines()[0]}. "
            "Put a value with brackets, braces, commas or quotes in quotes of its own: key='\"value\"'."
        )
    if str(error).startswith(_AMBIGUOUS):
        return _several(str(error).splitlines()[0].removeprefix(_AMBIGUOUS)[1:-1])
    if isinstance(cause, UnsupportedInterpolationType) or "Interpolation" in type(cause).__name__:
        return f"{getattr(cause, 'full_key', '')}: {str(cause).splitlines()[0]}."
    if isinstance(cause, ConfigKeyError | AttributeError) and (key := getattr(cause, "full_key", None)):
        return _unknown(key)
    if isinstance(cause, ValidationError) and cause.full_key in knobs():
        return _wrong_type(cause.full_key, str(cause))
    if isinstance(error, HydraException | OmegaConfBaseException) or str(error).startswith("Config group override"):
        return str(error) if cause is error or not str(cause) else f"{error}: {str(cause).splitlines()[0]}"
    return None


def _environment_or_text(config: Any, parent: Any, node: Any, args: tuple[Any, ...], args_str: tuple[str, ...]) -> Any:
    """OmegaConf's `oc.env`, with a default as it is written: that of `${oc.env:DATE,2024_11_25}` is no number."""
    texts = (text if isinstance(arg, int | float) and "$" not in text else arg for arg, text in zip(args, args_str))
    return _ENV(config, parent, node, tuple(texts), args_str)


def _plain(value: Any, escape: bool = False) -> Any:
    """`value` with choices by their names; with `escape`, a `${` in a text is no interpolation."""
    if isinstance(value, dict):
        return {key: _plain(inner, escape) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, escape) for inner in value]
    if isinstance(value, Enum):
        return value.name
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if escape and isinstance(value, str) else value


def _typed(loose: Any) -> Config:
    """`loose` merged into the schema once more, for `+new.key=` gets past Hydra's own check."""
    if not isinstance(loose, DictConfig):
        raise UserError("a config is a mapping of names to values.")
    given: Any = OmegaConf.to_container(loose)
    unknown = [key for key in _flat(given) if key not in knobs()]
    if unknown:
        raise UserError("\n".join(map(_unknown, unknown)))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise UserError("\n".join(f"{key} has no value: give {_HOW_TO_GIVE[key]}." for key in sorted(missing)))
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one of dotted names; settings that are mappings, and sections that are none, keep their names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and value and not is_text_map(knobs().get(name))
        flat |= _flat(value, f"{name}.") if nested else {name: value}
    return flat


def _unknown(key: str) -> str:
    """Name the nearest knob: the same last name in another section first, then by spelling."""
    names = list(knobs())
    section, dot, last = key.rpartition(".")
    sections = dict.fromkeys(name.partition(".")[0] for name in names)
    if key in sections:
        return f"{key} is a group of settings, not a value: set {key}.NAME=VALUE, or choose a file of conf/{key}/."
    siblings = [name for name in names if dot and name.startswith(f"{section}.")] or list(sections)
    same = [name for name in names if name.rpartition(".")[2] == last]
    near = same or _closest(last, siblings, 0.6) or _closest(last, names, 0.75)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(siblings)}."
    return f"unknown setting {key}. {hint}"


def _closest(last: str, names: list[str], cutoff: float) -> list[str]:
    """The one of `names` whose last part is spelt most like `last`, if any is close enough; case does not matter."""
    by_last = {name.rpartition(".")[2]: name for name in names}
    return [by_last[near] for near in difflib.get_close_matches(last.lower(), by_last, n=1, cutoff=cutoff)]


def _wrong_choice(error: MissingConfigException) -> str:
    file = str(error.missing_cfg_file)
    group, _, choice = file.rpartition("/") if file.startswith("hydra/") else file.partition("/")
    options = list(error.options or ())
    near = _closest(choice, options, 0.4)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    is_path = "/" in choice or ("." in choice and Path(choice).stem not in options)
    if is_path and group in _OF_YOUR_OWN:
        hint = f" Did you mean {_OF_YOUR_OWN[group].format(choice)}?"
    return f"{group}={choice}: there is no such choice.{hint} The choices are {', '.join(sorted(options))}."


def _several(argument: str) -> str:
    """What to do about a comma in a value where there is no sweep."""
    name, _, value = argument.partition("=")
    hint = knobs().get(name)
    one = "To try them all, "
    if get_origin(hint) is list:
        one = f"Write a list as '{name}=[{value}]'; or, to try them all, "
    elif is_text(hint):
        escaped = value.replace(",", "\\,")
        one = f"Write a comma that belongs to the text as '{name}={escaped}', quotes included; or, to try them all, "
    return f"{argument}: a comma separates several values. {one}add -m to run a job for each."


def _wrong_type(key: str, detail: str) -> str:
    """Say what a knob takes, and for an enum the nearest choice."""
    hint = knobs()[key]
    given = "null" if "is not Optional" in detail else detail.split("'")[1] if "'" in detail else ""
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = [choice.name for choice in hint]
        near = _closest(given, choices, 0.4)
        did = f" Did you mean {key}={near[0]}?" if near else ""
        return f"{key}={given}: there is no such choice.{did} The choices are {', '.join(choices)}."
    return f"{key} takes {_kind(hint)}. {detail.splitlines()[0].rstrip('.')}."


def _kind(hint: Any) -> str:
    """A type in words."""
    if is_text_map(hint):
        return "texts by names {name: text, ...}"
    if get_origin(hint) is list:
        return f"a list [{_kind(get_args(hint)[0])}, ...]"
    options = [option for option in get_args(hint) if option is not type(None)]
    if options:
        return f"{_kind(options[0])} or null"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]


def _text(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip().removesuffix("\n...")
