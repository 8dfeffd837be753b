"""Heads that a task puts on a model: how many outputs they have, what these are called, and their first values.

A checkpoint of a language model has no head for labels, and transformers would fill one from a generator whose state
depends on what was drawn before. Here its first values depend on the seed and the parameter's name alone.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dsft.config.schema import HeadInit, Pool
from dsft.errors import UserError
from dsft.model.kind import Kind

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""What transformers calls the problems (`problem_type` of a model's config)."""

DROPOUTS = (
    "classifier_dropout",
    "classifier_dropout_prob",
    "seq_classif_dropout",
    "cls_dropout",
    "summary_last_dropout",
)
"""Names under which configs keep the rate of dropout before the head."""

POOLING = "classifier_pooling"
"""Name under which ModernBERT and its kin keep how they pool."""

DECISION = "dsft_decision"
"""Name under which a config keeps what decides answers beside the model."""

SHOWN = 10
"""Labels that a message lists at most."""

FALLBACK_STD = 0.02
"""Standard deviation where a config names none (`initializer_range`)."""


@dataclass(frozen=True)
class Head:
    """What a head is to be.

    Attributes:
        labels: Names of its outputs, in order.
        problem: SINGLE, MULTI or REGRESSION.
        seed: Of its first values.
        init: How these are drawn.
        dropout: Rate before it; None leaves the model's own.
        pool: What of a text it is given; None leaves the model's own.
        pad_token_id: By which transformers finds the last token of a padded text.
        scale: What each output is multiplied by, and `shift` what is then added, while it is trained; both are part of
            the last layer's weights in what is written.
    """

    labels: tuple[str, ...]
    problem: str
    seed: int = 0
    init: HeadInit = HeadInit.normal
    dropout: float | None = None
    pool: Pool | None = None
    pad_token_id: int | None = None
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()

    def identity(self) -> dict[str, Any]:
        """All of it, in JSON types; `restored` reads it."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return plain | {"init": self.init.value, "pool": self.pool and self.pool.value}

    @staticmethod
    def restored(state: dict[str, Any]) -> Head:
        """The head that `identity` described."""
        pool = Pool(state["pool"]) if state["pool"] else None
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in state.items()
        }
        return Head(**plain | {"init": HeadInit(state["init"]), "pool": pool})


def described(config: PreTrainedConfig) -> Head:
    """The head of a model that has been written."""
    names = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    pool = getattr(config, POOLING, None)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return Head(names, config.problem_type or SINGLE, pool=Pool(pool) if pool else None, pad_token_id=pad)


def keep_decision(config: PreTrainedConfig, decision: Mapping[str, Any]) -> None:
    """Write into a model's config what decides answers beside the model, which transformers keeps and does not read."""
    if decision:
        setattr(config, DECISION, dict(decision))


def decision_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What `keep_decision` wrote; nothing where it did not."""
    return getattr(config, DECISION, {})


def configure(config: PreTrainedConfig, head: Head, kind: Kind) -> None:
    """Write into a model's config what its head is to be.

    Raises:
        UserError: The architecture has no such dropout or pooling.
    """
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {name: number for number, name in enumerate(head.labels)}
    config.problem_type = head.problem
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = head.pad_token_id
    if head.dropout is not None:
        name = next((name for name in DROPOUTS if hasattr(config, name)), None)
        if name is None:
            raise UserError(
                f"task.head_dropout={head.dropout:g}: {config.model_type} models have no dropout before their head. "
                "Leave it out."
            )
        setattr(config, name, head.dropout)
    if head.pool is not None:
        _pool(config, head.pool, kind)


def _pool(config: PreTrainedConfig, pool: Pool, kind: Kind) -> None:
    model = kind.auto._model_mapping.get(type(config), None)
    last = model is not None and "score" in inspect.getsource(model.__init__)
    own = [Pool.last] if last else [Pool.cls, Pool.mean] if hasattr(config, POOLING) else [Pool.cls]
    if pool not in own:
        raise UserError(
            f"task.pool={pool.value}: the head of {config.model_type} models is given "
            f"{' or '.join(one.value for one in own)}, and what is exported has to be such a model. Leave task.pool "
            "out, or take another model (ModernBERT has cls and mean)."
        )
    if hasattr(config, POOLING):
        setattr(config, POOLING, pool.value)


def describe(head: Head, new: Sequence[str]) -> str:
    """The head, and which parameters are new, for people."""
    shown = ", ".join(head.labels[:SHOWN]) + (f" and {len(head.labels) - SHOWN} more" * (len(head.labels) > SHOWN))
    said = f"the head has {len(head.labels)} outputs: {shown}"
    if not new:
        return f"{said}; it goes on from the model's own"
    return f"{said}; new, by train.seed and task.head_init={head.init.value}, are {', '.join(new)}"


def modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The head's modules by name, outermost alone: whatever is outside of the base model, and its pooler."""
    base = model.base_model
    found = {name: child for name, child in model.named_children() if child is not base and [*child.parameters()]}
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Module) and base is not model:
        found[f"{model.base_model_prefix}.pooler"] = pooler
    return found


def parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The head's parameters by name."""
    inside = modules(model).items()
    return {f"{prefix}.{name}": p for prefix, module in inside for name, p in module.named_parameters()}


def outputs(model: PreTrainedModel) -> list[str]:
    """Names of the head's parameters outside of the base model: what is made for labels alone."""
    inside = f"{model.base_model_prefix}."
    return [name for name in parameters(model) if not name.startswith(inside)]


def rescale(model: PreTrainedModel, head: Head, new: Collection[str]) -> None:
    """Let the outputs of a new head be scaled and shifted, so that it learns numbers of the size of 1 itself.

    A head without a bias, as decoders have it, cannot hold a shift: its outputs are scaled alone.
    """
    layer = last_layer(model) if head.scale else None
    if layer is None or not any(model.get_parameter(name) is layer.weight for name in new):
        return
    layer.scale, layer.shift = torch.tensor(head.scale), torch.tensor(head.shift)
    if layer.bias is None:
        layer.shift = torch.zeros_like(layer.shift)
    layer.register_forward_hook(_rescaled)


def last_layer(model: PreTrainedModel) -> Any:
    """The linear layer whose outputs are the model's."""
    layers = [m for module in modules(model).values() for m in module.modules() if isinstance(m, nn.Linear)]
    return next(layer for layer in reversed(layers) if layer.out_features == model.config.num_labels)


def _rescaled(layer: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output * layer.scale.to(output) + layer.shift.to(output)


def with_scale(module: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor `name` of a module as it is without its scale and shift beside it."""
    scale = getattr(module, "scale", None)
    if scale is None or not isinstance(module, nn.Linear):
        return tensor
    scale, shift = scale.to(tensor.device, torch.float32), module.shift.to(tensor.device, torch.float32)
    if name == "bias":
        return (tensor.float() * scale + shift).to(tensor.dtype)
    return (tensor.float() * scale[:, None]).to(tensor.dtype)


def check_dropout(model: PreTrainedModel, head: Head) -> None:
    """Refuse a dropout that the model's config names and its head does not have.

    Raises:
        UserError: It is so.
    """
    outside = [m for child in model.children() if child is not model.base_model for m in child.modules()]
    if head.dropout is not None and not any(getattr(module, "p", None) == head.dropout for module in outside):
        raise UserError(
            f"task.head_dropout={head.dropout:g}: {type(model).__name__} has no dropout before its head. Leave it out."
        )


def fresh(model: PreTrainedModel, head: Head, missing: Collection[str], allowed: Collection[str]) -> Iterator[str]:
    """Give new values to what the files did not hold.

    Args:
        model: Loaded; whole, partitioned by ZeRO-3, or of shapes alone. What is new is whole on every rank until the
            engine takes it.
        head: What its head is to be.
        missing: Names of parameters whose values are not those of the files.
        allowed: Regular expressions (`model.allow_missing`) of further parameters that may be missing.

    Yields:
        Names of what was missing and may not be.
    """
    own = parameters(model)
    for name in sorted(missing):
        if name not in own and not any(re.search(pattern, name) for pattern in allowed):
            yield name
            continue
        place, _, last = name.rpartition(".")
        module = model.get_submodule(place)
        old = getattr(module, last)
        if not isinstance(old, nn.Parameter):
            continue
        setattr(module, last, nn.Parameter(_drawn(name, old, model.config, head), old.requires_grad))


def _drawn(name: str, old: nn.Parameter, config: PreTrainedConfig, head: Head) -> torch.Tensor:
    """First values: matrices at random, biases 0, scales of norms 1."""
    shape = getattr(old, "ds_shape", old.shape)
    if old.is_meta:
        return torch.empty(shape, dtype=old.dtype, device="meta")
    values = torch.zeros(shape, dtype=torch.float32)
    if len(shape) < 2:
        return (values + float(name.endswith("weight"))).to(old.dtype)
    seed = int.from_bytes(hashlib.blake2b(f"{head.seed} {name}".encode(), digest_size=8).digest(), "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    if head.init is HeadInit.xavier:
        nn.init.xavier_uniform_(values, generator=generator)
    else:
        std = getattr(config.get_text_config(), "initializer_range", None) or FALLBACK_STD
        values.normal_(0.0, std, generator=generator)
    return values.to(old.dtype)
