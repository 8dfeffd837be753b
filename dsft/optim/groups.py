"""Parameter groups: who is decayed, who learns more slowly, whom Muon takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from dsft.config.schema import OptimConfig, OptimName
from dsft.errors import UserError

_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_EMBEDDINGS = -1


class _Key(NamedTuple):
    """What the parameters of one group share; sorts from the input to the output, decayed before undecayed."""

    depth: int
    undecayed: bool
    by_adamw: bool
    own: int = -1
    """Which of `optim.groups`; -1 for none."""


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `model` into optimizer groups.

    Norms, biases, embeddings (an output head tied to them and rows of new tokens included) and DoRA magnitudes are
    not decayed. With `optim.layer_decay` d, the top layer and everything above the layers learn at `optim.lr`, each
    lower layer at d times the rate of the one above it, and the embeddings at d times that of the lowest layer
    (arXiv:1801.06146; arXiv:2003.10555); a decoder's layers are above its encoder's. What `optim.groups` gives to
    parameters by their names holds over all that.
    Muon takes the matrices of the layers, AdamW the rest.

    Args:
        model: A model, wrapped by peft or not; partitioned by ZeRO-3 or not.
        optim: The optimizer's section of the config.

    Returns:
        Non-empty groups, ordered from the embeddings to the head and the same on every rank, each with `params`,
        `lr`, `weight_decay` and a readable `name`; with Muon `use_muon` and the other keys that its class asks for.

    Raises:
        UserError: If nothing is trainable, if `optim.layer_decay` meets a model without numbered layers, or if Muon
            would get no matrix.
    """
    below = _below_decoder(name for name, _ in model.named_parameters())
    layers = 1 + max((_layer(name, _EMBEDDINGS, below) for name, _ in model.named_parameters()), default=_EMBEDDINGS)
    if optim.layer_decay != 1 and layers == 0:
        raise UserError(
            f"optim.layer_decay={optim.layer_decay:g}: the model's parameter names hold no numbered layers "
            "(.layers.N., .h.N., .block.N.); set optim.layer_decay=1"
        )
    members: dict[_Key, list[nn.Parameter]] = defaultdict(list)
    for name, parameter, module in _trainable(model):
        members[_key(name, parameter, module, layers, below, optim)].append(parameter)
    _refuse_unmatched(optim, {key.own for key in members}, model)
    if not members:
        raise UserError(
            "no parameter is trainable: the patterns of tuning.trainable match nothing and tuning.last_layers "
            "leaves nothing; change them, or set tuning.method=full"
        )
    if optim.name is OptimName.muon and all(key.by_adamw for key in members):
        raise UserError(
            "optim.name=muon: no matrix of a numbered layer is trainable, so Muon has nothing to do; "
            "set optim.name=adamw, or make layers trainable (tuning.*)"
        )
    return [_group(key, members[key], layers, optim) for key in sorted(members)]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Module]]:
    """Each trainable parameter once, under its first name, with the module that holds it."""
    modules = dict(model.named_modules())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [(name, p, modules[name.rpartition(".")[0]]) for name, p in named]


def _below_decoder(names: Iterable[str]) -> int:
    """Layers of an encoder, above which its decoder's are counted; 0 of a model that has not both."""
    layers = {(side, int(found[1])) for name in names for side in _sides(name) if (found := _LAYER.search(f".{name}"))}
    both = {side for side, _ in layers} == {"encoder", "decoder"}
    return 1 + max(layer for side, layer in layers if side == "encoder") if both else 0


def _sides(name: str) -> set[str]:
    return {"encoder", "decoder"}.intersection(name.split("."))


def _layer(name: str, otherwise: int, below: int) -> int:
    found = _LAYER.search(f".{name}")
    return int(found[1]) + below * ("decoder" in _sides(name)) if found else otherwise


def _key(name: str, parameter: nn.Parameter, module: nn.Module, layers: int, under: int, optim: OptimConfig) -> _Key:
    # ZeRO-3 leaves an empty tensor in a partitioned parameter's place and keeps its shape aside.
    dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
    embedding = isinstance(module, nn.Embedding) or "lora_embedding_" in name
    plain = dimensions < 2 or name.endswith("bias") or "Norm" in type(module).__name__
    plain |= name.endswith("new_weight") or "lora_magnitude" in name
    layer = _layer(name, layers, under)
    matrix = dimensions == 2 and layer < layers and not (plain or embedding)
    # A norm or projection beside the embeddings, as BERT has them, is as far from the top as they are.
    below = layer == layers and (embedding or "embeddings." in name)
    return _Key(
        depth=0 if optim.layer_decay == 1 else _EMBEDDINGS if below else layer,
        undecayed=plain or embedding,
        by_adamw=not (matrix and optim.name is OptimName.muon),
        own=next((number for number, group in enumerate(optim.groups) if re.search(group.match, name)), -1),
    )


def _refuse_unmatched(optim: OptimConfig, met: set[int], model: nn.Module) -> None:
    """Refuse a group without parameters."""
    for number, group in enumerate(optim.groups):
        if number not in met:
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            found = any(re.search(group.match, name) for name in trained)
            why = "those that it finds are of an earlier group" if found else f"the last one is {trained[-1]}"
            raise UserError(
                f"optim.groups[{number}].match={group.match!r} is found in no trainable parameter's name: {why}. "
                "Correct it, or leave the group out."
            )


def _group(key: _Key, params: list[nn.Parameter], layers: int, optim: OptimConfig) -> dict[str, Any]:
    words = ["no decay" if key.undecayed else "decay"]
    factor = 1.0
    if optim.layer_decay != 1:
        words.insert(0, {_EMBEDDINGS: "embeddings", layers: "head"}.get(key.depth, f"layer {key.depth}"))
        factor = optim.layer_decay ** max(0, layers - 1 - key.depth)
    group: dict[str, Any] = {
        "params": params,
        "lr": optim.lr * factor,
        "weight_decay": 0.0 if key.undecayed else optim.weight_decay,
    }
    if key.own >= 0:
        own = optim.groups[key.own]
        words.append(f"optim.groups[{key.own}]")
        group["lr"] = group["lr"] if own.lr is None else own.lr
        if own.weight_decay is not None and not key.undecayed:
            group["weight_decay"] = own.weight_decay
    if optim.name is OptimName.muon:
        words.append("adamw" if key.by_adamw else "muon")
        group["use_muon"] = not key.by_adamw
        if key.by_adamw:
            group |= {"betas": tuple(optim.betas), "eps": optim.eps}
        else:
            group["momentum"] = optim.momentum
    return group | {"name": ", ".join(words)}
