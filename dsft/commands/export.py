"""`launch/export.py`: a run's checkpoint becomes a model directory, on one process and the CPU.

What the model is made of stands in the checkpoint alone; the run's directory may hold anything beside it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsft import assemble, checkpoint
from dsft.config import load
from dsft.config.schema import Config, Method, Precision
from dsft.errors import UserError
from dsft.model import export as writing
from dsft.model import head as heads
from dsft.model import load as models
from dsft.model import tuning, vocabulary
from dsft.model.head import Head
from dsft.model.kind import Kind
from dsft.tasks import TASKS
from dsft.types import Probe


def export(
    run_dir: Path, which: str = "last", merge: bool = True, output: Path | None = None, model_path: str | None = None
) -> tuple[Path, writing.Report]:
    """Write the model of a checkpoint, reload it, and compare its logits with those of the model that was trained.

    Args:
        run_dir: Directory of a run; `which` is `best`, `last` or a step.
        merge: With LoRA, a whole model; otherwise the adapters alone.
        output: Where to write; default `run_dir/model`.
        model_path: Where the base model lies, if it has been moved since the run.

    Returns:
        The written directory, and how far its logits are from those that the checkpoint keeps.

    Raises:
        UserError: No such run or checkpoint, a damaged one, another base model, a full disk, another model written.
    """
    output = Path(output).expanduser() if output else Path(run_dir).expanduser() / "model"
    writing.check_replaceable(output)
    kept = read(run_dir, which)
    _check_merge(kept.config, merge, kept.path)
    model = kept.model(kept.source(model_path), kept.dtype, "eager", merge)
    heads.keep_decision(model.config, kept.decision)
    report = writing.write_model(
        model,
        kept.record.companions,
        output,
        gather=lambda parameters: nullcontext(),
        is_writer=True,
        merge=merge,
        dtype=kept.dtype,
        kind=kept.kind,
        probe=kept.probe,
    )
    assert report is not None
    return output, report


@dataclass(frozen=True)
class Kept:
    """A checkpoint, read.

    Attributes:
        path: Its directory.
        state: Its plain part.
        record: What it keeps of its run.
        probe: What its model answered.
        config: The run's.
    """

    path: Path
    state: dict[str, Any]
    record: checkpoint.Record
    probe: Probe
    config: Config

    @property
    def kind(self) -> Kind:
        """What the run's task trains."""
        return TASKS[self.config.task.name].kind

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights in training."""
        return assemble.DTYPES[Precision[self.state["identity"]["precision"]]]

    @property
    def decision(self) -> dict[str, Any]:
        """What decides answers beside the model; checkpoints of before it was kept have none."""
        return self.state.get("decision", {})

    def source(self, model_path: str | None) -> models.ModelSource:
        """The run's base model, with the head that was put on it.

        Raises:
            UserError: As `base_model`.
        """
        identity, config = self.state["identity"], self.config
        source = base_model(identity[checkpoint.MODEL], model_path, config.data.cache_dir, self.kind)
        if not self.kind.headed:
            return source
        allowed = tuple(config.model.allow_missing)
        return replace(source, head=Head.restored(identity[checkpoint.HEAD]), allow_missing=allowed)

    def model(self, source: models.ModelSource, dtype: torch.dtype, implementation: str, merge: bool) -> nn.Module:
        """The trained model, with its adapters; arguments as for `assemble.load_tuned`, and whether they can be merged.

        Raises:
            UserError: The checkpoint does not fit.
        """
        model = _model(self.config, self.state, source, dtype, implementation, merge)
        put_weights(model, checkpoint.weights(self.path), str(self.path))
        return model


def read(run_dir: Path, which: str) -> Kept:
    """The checkpoint of a run that is called `best`, `last` or by its step.

    Raises:
        UserError: There is no such run or checkpoint, or it is damaged.
    """
    path = checkpoint.find(Path(run_dir).expanduser(), which)
    if problem := checkpoint.damage(path):
        raise UserError(f"{path} is no whole checkpoint: {problem}")
    record, probe = checkpoint.read_record(path)
    config = load.parse_yaml(record.config, str(path / checkpoint.CONFIG))
    return Kept(path, checkpoint.read_state(path), record, probe, config)


def _check_merge(config: Config, merge: bool, path: Path) -> None:
    if not merge and config.tuning.method is not Method.lora:
        raise UserError(
            f"merge=false writes adapters alone, but {path} was trained with tuning={config.tuning.method.value}, "
            "which has none. Leave it out."
        )


def base_model(then: dict[str, Any], model_path: str | None, cache_dir: str, kind: Kind) -> models.ModelSource:
    """The base model of a run, found again.

    Args:
        then: What the checkpoint says of it.
        model_path: Where it lies now, if not where it lay.
        cache_dir: Where converted models are kept.
        kind: What the run's task trains.

    Raises:
        UserError: It is not there, or another than then; the message names the files that differ.
    """
    try:
        source = models.resolve(model_path or then["origin"], then["revision"], cache_dir, kind)
    except UserError as problem:
        raise UserError(f"{problem} If the base model was moved since the run, say where: model.path=...") from problem
    if not checkpoint.same_model(then, {"fingerprint": source.fingerprint, "files": source.files}):
        changed = checkpoint.changed_files(then["files"], source.files)
        what = f": {', '.join(changed)} changed" if changed else ""
        raise UserError(
            f"{source.path} is not the base model of the run{what}. Restore it, or say where the right one lies: "
            "model.path=..."
        )
    return source


def _model(
    config: Config,
    state: dict[str, Any],
    source: models.ModelSource,
    dtype: torch.dtype,
    implementation: str,
    merge: bool,
) -> nn.Module:
    """The model as it was built for training, with its new tokens, its adapters as they were."""
    words = vocabulary.Vocabulary.of(state["new_tokens"])
    if words.pieces and not merge:
        raise UserError(
            f"merge=false writes adapters alone, but the run has {len(words.pieces)} new tokens, whose rows the base "
            f"model {source.path} lacks. Leave merge=false out."
        )
    model = assemble.load_tuned(config, source, words, dtype, implementation, lambda parameters: nullcontext())
    tuning.check_adapters(model, state["adapters"])
    return model


def put_weights(model: nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Overlay the model's weights with those of a checkpoint.

    Args:
        model: As `tuning.apply` made it; tied weights may come under either name.
        weights: By the model's names; frozen ones may be left out.
        origin: Where they came from, for messages.

    Raises:
        UserError: A trained weight is missing, or one is of another model.
    """
    state = model.state_dict()
    strange = sorted(name for name, tensor in weights.items() if name not in state or state[name].shape != tensor.shape)
    given = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in weights}
    missing = sorted(name for name, p in model.named_parameters() if p.requires_grad and id(p) not in given)
    if strange or missing:
        which = f"lacks {missing[0]!r}" if missing else f"holds {strange[0]!r}, which the model has not in that shape"
        raise UserError(
            f"{origin} does not fit the model that its config describes: it {which} "
            f"(and {len(missing) + len(strange) - 1} more)."
        )
    for name, tensor in weights.items():
        state[name].copy_(tensor)
