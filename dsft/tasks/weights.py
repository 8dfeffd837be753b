"""Weights that a record and its messages carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MESSAGE = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_scale")
"""Names under which a message carries its weight."""

RECORD = ("weight", "loss_weight", "sample_weight", "example_weight")
"""Names under which a record does."""

SWITCHES = ("train", "loss")
"""Names under which a record carries true or false; a number there may well be something else, such as a loss."""

PARTS = ("train_detail", "training_detail", "mask", "masked", "loss_mask", "label_mask")
"""Names under which others weigh parts of a message, or write the opposite of a weight."""

LIMIT = 1e30
"""Largest weight, and one over it the smallest but 0, that loss and gradient bear in single precision."""


def of_message(message: dict[str, Any], field: str) -> float | None:
    """A message's weight, which is taken out of it; None if it carries none.

    Raises:
        ValueError: It is no weight, or there are several that differ; the message names the field.
    """
    for name in PARTS:
        if message.get(name) is not None:
            raise ValueError(
                f"field `{field}.{name}` is no weight that is known; give the message a `weight`, or leave the field "
                f"out with data.ignore_fields=[{name}]"
            )
    found = {name: value for name in MESSAGE if name in message and (value := message.pop(name)) is not None}
    weights = {name: _weight(value, f"{field}.{name}") for name, value in found.items()}
    if len(set(weights.values())) > 1:
        raise ValueError(f"field `{field}` carries different weights: {_shown(weights)}")
    return next(iter(weights.values()), None)


def of_record(fields: Mapping[str, Any]) -> float:
    """A record's weight, 1 if it carries none.

    Raises:
        ValueError: As for a message.
    """
    weights = {
        name: _weight(value, name) for name in RECORD if name in fields and (value := fields.get(name)) is not None
    }
    for name in [one for one in SWITCHES if one in fields]:
        value = fields.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise ValueError(
                f"field `{name}` is {value!r}: as a weight it would be true or false. Call it `weight` if it is one, "
                f"or leave it out with data.ignore_fields=[{name}]"
            )
        weights[name] = float(value)
    if len(set(weights.values())) > 1:
        raise ValueError(f"the record carries different weights: {_shown(weights)}")
    return next(iter(weights.values()), 1.0)


def _weight(value: Any, field: str) -> float:
    if not isinstance(value, int | float) or (value != 0 and not 1 / LIMIT <= value <= LIMIT):
        raise ValueError(f"field `{field}` is a weight, 0 or {1 / LIMIT:g} to {LIMIT:g}, not {repr(value)[:40]}")
    return float(value)


def _shown(weights: dict[str, float]) -> str:
    return ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
