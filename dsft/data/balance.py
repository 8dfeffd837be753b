"""Training records of rare labels more often, or those of frequent ones less often."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from dsft.config.schema import Resampling
from dsft.data.dataset import TokenDataset
from dsft.errors import UserError


def resampled(train: TokenDataset, labels: str, how: Resampling, seed: int) -> tuple[TokenDataset, dict[str, Any]]:
    """The training set with as many examples of each label as of the most frequent or of the rarest one.

    Args:
        train: Training set.
        labels: Its column with a value for the label of each example.
        how: `oversample` takes every example as often as any other of its label, give or take one; `undersample`
            leaves out, by the same chance for all of a label.
        seed: Of what is drawn.

    Returns:
        The set, and for the audit how many examples it had and has.

    Raises:
        UserError: An example has other than one label.
    """
    column = train.entry.columns[labels]
    if not (np.diff(column.offsets)[train.selection] == 1).all():
        raise UserError(
            f"data.balance={how.value} needs records with one label each, which tells how often they are taken. With "
            "several at once, weigh them by task.balance."
        )
    values, of_example, counts = np.unique(
        column.data[column.offsets[:-1][train.selection]], return_inverse=True, return_counts=True
    )
    random, parts = np.random.default_rng(seed), []
    target = counts.max() if how is Resampling.oversample else counts.min()
    for number in range(len(values)):
        own = train.selection[of_example == number]
        whole, rest = divmod(int(target), len(own))
        parts += [np.repeat(own, whole), random.choice(own, rest, replace=False)]
    selection = np.sort(np.concatenate(parts))
    digest = hashlib.sha256(selection.data).hexdigest()[:32]
    about = {"how": how.value, "examples_before": len(train), "examples_after": len(selection)}
    return TokenDataset(f"{train.key}-{digest}", train.entry, selection), about
