"""A metric on its way: what is summed above the line, and what below it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Tally:
    """Named sums that stay on the device until they are logged.

    A mean is formed once, at the very end, from sums over everything it covers: micro-batches, ranks, the whole
    validation set. So there is no average of averages anywhere.

    Attributes:
        sums: Name -> scalar float64 tensor, detached. Every task gives `loss` and `weight`.
        rows: Name -> tensors with a row for each document, in order, of evaluations alone: for what sums cannot give.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Add `other` to this tally in place, without a device synchronisation."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        for name, rows in other.rows.items():
            self.rows.setdefault(name, []).extend(rows)

    def read(self) -> dict[str, float]:
        """The sums as numbers; waits for the device."""
        return {name: float(value) for name, value in self.sums.items()}
