"""Random numbers that a model draws by functions of torch while it trains: met, answered or refused."""

from __future__ import annotations

import inspect
import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dsft.errors import UserError

_DROPOUTS = (F.dropout, torch.dropout)
_OTHER_DROPOUTS = (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu)
_GENERATORS = (
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like),
    *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.native_dropout, torch.dropout_),
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.bernoulli_, torch.Tensor.random_),
    *(torch.Tensor.exponential_, torch.Tensor.geometric_, torch.Tensor.log_normal_, torch.Tensor.cauchy_),
    *(torch.Tensor.bernoulli, torch.Tensor.multinomial, torch.alpha_dropout, torch.feature_dropout, F.gumbel_softmax),
)


class RandomCalls(TorchFunctionMode):
    """Meets every call of torch by which a model draws at random: answers it from a Noise, or refuses it by name.

    Args:
        noise: A `model.noise.Noise`.

    Attributes:
        seen: Whether there was any.
    """

    def __init__(self, noise: Any) -> None:
        super().__init__()
        self._noise = noise
        self.seen = False

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if function in _DROPOUTS or function in _OTHER_DROPOUTS:
            x, p, training = _rate(function, arguments, keywords)
            if not training or not p:
                return x
            if function in _OTHER_DROPOUTS:
                self._refuse(function)
            return self._noise.dropout(self._owner(), x, p)
        if function is F.scaled_dot_product_attention and (keywords.get("dropout_p") or (arguments[4:5] or (0,))[0]):
            self._refuse(function)
        if function in _GENERATORS:
            return self._single(function, arguments, keywords)
        return function(*arguments, **keywords)

    def _single(self, function: Any, arguments: tuple, keywords: dict[str, Any]) -> Any:
        """One uniform number is drawn once for the whole step; anything larger is laid out by the batch."""
        if function is torch.rand and math.prod(_size(arguments, keywords)) == 1:
            options = {key: keywords[key] for key in ("dtype", "device") if key in keywords}
            return torch.full(_size(arguments, keywords), self._noise.single(self._owner()), **options)
        if function is torch.Tensor.uniform_ and arguments[0].numel() == 1:
            low = arguments[1] if len(arguments) > 1 else keywords.get("from", 0.0)
            high = arguments[2] if len(arguments) > 2 else keywords.get("to", 1.0)
            return arguments[0].fill_(low + (high - low) * self._noise.single(self._owner()))
        self._refuse(function)

    def _owner(self) -> nn.Module:
        self.seen = True
        return self._noise.owner()

    def _refuse(self, function: Any) -> NoReturn:
        module = self._noise.owner()
        raise UserError(
            f"{self._noise.name(module)} draws random numbers by torch's {function.__name__} while it trains, which "
            "would depend on ranks and batch size. Set the dropout, jitter or noise settings of this model to 0 in its "
            "config.json; where it has none for this, use another model."
        )


def _rate(function: Any, arguments: tuple, keywords: dict[str, Any]) -> tuple[torch.Tensor, float, bool]:
    """Input, rate and training flag of a dropout function's call."""
    if function is torch.dropout:
        x, p, training = (*arguments, *(keywords[key] for key in ("input", "p", "train") if key in keywords))
        return x, p, training
    bound = inspect.signature(function).bind(*arguments, **keywords)
    bound.apply_defaults()
    return bound.arguments["input"], bound.arguments.get("p", 1.0), bound.arguments["training"]


def _size(arguments: tuple, keywords: dict[str, Any]) -> tuple[int, ...]:
    """The size that a factory function was called with."""
    given = keywords.get("size", arguments)
    return tuple(given[0]) if given and isinstance(given[0], list | tuple | torch.Size) else tuple(given)
