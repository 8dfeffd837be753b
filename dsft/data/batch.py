"""Examples laid end to end into one flat batch."""

from __future__ import annotations

import numpy as np
import torch

from dsft.types import IGNORE_INDEX, Batch, Example


def collate(examples: list[Example], step: tuple[int, int] = (0, 0)) -> Batch:
    """Lay examples end to end; positions restart and labels are shifted within each, so none sees another.

    `step` is the epoch, and the number of the optimizer step in it, that the batch belongs to.

    An empty list gives the filler batch: one token without a target. Ranks under ZeRO must take the same number of
    forward passes, and it makes up for the ones that a rank has no rows for.
    """
    if not examples:
        one = torch.zeros(1, 1, dtype=torch.int64)
        tensors = {"input_ids": one, "labels": torch.full_like(one, IGNORE_INDEX), "position_ids": one}
        return Batch(tensors, lengths=[1], weight=0.0, examples=0, numbers=[0])
    ids = np.concatenate([e.ids for e in examples]).astype(np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    positions = np.empty_like(ids)
    begin = 0
    for example in examples:
        end = begin + len(example.ids)
        labels[begin : end - 1] = np.where(example.columns["supervised"][1:], example.ids[1:], IGNORE_INDEX)
        positions[begin:end] = np.arange(end - begin)
        begin = end
    return Batch(
        {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(positions)[None],
        },
        lengths=[len(e.ids) for e in examples],
        weight=float(sum(e.weight for e in examples)),
        examples=len(examples),
        numbers=[e.number for e in examples],
        step=step,
    )
