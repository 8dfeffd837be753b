"""A trained model found again, to be asked: a checkpoint of a run, a model directory, or adapters on their base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from dsft import assemble, checkpoint
from dsft.commands import export
from dsft.config import load
from dsft.config.schema import Config
from dsft.errors import UserError
from dsft.model import directory as directories
from dsft.model import export as writing
from dsft.model import head as heads
from dsft.model import load as models
from dsft.model.head import MULTI, REGRESSION, Head
from dsft.model.stopping import find_stopping
from dsft.tasks import TASKS, Task, template
from dsft.tasks.labels import Labels

ADAPTERS = "adapter_config.json"


@dataclass(frozen=True)
class Trained:
    """A trained model, before it is loaded.

    Attributes:
        config: Settings of the run, or the usual ones, with those that were given.
        name: What it is, for messages.
        fingerprint: Differs where any of its weights does.
        model_config: The config of its language model.
        tokenizer: Its tokenizer.
        labels: Names of its outputs, where its task has any.
        stop_tokens: Token ids that end its answers.
        dtype: Type of weights and activations: that of training, unless another is given.
        load: (attention) -> the model, whole, on the host.
    """

    config: Config
    name: str
    fingerprint: str
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerFast
    stop_tokens: list[int]
    dtype: torch.dtype
    load: Callable[[str], nn.Module]
    labels: Labels = field(default_factory=lambda: Labels(()))

    @property
    def task(self) -> Task:
        return TASKS[self.config.task.name]


def of_run(run_dir: Path, which: str, model_path: str | None, given: Mapping[str, Any]) -> Trained:
    """The model of a run's checkpoint.

    Args:
        run_dir: The run's directory; `which` is `best`, `last` or a step.
        model_path: Where the base model lies, if it has been moved since the run.
        given: Settings that are not to be the run's, by name.

    Raises:
        UserError: There is no such checkpoint, it is damaged, its base model is gone, or a setting is wrong.
    """
    kept = export.read(run_dir, which)
    source = kept.source(model_path)
    config = load.changed(kept.config, given)
    if config.task.name != kept.config.task.name:
        raise UserError(f"task={config.task.name}: {run_dir} was trained with task={kept.config.task.name}")
    with tempfile.TemporaryDirectory() as scratch:
        writing.write_companions(kept.record.companions, Path(scratch))
        beside = models.ModelSource(scratch, None, "", str(run_dir), kind=kept.kind)
        tokenizer = models.load_tokenizer(beside, config.model.chat_template)
    stopping = find_stopping(source, tokenizer, template.turn_end(tokenizer))
    dtype = assemble.DTYPES[assemble.precision_of(config.precision)] if "precision" in given else kept.dtype
    return Trained(
        config=config,
        name=str(kept.path),
        fingerprint=f"{source.fingerprint} {(kept.path / checkpoint.MANIFEST).read_text(encoding='utf-8')}",
        model_config=models.load_config(source).get_text_config(),
        tokenizer=_ready(config, tokenizer),
        stop_tokens=stopping.tokens,
        dtype=dtype,
        load=lambda attention: kept.model(source, dtype, attention, merge=True),
        labels=_labels(source.head),
    )


def of_model(path: str, task: str | None, given: Mapping[str, Any]) -> Trained:
    """A model directory, a hub id or a GGUF file, or a directory of adapters, which name their base model.

    Args:
        path: `model.path`.
        task: What it was trained for; None finds that out from its class.
        given: Further settings, by name.

    Raises:
        UserError: There is no such model, or none that says what it was trained for; or a setting is wrong.
    """
    local = Path(path).expanduser()
    adapters = local if (local / ADAPTERS).is_file() else None
    named: dict[str, Any] = directories.read_json(local / ADAPTERS) if adapters else {}
    base, revision = (named["base_model_name_or_path"], named.get("revision")) if adapters else (path, None)
    revision = given.get("model.revision", revision)
    own = str(local) if adapters and (local / "config.json").is_file() else base
    name = task or _told_task(path, own, revision)
    config = load.changed(
        Config(), {"task.name": name, "model.path": path, "deepspeed.json": "ds_configs/zero0.json", **given}
    )
    kind = TASKS[name].kind
    source = models.resolve(base, revision, config.data.cache_dir, kind)
    written = AutoConfig.from_pretrained(own if adapters else source.path, revision=source.revision)
    if kind.headed:
        if not adapters and not models.own_labels(source):
            raise UserError(f"model.path={path}: {written.model_type} model without a head for task={name}: train one")
        source = replace(source, head=heads.described(written))
    several = source.head is not None and source.head.problem == MULTI
    config = load.changed(config, {"task.multi_label": several})
    beside = source if not adapters or not _has_tokenizer(local) else replace(source, path=str(local), revision=None)
    tokenizer = models.load_tokenizer(beside, config.model.chat_template)
    model_config = models.load_config(source).get_text_config()
    dtype = assemble.DTYPES[assemble.precision_of(config.precision)]
    positions = getattr(model_config, "max_position_embeddings", None)
    if "data.max_length" not in given and positions:
        config.data.max_length = min(config.data.max_length, positions)
    return Trained(
        config=config,
        name=path,
        fingerprint=source.fingerprint + (models.fingerprint(local) if adapters else ""),
        model_config=model_config,
        tokenizer=_ready(config, tokenizer),
        stop_tokens=find_stopping(source, tokenizer, template.turn_end(tokenizer)).tokens,
        dtype=dtype,
        load=lambda attention: _loaded(source, adapters, dtype, attention),
        labels=_labels(source.head),
    )


def _told_task(path: str, own: str, revision: str | None) -> str:
    """The task that a model's class says.

    Raises:
        UserError: It says none.
    """
    file = models.local_path(own) / "config.json"
    if file.is_file():
        about = directories.read_json(file)
    else:  # a GGUF file or a hub id, or refused for what it is
        source = models.resolve(own, revision)
        about = AutoConfig.from_pretrained(source.path, revision=source.revision).to_dict()
    classes = {*(about.get("architectures") or [])}
    if about.get("problem_type") == REGRESSION:
        return "regress"
    for name, task in TASKS.items():
        known = task.kind.families.get(str(about.get("model_type")), ())
        if classes.intersection({known} if isinstance(known, str) else known):
            return name
    raise UserError(
        f"model.path={path}: {', '.join(sorted(classes)) or 'its config'} does not say what it was trained for: give "
        f"task={'|'.join(TASKS)}"
    )


def _loaded(source: models.ModelSource, adapters: Path | None, dtype: torch.dtype, attention: str) -> nn.Module:
    model = models.load_model(source, dtype, attention)
    return PeftModel.from_pretrained(model, str(adapters), autocast_adapter_dtype=False) if adapters else model


def _has_tokenizer(directory: Path) -> bool:
    return any(file for pattern in directories.TOKENIZERS for file in directory.glob(pattern))


def _ready(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    task = TASKS[config.task.name]
    if task.ready:
        task.ready(tokenizer, config.task)
    return tokenizer


def _labels(head: Head | None) -> Labels:
    if head is None:
        return Labels(())
    return Labels(head.labels, scale=head.scale or (1.0,) * len(head.labels))
