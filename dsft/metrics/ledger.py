"""What a rank has summed since the last row of training metrics, and how a row is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dsft.metrics.metric import Metric, Row, form
from dsft.metrics.tally import Tally


@dataclass
class Ledger:
    """This rank's quantities since the last row; saved with a checkpoint that falls between two rows.

    What the device has summed stays there until a row is made or a checkpoint is written.

    Args:
        metrics: All that the run declares, by name.
    """

    metrics: Mapping[str, Metric]
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    own_seconds: float = 0.0
    tokens: int = 0
    steps: int = 0

    def add(self, tally: Tally, seconds: float, own_seconds: float, tokens: int) -> None:
        """Add one step, without a device synchronisation.

        Args:
            tally: This rank's sums.
            seconds: How long the step took.
            own_seconds: What of it was this rank's own work and not waiting for others. What the device has to be
                asked for is added to the attribute before a row is made.
            tokens: Of all ranks.
        """
        self.tally.add(tally)
        self.seconds += seconds
        self.own_seconds += own_seconds
        self.tokens += tokens
        self.steps += 1

    def row(self, gather: Callable[[list[float]], list[list[float]]], now: Mapping[str, float]) -> dict[str, float]:
        """The training metrics since the last row, the same on all ranks, by one collective; then begin anew.

        Args:
            gather: Every rank's row of numbers, in the order of ranks.
            now: Quantities of the run as it stands, by the names that `metrics.declared` uses.

        Raises:
            ValueError: A task's sum has the name of a quantity of the run, or one is missing.
        """
        sums = self.tally.read()
        quantities = {
            "seconds": self.seconds,
            "own_seconds": self.own_seconds,
            "new_tokens": self.tokens,
            "steps": self.steps,
            **now,
        }
        ranks = across(gather, sums, quantities)
        self._begin()
        return form(self.metrics, Row.TRAINING, ranks)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        # as text, since a skipped step may have brought a NaN, which JSON cannot hold
        sums = {name: repr(value) for name, value in self.tally.read().items()}
        rest = ("seconds", "own_seconds", "tokens", "steps")
        return {"sums": sums, **{name: getattr(self, name) for name in rest}}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` gave, with the sums on `device`."""
        state = dict(state)
        sums = {k: torch.tensor(float(v), dtype=torch.float64, device=device) for k, v in state.pop("sums").items()}
        self.tally = Tally(sums)
        for name, value in state.items():
            setattr(self, name, value)

    def _begin(self) -> None:
        self.tally = Tally()
        self.seconds = self.own_seconds = 0.0
        self.tokens = self.steps = 0


def across(
    gather: Callable[[list[float]], list[list[float]]], sums: Mapping[str, float], quantities: Mapping[str, float]
) -> dict[str, list[float]]:
    """Every rank's value of each quantity, in the order of ranks.

    Args:
        gather: Every rank's row of numbers, in the order of ranks.
        sums: This rank's, from a Tally.
        quantities: Further ones; every rank has the same names.

    Raises:
        ValueError: A sum has the name of one of these.
    """
    if clash := sorted(sums.keys() & quantities.keys()):
        raise ValueError(f"the task's sums {', '.join(clash)} have names of the run's own quantities: rename them")
    mine = {**sums, **quantities}
    return dict(zip(mine, map(list, zip(*gather([float(value) for value in mine.values()])))))
