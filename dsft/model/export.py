"""The trained model as a directory that transformers (or peft) loads, and the proof that it is the same model."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from dsft.errors import UserError
from dsft.model import head as heads
from dsft.model.kind import CAUSAL, Kind, plain_logits
from dsft.model.load import ModelSource, disk_errors, even_modes, load_model, plain_loading
from dsft.model.rows import NEW, Gather, whole
from dsft.model.shards import Shards
from dsft.types import Probe

GENERATION_CONFIG = "generation_config.json"

ADAPTER = "default"
"""The name peft gives a model's first adapter."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest relative deviation of logits (2-norm of the difference over 2-norm) that still is the same model.

Measured on SmolLM2-135M, 30 layers: another attention kernel, or merged adapters in place of separate ones, give up to
2e-6 in fp32, 2e-3 in fp16 and 3e-2 in bf16, while negating one projection of one layer gives 8e-2 or more.
"""


@dataclass(frozen=True)
class Report:
    """How far the reloaded model's logits are from the training model's.

    Attributes:
        max_abs: Largest absolute difference of one logit.
        relative: 2-norm of the difference over the 2-norm of the expected logits.
        argmax_agreement: Share of positions where both find the same token likeliest.
    """

    max_abs: float
    relative: float
    argmax_agreement: float

    def __str__(self) -> str:
        return (
            f"reloaded logits deviate by {self.relative:.1e} (relative), the first guess agrees at "
            f"{self.argmax_agreement:.1%} of positions"
        )


@dataclass
class _Piece:
    """Parameters that are gathered together, and the tensors of the written model that come of them."""

    layer: str
    parameters: list[nn.Parameter]
    tensors: Callable[[], dict[str, torch.Tensor]]


def write_model(
    model: PreTrainedModel | PeftModel,
    companions: dict[str, bytes],
    directory: Path,
    *,
    gather: Gather,
    is_writer: bool,
    merge: bool,
    dtype: torch.dtype,
    kind: Kind = CAUSAL,
    probe: Probe | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> Report | None:
    """Write the model so that the `Auto` class of its kind loads it, tokenizer included; every rank has to call this.

    Beside its own part a rank holds one module's parameters, the writer one shard in host memory. The directory
    appears, or replaces an older one, only when it is whole and agrees with the probe.

    Args:
        model: Plain, or with LoRA adapters; `companions` are files to stand beside it (`companion_files`).
        directory: Where the model is to be.
        gather: Called with a list of parameters; `deepspeed.zero.GatheredParameters` under ZeRO-3, else a null context.
        is_writer: Whether this rank writes; exactly one does.
        merge: Add the adapters to the weights (in fp32), or write them alone.
        dtype: Type of the written weights; `kind` is what kind of model it is.
        probe: What the trained model answered; None leaves the comparison out.
        max_shard_bytes: Largest safetensors file, unless one tensor alone is larger.

    Returns:
        How well the written model agrees with the probe; None on other ranks than the writer, and without a probe.

    Raises:
        UserError: It cannot be written, or is another than was trained; on the writer alone, after all gathers.
    """
    directory = Path(directory).absolute()
    adapters = isinstance(model, PeftModel) and not merge
    stem = "adapter_model" if adapters else "model"
    shards = Shards(_unfinished(directory), stem, sys.maxsize if adapters else max_shard_bytes)
    for tensors in stream(model, adapters, gather, is_writer, dtype, kind):
        shards.add(tensors)
    if not is_writer:
        return None
    return _finish(shards, model, companions, directory, adapters, dtype, kind, probe)


def _unfinished(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.unfinished")


def _finish(
    shards: Shards,
    model: PreTrainedModel | PeftModel,
    companions: dict[str, bytes],
    directory: Path,
    adapters: bool,
    dtype: torch.dtype,
    kind: Kind,
    probe: Probe | None,
) -> Report | None:
    """Write the last of it, compare it with the probe, and let it take its name."""
    unfinished = _unfinished(directory)
    try:
        with disk_errors(directory):
            shards.close()
            write_companions(companions, unfinished)
            write_configs(model, unfinished, adapters, dtype, kind)
        report = verify(unfinished, probe, dtype, directory, kind) if probe else None
        with disk_errors(directory):
            _publish(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def check_replaceable(directory: Path) -> None:
    """Refuse to replace a directory that holds something other than a model.

    Raises:
        UserError: It does.
    """
    directory = Path(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{directory} is there already and holds no model, so it is not replaced. Choose another place."
        )


def verify(
    written: Path, probe: Probe, dtype: torch.dtype, destination: Path | None = None, kind: Kind = CAUSAL
) -> Report:
    """Reload a written model on the CPU, as a user would, and compare its logits with the trained model's.

    Args:
        written: What `write_model` wrote; adapters are put on the base model that they name.
        probe: What the trained model answered.
        dtype: Type to compute in, the trained model's.
        destination: Where it is to be, for messages, if not there already.
        kind: What kind of model it is.

    Raises:
        UserError: It does not load, or the logits differ by more than TOLERANCE allows for `dtype`.
    """
    with plain_loading():
        model = _reload(Path(written), dtype, kind).eval()
    with torch.no_grad():
        found = plain_logits(model, probe.ids.cpu()).double()
    expected = probe.logits.detach().cpu().double()
    found = found[None] if kind.by_document else found
    if found.shape != expected.shape:
        raise UserError(
            f"The model written to {destination or written} is not the one that was trained: it has "
            f"{found.shape[-1]} logits at each position, and the trained one {expected.shape[-1]}. It was taken away."
        )
    difference = found - expected
    report = Report(
        max_abs=difference.abs().max().item(),
        relative=(difference.norm() / expected.norm()).item(),
        argmax_agreement=(found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    )
    # Written so that NaN, which compares false with everything, is refused.
    if not report.relative <= TOLERANCE[dtype]:
        raise UserError(
            f"The model written to {destination or written} is not the one that was trained: its logits differ by "
            f"{report.relative:.2e} (relative; {TOLERANCE[dtype]:.0e} is allowed in {_name(dtype)}), at most "
            f"{report.max_abs:.3g}, and {report.argmax_agreement:.0%} of the likeliest tokens agree. It was taken "
            "away; what stood there before is untouched."
        )
    return report


def stream(
    model: PreTrainedModel | PeftModel,
    adapters: bool,
    gather: Gather,
    is_writer: bool,
    dtype: torch.dtype,
    kind: Kind = CAUSAL,
) -> Iterator[dict[str, torch.Tensor]]:
    """The written model's tensors on the host, a decoder layer at a time; nothing but the gathers for other ranks."""
    base = _base(model)
    pieces = _adapter_pieces(base) if adapters else _whole_pieces(base)
    if adapters and kind.headed:
        own = heads.parameters(base)
        with gather(list(own.values())):
            if is_writer:
                yield {f"base_model.model.{name}": _on_host(_scaled(base, name), dtype) for name in own}
    for _, group in groupby(pieces, key=lambda piece: piece.layer):
        tensors: dict[str, torch.Tensor] = {}
        for piece in group:
            with gather(piece.parameters):
                if is_writer:
                    tensors.update({name: _on_host(tensor, dtype) for name, tensor in piece.tensors().items()})
        if not tensors:
            continue
        if adapters:
            yield get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
        else:
            # Transformers loads some architectures into other tensors than their files hold, never across layers.
            restored = revert_weight_conversion(base, tensors)
            yield {name: _unshared(tensor) for name, tensor in restored.items()}


def _adapter_pieces(base: PreTrainedModel) -> Iterator[_Piece]:
    """Each adapter, under the names of the peft model."""
    for prefix, module in base.named_modules():
        if isinstance(module, LoraLayer):
            # peft wraps a mixture's experts once for each of their parameters, so a base layer may have adapters too
            inner = {n: p for n, p in module.named_parameters() if not n.startswith("base_layer.")}
            own = {f"base_model.model.{prefix}.{name}": parameter for name, parameter in inner.items()}
            yield _Piece(_layer(prefix), list(own.values()), own.copy)


def _whole_pieces(base: PreTrainedModel) -> Iterator[_Piece]:
    """Each module's own parameters and buffers, tied ones once, adapters merged."""
    ignored = set(base._keys_to_ignore_on_save or ())
    seen: set[int] = set()
    adapted = ""
    for prefix, module in base.named_modules():
        if adapted and prefix.startswith(f"{adapted}."):
            continue
        if isinstance(module, LoraLayer):
            adapted = prefix
            yield _Piece(_layer(prefix), list(module.parameters()), partial(_merged, prefix, module))
            continue
        own = {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in _own_tensors(module)}
        own = {name: tensor for name, tensor in own.items() if name not in ignored and id(tensor) not in seen}
        seen.update(map(id, own.values()))
        if own:
            parameters = [t for t in own.values() if isinstance(t, nn.Parameter)]
            yield _Piece(_layer(prefix), parameters, partial(_with_new_rows, module, own))


def _with_new_rows(module: nn.Module, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's own tensors by their names, with the rows of new tokens that are trained beside them put in."""
    last = {name: name.rpartition(".")[2] for name in own}
    made = {name: whole(module, short) for name, short in last.items() if short not in NEW}
    return {name: heads.with_scale(module, last[name], tensor) for name, tensor in made.items()}


def _scaled(base: PreTrainedModel, name: str) -> torch.Tensor:
    """A parameter of the head as it is written."""
    place, _, last = name.rpartition(".")
    module = base.get_submodule(place)
    return heads.with_scale(module, last, getattr(module, last))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's parameters and persistent buffers, not its children's."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _merged(prefix: str, module: LoraLayer) -> dict[str, torch.Tensor]:
    """The plain layer that computes what the adapted one does, in fp32.

    LoRA (arXiv:2106.09685): W + s B A. DoRA (arXiv:2402.09353): the rows of that, rescaled to the trained magnitudes.
    """
    if isinstance(module, ParamWrapper):
        return _merged_parameters(prefix, module)
    layer = module.get_base_layer()
    # Conv1D of GPT-2 keeps its weight as (in, out).
    weight = whole(layer, "weight").float()
    weight = weight.T if module.fan_in_fan_out else weight
    update = module.lora_B[ADAPTER].weight.float() @ module.lora_A[ADAPTER].weight.float()
    weight = weight + module.scaling[ADAPTER] * update
    if ADAPTER in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector[ADAPTER].weight.float()
        weight = weight * (magnitude / weight.norm(dim=1)).unsqueeze(1)
    tensors = {f"{prefix}.weight": weight.T if module.fan_in_fan_out else weight}
    if layer.bias is not None:
        tensors[f"{prefix}.bias"] = whole(layer, "bias")
    return tensors


def _merged_parameters(prefix: str, module: ParamWrapper) -> dict[str, torch.Tensor]:
    """The same of a module that peft adapts parameter by parameter, one wrapper around the next: a mixture's router,
    or its experts, whose weights lie in one tensor of shape (experts, out, in) or (experts, in, out).
    """
    inside = module.get_base_layer().named_modules(prefix=prefix)
    tensors = {f"{place}.{name}": tensor for place, part in inside for name, tensor in _own_tensors(part)}
    wrapper: nn.Module = module
    while isinstance(wrapper, ParamWrapper):
        factors = wrapper.lora_A[ADAPTER].weight.float(), wrapper.lora_B[ADAPTER].weight.float()
        name = f"{prefix}.{wrapper.parameter_name}"
        tensors[name] = tensors[name].float() + wrapper.scaling[ADAPTER] * _expert_updates(wrapper, *factors)
        wrapper = wrapper.base_layer
    return tensors


def _expert_updates(wrapper: ParamWrapper, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B A for each expert, laid out as the parameter is. peft puts the experts' rows of A one expert after the other,
    and the columns of B with the expert running fastest."""
    experts = wrapper.num_experts
    shape = wrapper.get_param().shape
    a = a.reshape(experts, -1, a.shape[1])  # (experts, rank, in)
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (experts, out, rank)
    update = b @ a if wrapper._did_swap_in_out_features or len(shape) == 2 else (b @ a).transpose(1, 2)
    return update.reshape(shape)


def _layer(prefix: str) -> str:
    """`model.layers.3` for whatever lies in that layer, the module's own name outside of any."""
    match = re.match(r"(.*?\.\d+)(\.|$)", prefix)
    return match[1] if match else prefix


def _on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy in host memory, floating-point values as `dtype`; shapes without values stay such."""
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", wanted, copy=True).contiguous()


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with memory of its own, which safetensors asks for."""
    tensor = tensor.contiguous()
    return tensor.clone() if not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def companion_files(tokenizer: PreTrainedTokenizerFast, generation_config: bytes | None) -> dict[str, bytes]:
    """Name to content of the files that stand beside weights and config: tokenizer, chat templates, generation config.

    Args:
        tokenizer: As it is trained with.
        generation_config: Content of `generation_config.json`; None for a model without one.

    Raises:
        UserError: The tokenizer cannot be saved.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as problem:  # whatever a tokenizer of any class holds that is no JSON
            raise UserError(
                f"the tokenizer cannot be saved, so no model could be written at the end: "
                f"{type(problem).__name__}: {problem}"
            ) from problem
        files = [path for path in sorted(Path(scratch).rglob("*")) if path.is_file()]
        found = {path.relative_to(scratch).as_posix(): path.read_bytes() for path in files}
    if generation_config is not None:
        found[GENERATION_CONFIG] = generation_config
    return found


def write_companions(companions: dict[str, bytes], directory: Path) -> None:
    """Put `companion_files` into an existing directory."""
    for name, content in companions.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def write_configs(
    model: PreTrainedModel | PeftModel, directory: Path, adapters: bool, dtype: torch.dtype, kind: Kind = CAUSAL
) -> None:
    """The model's own config, or the adapters'; with these the model's too where it says what a head's outputs are."""
    if adapters:
        (directory / GENERATION_CONFIG).unlink(missing_ok=True)  # the base model's own counts
        adapter_config = copy.deepcopy(model.peft_config[ADAPTER])
        adapter_config.inference_mode = True
        if kind.headed:
            adapter_config.task_type, adapter_config.exclude_modules = kind.adapters, None
            adapter_config.modules_to_save = [name.rpartition(".")[2] for name in heads.modules(_base(model))]
        adapter_config.save_pretrained(directory)
        if not kind.headed:
            return
    base = _base(model)
    config = copy.deepcopy(base.config)
    config.dtype = dtype
    config.architectures = [type(base).__name__]
    if hasattr(config.get_text_config(), "use_cache"):
        config.get_text_config().use_cache = True
    # The weights are those of transformers' own class, and files of code are not written.
    vars(config).pop("auto_map", None)
    # Transformers refuses to save them here; they stand in the generation config.
    for name in config._get_generation_parameters():
        delattr(config, name)
    config.save_pretrained(directory)


def _publish(unfinished: Path, directory: Path) -> None:
    """Bring the whole new directory to disk and let it take the name, and the old one's place."""
    check_replaceable(directory)
    even_modes(unfinished)
    for file in unfinished.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    unfinished.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _reload(directory: Path, dtype: torch.dtype, kind: Kind) -> nn.Module:
    """The written model on the CPU; adapters on their base model."""
    adapter_config = directory / "adapter_config.json"
    if not adapter_config.is_file():
        return load_model(ModelSource(str(directory), None, "", str(directory), kind=kind), dtype, "eager")
    named = json.loads(adapter_config.read_text(encoding="utf-8"))
    path = named["base_model_name_or_path"]
    head = heads.described(AutoConfig.from_pretrained(directory)) if kind.headed else None
    base = load_model(ModelSource(path, named.get("revision"), "", path, kind=kind, head=head), dtype, "eager")
    return PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside its adapters, if there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
