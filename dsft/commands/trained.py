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
from dsft.config import check, load
from dsft.config.schema import Config
from dsft.errors import UserError
from dsft.model import directory as directories
from dsft.model import export as writing
from dsft.model import head as heads
from dsft.model import load as models
from dsft.model.head import MULTI, SINGLE
from dsft.model.stopping import find_stopping
from dsft.tasks import TASKS, Task, template
from dsft.tasks.labels import Labels

ADAPTERS = "adapter_config.json"

NO_ENGINE = "ds_configs/zero0.json"
"""What a config without training has in place of a DeepSpeed JSON, which is not read."""


@dataclass(frozen=True)
class Trained:
    """A trained model, before it is loaded.

    Attributes:
        config: Settings of the run, or the usual ones, with those that were given.
        fingerprint: Differs where any of its weights does.
        model_config: The config of its language model.
        tokenizer: Its tokenizer.
        labels: Names of its outputs, where its task has any.
        decision: What decides its answers beside it (`Task.decision`).
        stop_tokens: Token ids that end its answers.
        dtype: Type of weights and activations: that of training, unless another is given.
        load: (attention) -> the model, whole, on the host.
    """

    config: Config
    fingerprint: str
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerFast
    stop_tokens: list[int]
    dtype: torch.dtype
    load: Callable[[str], nn.Module]
    labels: Labels = field(default_factory=lambda: Labels(()))
    decision: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return TASKS[self.config.task.name]


@dataclass(frozen=True)
class Who:
    """Which model is meant: a run's, or one that lies by itself.

    Attributes:
        run_dir: A run's directory.
        checkpoint: Which of its checkpoints: `best`, `last` or a step.
        model_path: Beside a run, where its base model has been moved to; else a model directory, a hub id, a GGUF file
            or a directory of adapters, which name their base model.
        task: What a model without a run was trained for; None finds that out from its class.
    """

    run_dir: Path | None = None
    checkpoint: str = "last"
    model_path: str | None = None
    task: str | None = None


def find(who: Who, given: Mapping[str, Any]) -> Trained:
    """The model that is meant.

    Args:
        who: Which.
        given: Settings, by name, that are not to be the run's, or not the usual ones.

    Raises:
        UserError: There is no such model, a part of it is damaged or gone, it does not say what it was trained for, or
            a setting is wrong.
    """
    if who.run_dir is None:
        assert who.model_path is not None, "one of the two is given"
        return _of_model(who.model_path, who.task, given)
    kept = export.read(who.run_dir, who.checkpoint)
    source = kept.source(who.model_path)
    config = load.changed(kept.config, given)
    with tempfile.TemporaryDirectory() as scratch:
        writing.write_companions(kept.record.companions, Path(scratch))
        beside = models.ModelSource(scratch, None, "", str(who.run_dir), kind=kept.kind)
        tokenizer = models.load_tokenizer(beside, config.model.chat_template)
    dtype = assemble.DTYPES[assemble.precision_of(config.precision)] if "precision" in given else kept.dtype
    manifest = (kept.path / checkpoint.MANIFEST).read_text(encoding="utf-8")

    def loaded(attention: str) -> nn.Module:
        return kept.model(source, dtype, attention, merge=True)

    made = _trained(config, source, tokenizer, dtype, f"{source.fingerprint} {manifest}", loaded)
    return replace(made, decision=kept.decision)


def _of_model(path: str, task: str | None, given: Mapping[str, Any]) -> Trained:
    """A model without a run, or adapters on their base."""
    local = Path(path).expanduser()
    adapters = local if (local / ADAPTERS).is_file() else None
    named: dict[str, Any] = directories.read_json(local / ADAPTERS) if adapters else {}
    base, revision = (named.get("base_model_name_or_path"), named.get("revision")) if adapters else (path, None)
    if not base:
        raise UserError(f"model.path={path}: its {ADAPTERS} does not name the model that its adapters belong to")
    revision = given.get("model.revision", revision)
    # beside adapters with a head stands the config that says what its outputs are
    own = str(local) if adapters and (local / "config.json").is_file() else base
    name = task or _told_task(path, own, revision)
    check.check_task(name, TASKS)
    config = load.changed(Config(), {"task.name": name, "model.path": path, "deepspeed.json": NO_ENGINE, **given})
    source = models.resolve(base, revision, config.data.cache_dir, TASKS[name].kind)
    decision: dict[str, Any] = {}
    if source.kind.headed:
        written = AutoConfig.from_pretrained(own if adapters else source.path, revision=source.revision)
        if not adapters and not models.own_labels(source):
            raise UserError(f"model.path={path}: {written.model_type} model without a head for task={name}: train one")
        source = replace(source, head=heads.described(written))
        decision = heads.decision_of(written)
        config.task.multi_label = source.head is not None and source.head.problem == MULTI
    has_tokenizer = adapters and any(file for pattern in directories.TOKENIZERS for file in adapters.glob(pattern))
    beside = replace(source, path=str(local), revision=None) if has_tokenizer else source
    dtype = assemble.DTYPES[assemble.precision_of(config.precision)]

    def loaded(attention: str) -> nn.Module:
        model = models.load_model(source, dtype, attention)
        return PeftModel.from_pretrained(model, str(adapters), autocast_adapter_dtype=False) if adapters else model

    tokenizer = models.load_tokenizer(beside, config.model.chat_template)
    fingerprint = source.fingerprint + (models.fingerprint(adapters) if adapters else "")
    made = replace(_trained(config, source, tokenizer, dtype, fingerprint, loaded), decision=decision)
    positions = getattr(made.model_config, "max_position_embeddings", None)
    if "data.max_length" not in given and positions:
        config.data.max_length = min(config.data.max_length, positions)
    if positions and config.data.max_length > positions:
        raise UserError(f"data.max_length={config.data.max_length} is more than the {positions} positions of {path}")
    return made


def _trained(
    config: Config,
    source: models.ModelSource,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    fingerprint: str,
    loaded: Callable[[str], nn.Module],
) -> Trained:
    ready, head = TASKS[config.task.name].ready, source.head
    if ready:
        ready(tokenizer, config.task)
    labels = Labels(head.labels, scale=head.scale or (1.0,) * len(head.labels)) if head else Labels(())
    stops = find_stopping(source, tokenizer, template.turn_end(tokenizer)).tokens
    model_config = models.load_config(source).get_text_config()
    return Trained(config, fingerprint, model_config, tokenizer, stops, dtype, loaded, labels)


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
    classes, problem = {*(about.get("architectures") or [])}, about.get("problem_type") or SINGLE
    for name, task in TASKS.items():
        known = task.kind.families.get(str(about.get("model_type")), ())
        fits = classes.intersection({known} if isinstance(known, str) else known)
        if fits and (not task.problems or problem in task.problems):
            return name
    raise UserError(
        f"model.path={path}: {', '.join(sorted(classes)) or 'its config'} does not say what it was trained for: give "
        f"task={'|'.join(TASKS)}"
    )
