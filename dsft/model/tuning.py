"""Which weights are trained: all, a chosen part, or low-rank adapters."""

from __future__ import annotations

import difflib
import re
import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsft.config.schema import Method, TuningConfig
from dsft.errors import UserError
from dsft.model import head as heads
from dsft.model import rows
from dsft.model.kind import CAUSAL, Kind, is_two_sided
from dsft.model.vocabulary import Vocabulary

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters; tied ones count once."""

    trainable: int
    total: int


def apply(
    model: PreTrainedModel,
    tuning: TuningConfig,
    seed: int,
    vocabulary: Vocabulary | None = None,
    kind: Kind = CAUSAL,
) -> PreTrainedModel | PeftModel:
    """Mark what is trained (`requires_grad`); with LoRA, wrap the model.

    Args:
        model: Whole, or partitioned by ZeRO-3.
        tuning: What to train.
        seed: Of the adapters' first values; the same on all ranks. No global random state changes.
        vocabulary: The new tokens, for `tuning.new_tokens`; their rows are in the model already.
        kind: What kind of model it is, which peft wants to know.

    Raises:
        UserError: A pattern, layer count or module name does not fit this model.
    """
    if kind.two_sided:
        _refuse_for_two_sides(tuning)
    match tuning.method:
        case Method.full:
            pass
        case Method.freeze:
            _freeze(model, tuning, kind)
        case Method.lora:
            model = _add_lora(model, tuning, seed, kind)
    if tuning.new_tokens and vocabulary is not None:
        rows.train(model, vocabulary)
    return model


def _refuse_for_two_sides(tuning: TuningConfig) -> None:
    """Refuse what is done at the one embedding of a model, of which an encoder-decoder has two that share a table."""
    for name in ("new_tokens", "neftune_alpha"):
        if value := getattr(tuning, name):
            raise UserError(
                f"tuning.{name}={str(value).lower()}: encoder-decoders look tokens up at several places, at which this "
                f"is not done. Leave tuning.{name} out."
            )


def describe(model: nn.Module) -> Counts:
    """Trainable and total parameters; right under ZeRO-3 too, where a rank holds only its part of each."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return Counts(trainable=sum(n for n, trained in sizes if trained), total=sum(n for n, _ in sizes))


def adapters(model: nn.Module) -> dict[str, list[float]]:
    """Rank and scale of each adapter by the name of its module, as it computes with them; empty without adapters."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: [m.r[a], m.scaling[a]] for name, m in found.items() for a in m.lora_A}


def check_adapters(model: nn.Module, then: dict[str, list[float]]) -> None:
    """Make sure that a model has the adapters that were trained: another peft may read the same settings otherwise.

    Args:
        model: As `apply` made it now.
        then: What `adapters` gave for the model that was trained.

    Raises:
        UserError: One differs; it is named.
    """
    now = adapters(model)
    different = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"the adapters would not be those that were trained: {name} had rank and scale {then.get(name)}, and would "
            f"have {now.get(name)} ({len(different) - 1} more differ). Use the version of peft that the run's "
            "environment.json names."
        )


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The stack of decoder layers and the module that holds it, whatever the architecture calls them.

    Raises:
        UserError: No module list of the model is as long as its config says it has layers.
    """
    config = model.config.get_text_config()
    # of an encoder-decoder both may be of one length
    inside = model.get_decoder() if is_two_sided(config) else model
    depth = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", config.num_hidden_layers)
    for module in inside.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, child
    raise UserError(
        f"tuning.last_layers: no stack of {depth} layers was found in {type(model).__name__}. "
        "Choose parameters by name with tuning.trainable instead."
    )


def _freeze(model: PreTrainedModel, tuning: TuningConfig, kind: Kind) -> None:
    """Train only what a pattern finds in a parameter's name, the last layers, and the head that a task has put on."""
    if not (tuning.trainable or tuning.last_layers is not None or tuning.new_tokens or kind.headed):
        raise UserError(
            "tuning=freeze: nothing would be trained. Set tuning.trainable (regular expressions), tuning.last_layers "
            "or tuning.new_tokens."
        )
    chosen = list(heads.parameters(model).values()) if kind.headed else []
    chosen += [p for pattern in tuning.trainable for p in _matching(model, pattern)]
    if tuning.last_layers is not None:
        chosen += _top(model, tuning.last_layers)
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)


def _matching(model: PreTrainedModel, pattern: str) -> list[nn.Parameter]:
    """Parameters in whose name the regular expression is found; at least one."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"tuning.trainable: {pattern!r} is no regular expression: {error}") from error
    parameters = dict(model.named_parameters())
    found = [p for name, p in parameters.items() if expression.search(name)]
    if not found:
        near = _nearest(pattern, list(parameters))
        raise UserError(f"tuning.trainable: {pattern!r} is found in no parameter's name. Nearest: {', '.join(near)}")
    return found


def _top(model: PreTrainedModel, count: int) -> list[nn.Parameter]:
    """Parameters of the last `count` decoder layers, the final norm and an untied output head."""
    decoder, layers = decoder_layers(model)
    if not 0 <= count <= len(layers):
        raise UserError(f"tuning.last_layers={count}: the model has {len(layers)} layers. Give 0 to {len(layers)}.")
    norms = [
        child
        for name, child in decoder.named_children()
        if "norm" in type(child).__name__.lower() and "embed" not in name
    ]
    chosen = [p for module in [*layers[len(layers) - count :], *norms] for p in module.parameters()]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        chosen += head.parameters()
    return chosen


def _add_lora(model: PreTrainedModel, tuning: TuningConfig, seed: int, kind: Kind) -> PeftModel:
    """Wrap the model with adapters whose first values depend on the seed alone."""
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=_targets(model, list(tuning.target_modules)),
        use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora,
        # for others peft makes copies of the head, which is trained as it is here
        task_type="FEATURE_EXTRACTION" if kind.headed else kind.adapters,
        exclude_modules=_linear(heads.modules(model)) if kind.headed else None,
    )
    # peft draws on the host. Only that generator is set and put back: torch.manual_seed would reseed CUDA's as well.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that transformers is giving up.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # It looks for the parameters of a mixture's experts among the modules first.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        torch.default_generator.manual_seed(seed)
        # Adapters in the weights' own type: fp32 ones on bf16 weights break ZeRO-3, and DeepSpeed keeps fp32 masters.
        try:
            made = get_peft_model(model, config, autocast_adapter_dtype=False)
            for parameter in heads.parameters(model).values() if kind.headed else ():
                parameter.requires_grad_(True)
            return made
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # peft refuses by ValueError, and fails in other ways at layers unknown to it
            raise UserError(_refusal(tuning, problem)) from problem


def _linear(modules: dict[str, nn.Module]) -> list[str]:
    """Names of all linear layers in these modules."""
    inside = [(name, layer) for name, module in modules.items() for layer in module.named_modules(prefix=name)]
    return [name for _, (name, layer) in inside if isinstance(layer, nn.Linear | Conv1D)]


def _refusal(tuning: TuningConfig, problem: Exception) -> str:
    """Why peft takes no adapters of this kind, in settings."""
    given = [f"tuning.dropout={tuning.dropout}"] if tuning.dropout else []
    given += ["tuning.use_dora=true"] if tuning.use_dora else []
    if "ParamWrapper" in str(problem) and given:
        targets = ",".join(tuning.target_modules)
        return (
            f"{' and '.join(given)} cannot be had with tuning.target_modules=[{targets}] here: this model keeps its "
            "experts in one tensor, which is adapted as a whole. Leave it out, or name linear layers of the attention, "
            "such as tuning.target_modules=[q_proj,k_proj,v_proj,o_proj]."
        )
    what = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
    return (
        f"tuning=lora: peft takes no adapters for this model: {what}{problem}. Name other layers in "
        "tuning.target_modules, such as those of the attention."
    )


def _targets(model: PreTrainedModel, names: list[str]) -> str | list[str]:
    """The target modules as peft takes them, each checked to be there and linear."""
    if names == [ALL_LINEAR]:
        return ALL_LINEAR
    if not names:
        raise UserError(f"tuning.target_modules is empty. Give module names, or {ALL_LINEAR}.")
    head = model.get_output_embeddings()
    tied_head = head if head is not None and head.weight is model.get_input_embeddings().weight else None
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not tied_head]
    for name in names:
        if not any(f".{module}".endswith(f".{name}") for module in linear):
            near = _nearest(name, sorted({module.rpartition(".")[2] for module in linear}))
            raise UserError(
                f"tuning.target_modules: {name!r} is the name of no linear layer that can take an adapter. "
                f"Nearest: {', '.join(near)}; or [{ALL_LINEAR}] alone for all."
            )
    return names


def _nearest(wanted: str, names: list[str], count: int = 5) -> list[str]:
    """The names most like `wanted`, repeated layers shown once."""
    distinct: dict[str, str] = {}
    for name in names:
        distinct.setdefault(re.sub(r"\d+", "N", name), name)

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, wanted, part).ratio() for part in [name, *name.split(".")])

    return sorted(distinct.values(), key=likeness, reverse=True)[:count]
