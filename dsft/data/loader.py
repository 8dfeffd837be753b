"""From global step to this rank's micro-batches, with a cursor that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from dsft.data.ahead import Shipping, ahead
from dsft.data.pack import Planner
from dsft.errors import UserError
from dsft.types import Batch, Example


class Examples(Protocol):
    """A data set: examples by number."""

    def __getitem__(self, number: int) -> Example: ...

    def __len__(self) -> int: ...


@dataclass
class Step:
    """What one optimizer step trains on.

    Attributes:
        batches: This rank's micro-batches, one per accumulation step.
        tokens: Tokens over all ranks.
        weight: Sum of weights over all ranks: what the loss is divided by.
        epoch: Epoch the step belongs to.
    """

    batches: list[Batch]
    tokens: int
    weight: float
    epoch: int


class Loader:
    """Hands out optimizer steps in order.

    Every rank holds the same plan and the same weights, so the weight of a whole global step is
    known to each of them without any communication.

    Args:
        dataset: Examples by number.
        lengths: Tokens of each example.
        weights: Weight of each example.
        planner: The order.
        rank: This rank.
        world_size: How many ranks share a step.
        micro_batch_size: Rows per micro-batch.
        gradient_accumulation_steps: Micro-batches per rank and step.
        collate: Makes a batch of examples, of a step given by its epoch and its number in it.
    """

    def __init__(
        self,
        dataset: Examples,
        lengths: np.ndarray,
        weights: np.ndarray,
        planner: Planner,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        collate: Callable[[list[Example], tuple[int, int]], Batch],
    ):
        self._dataset = dataset
        self._lengths = lengths
        self._weights = weights
        self._planner = planner
        self._rank = rank
        self._world_size = world_size
        self._micro = micro_batch_size
        self._accumulation = gradient_accumulation_steps
        self._collate = collate
        self.epoch = 0
        self.step_in_epoch = 0

    def __iter__(self) -> Iterator[Step]:
        """Steps without end, epoch after epoch. The cursor stands behind the step that was handed out last."""
        for (epoch, number), step in self._steps():
            self.epoch, self.step_in_epoch = epoch, number + 1
            yield step

    def ahead(self, count: int, device: torch.device) -> Generator[Step, None, None]:
        """The next `count` steps with their batches on `device`; each is made while the one before it is in use.

        The cursor is that of the step that was handed out last. Close it (`contextlib.closing`) to leave early.
        """
        shipping = Shipping(device)
        sent = ((place, step, shipping.send(step.batches)) for place, step in islice(self._steps(), count))
        with closing(ahead(sent)) as steps:
            for (epoch, number), step, batches in steps:
                self.epoch, self.step_in_epoch = epoch, number + 1
                yield replace(step, batches=shipping.receive(batches))

    def _steps(self) -> Iterator[tuple[tuple[int, int], Step]]:
        """Steps from the cursor on, each with its epoch and its number in it; the cursor stays."""
        epoch, number = self.epoch, self.step_in_epoch
        while True:
            if number == self._planner.steps(epoch):
                epoch, number = epoch + 1, 0
            yield (epoch, number), self._load(epoch, number)
            number += 1

    @property
    def epochs(self) -> int:
        """Epochs that are over."""
        return self.epoch + (self.step_in_epoch == self._planner.steps(self.epoch))

    def progress(self) -> float:
        """Epochs done, counted in steps: 1.5 is half-way through the second."""
        return self.epoch + self.step_in_epoch / self._planner.steps(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """The cursor: where the next step will be taken from, and by which plan."""
        at_end = self.step_in_epoch == self._planner.steps(self.epoch)
        epoch, step = (self.epoch + 1, 0) if at_end else (self.epoch, self.step_in_epoch)
        return {"epoch": epoch, "step_in_epoch": step, "plan": self._planner.settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a cursor.

        Raises:
            UserError: The cursor stands within an epoch that was planned by other settings.
        """
        for name, value in self._planner.settings.items():
            if state["step_in_epoch"] and state["plan"][name] != value:
                raise UserError(
                    f"the checkpoint stands within an epoch planned with {name}={state['plan'][name]}, and this run "
                    f"has {value}, so its place in the data means nothing; set {name}={state['plan'][name]}"
                )
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]

    def _load(self, epoch: int, step: int) -> Step:
        rows = self._planner.step_rows(epoch, step)
        loads = [int(self._lengths[row].sum()) for row in rows]
        bins = self._planner.share(loads, self._world_size, self._accumulation, self._micro)
        mine = bins[self._rank :: self._world_size]
        everything = np.concatenate(rows)
        return Step(
            batches=[
                self._collate([self._dataset[int(i)] for row in bin_ for i in rows[row]], (epoch, step))
                for bin_ in mine
            ],
            tokens=sum(loads),
            weight=float(self._weights[everything].sum()),
            epoch=epoch,
        )


def evaluation_batches(
    lengths: np.ndarray, rank: int, world_size: int, micro_batch_size: int | None, token_budget: int
) -> list[list[int]]:
    """This rank's share of the validation set: each example exactly once over all ranks.

    Examples go from long to short and are dealt out in turn, so that ranks finish together. Every rank gets the same
    number of batches, the last ones possibly empty: ZeRO-3 needs equally many forward passes.

    Args:
        lengths: Tokens of each example.
        rank: This rank.
        world_size: How many ranks share the work.
        micro_batch_size: Examples per batch; None takes as many as the budget allows.
        token_budget: Tokens of a batch where `micro_batch_size` is None.

    Returns:
        Example numbers of each batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, begin = [], 0
    while begin < len(order):
        size = micro_batch_size or max(1, token_budget // int(lengths[order[begin]]))
        end = begin + size * world_size
        batches.append(order[begin:end][rank::world_size].tolist())
        begin = end
    return batches
