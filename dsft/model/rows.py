"""Rows of new tokens in the embedding and the output head: made from those of their pieces, trained by themselves.

A model whose weights are frozen can still learn its new tokens: their rows become small parameters of their own,
which the embedding and the head use in place of the frozen rows. The optimizer's state is that of these rows alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from dsft.errors import UserError
from dsft.model.vocabulary import Vocabulary

NEW = ("new_weight", "new_bias")
"""Parameters of an embedding or head that stand for the rows `new_rows` (a slice) of its `weight` and `bias`."""

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]
"""Makes the parameters whole inside a `with`; every rank enters it."""


def grow(model: PreTrainedModel, vocabulary: Vocabulary, gather: Gather) -> None:
    """Give every new token a row in the embedding and the head (its bias too): the mean of the rows of its pieces.

    Means are taken in fp32 and rounded to the weights' type, from input rows for the input and from head rows for the
    head. Rows that the model has to spare are used first; what is missing is appended, and `vocab_size` follows. No
    row is ever taken away, and the old ones stay as they are.

    Args:
        model: Whole, or partitioned by ZeRO-3. The grown tensors are whole on every rank until the engine takes them.
        vocabulary: The new tokens; without any, nothing changes.
        gather: Called with a list of parameters of the model.

    Raises:
        UserError: The model keeps more tables with a row per token than these.
    """
    if not vocabulary.pieces:
        return
    _refuse_other_tables(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = max(count(embedding.weight), vocabulary.size)
    tensors = [embedding.weight, *([head.weight, head.bias] if head is not None else [])]
    for old in {id(tensor): tensor for tensor in tensors if tensor is not None}.values():
        with gather([old]):
            grown = nn.Parameter(_grown(old.detach(), vocabulary, size), requires_grad=old.requires_grad)
        # a tied tensor has several owners
        for module in model.modules():
            for name in [name for name, tensor in module.named_parameters(recurse=False) if tensor is old]:
                setattr(module, name, grown)
    embedding.num_embeddings = size
    if head is not None:
        head.out_features = size
    model.config.get_text_config().vocab_size = model.vocab_size = size


def train(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Make the rows of new tokens trainable beside a frozen embedding and head; the other rows stay as they are.

    A module that is trained as a whole anyway is left alone. Tied modules share their new rows too.

    Args:
        model: After `grow`, its trained parameters chosen; wrapped by peft or not.
        vocabulary: The new tokens; without any, nothing changes.

    Raises:
        UserError: The head is a layer whose rows cannot be distinguished.
    """
    if not vocabulary.pieces:
        return
    made: dict[int, nn.Parameter] = {}
    for module in _owners(model):
        if module.weight.requires_grad:
            continue
        _refuse_unknown(module)
        module.new_rows = slice(vocabulary.first, vocabulary.size)
        module.new_weight = made.setdefault(id(module.weight), _part(module.weight, module.new_rows))
        if getattr(module, "bias", None) is not None and not module.bias.requires_grad:
            module.new_bias = _part(module.bias, module.new_rows)
        module.register_forward_hook(_embed if isinstance(module, nn.Embedding) else _predict)


def whole(module: Any, name: str) -> torch.Tensor:
    """The tensor `name` of a module, with the new rows that are trained beside it in their place."""
    tensor, own = getattr(module, name), getattr(module, f"new_{name}", None)
    if own is None:
        return tensor
    return torch.cat([tensor[: module.new_rows.start], own, tensor[module.new_rows.stop :]])


def count(weight: nn.Parameter) -> int:
    """Rows of a matrix, whole or partitioned by ZeRO-3."""
    return getattr(weight, "ds_shape", weight.shape)[0]


def _grown(old: torch.Tensor, vocabulary: Vocabulary, size: int) -> torch.Tensor:
    """`old` with `size` rows, those of new tokens made from their pieces; of all old rows where an id has no token."""
    new = old.new_zeros(size, *old.shape[1:])
    new[: len(old)] = old
    for place, pieces in enumerate(vocabulary.pieces, start=vocabulary.first):
        rows = old[list(pieces)] if pieces else old[: vocabulary.first]
        new[place] = rows.float().mean(0)
    return new


def _owners(model: PreTrainedModel) -> Iterator[Any]:
    """The embedding and the head, without the adapters around them."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if any(getattr(module, "use_dora", {}).values()):
            raise UserError(
                "tuning.new_tokens=true with tuning.use_dora=true: tuning.target_modules names the output head, "
                "whose rows DoRA rescales as a whole. Leave the head out of tuning.target_modules."
            )
        if module is not None:
            yield module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _refuse_other_tables(model: PreTrainedModel) -> None:
    """Refuse a model for which growing embedding and head is not all that there is to do."""
    plain = PreTrainedModel.resize_token_embeddings, PreTrainedModel._resize_token_embeddings
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            if (kind.resize_token_embeddings, kind._resize_token_embeddings) != plain:
                raise UserError(
                    f"model.path: {kind.__name__} has more tables with a row per token than its embedding and its "
                    "output head, so that no token can be added. Leave data.new_tokens out, or use another model."
                )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear | None):
        raise UserError(
            f"model.path: {type(model).__name__} has a {type(embedding).__name__} as its embedding and a "
            f"{type(head).__name__} as its output head, to which no token can be added. Leave data.new_tokens out, or "
            "use another model."
        )


def _refuse_unknown(module: nn.Module) -> None:
    """Refuse a head that is more than a linear map: its new rows could not be applied by themselves."""
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        raise UserError(
            f"tuning.new_tokens=true: the output head is a {type(module).__name__}, whose new rows cannot be trained "
            "by themselves. Use tuning=full."
        )


def _part(tensor: nn.Parameter, rows: slice) -> nn.Parameter:
    return nn.Parameter(tensor.detach()[rows].clone())


def _embed(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Forward hook of an embedding: the output of new tokens comes from `new_weight`.

    All tokens are looked up there, and the others' results dropped: nobody has to wait for the device to count.
    """
    (ids,) = args
    rows = module.new_rows
    small = copy.copy(module)  # the class may do more than look up, such as scale
    small.padding_idx, small._parameters = None, {"weight": module.new_weight}
    own = type(module).forward(small, (ids - rows.start).clamp(0, rows.stop - rows.start - 1))
    return torch.where(((ids >= rows.start) & (ids < rows.stop)).unsqueeze(-1), own, output)


def _predict(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook of a head: the logits of new tokens come from `new_weight` and `new_bias`."""
    if not isinstance(output, torch.Tensor):
        return None  # it was asked for its loss, in which it has counted the new rows itself
    rows = module.new_rows
    bias = whole(module, "bias")
    own = nn.functional.linear(args[0], module.new_weight, None if bias is None else bias[rows])
    return torch.cat([output[..., : rows.start], own, output[..., rows.stop :]], dim=-1)
