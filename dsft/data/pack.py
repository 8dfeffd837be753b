"""Which examples share a row, and which rows make up a step: a pure function of lengths, seed and epoch.

Ranks, accumulation and the device have no say here, which is what makes a run the same however it is split.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsft.config.schema import Packing


@dataclass(frozen=True)
class Plan:
    """All the rows of one epoch, in the order in which they are trained on.

    Attributes:
        examples: Example numbers of all rows, laid end to end, int64.
        starts: Where each row begins in `examples`, and the end of the last one, int64, shape (rows + 1,).
    """

    examples: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        """Example numbers of one row."""
        return self.examples[self.starts[number] : self.starts[number + 1]]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put items into bins: the longest first, each into the fullest bin that still has room.

    Args:
        lengths: Length of each item, none above `capacity`.
        capacity: Room of a bin.

    Returns:
        Bins of item numbers. Ties go to the earlier item and the earlier bin, so the result is unique.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[item], -1))
        if at < len(room):
            free, chosen = room.pop(at)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        insort(room, (free - lengths[item], chosen))
    return bins


def plan_epoch(
    lengths: np.ndarray, packing: Packing, capacity: int, window: int, seed: int, epoch: int, global_batch_size: int
) -> Plan:
    """Shuffle the examples of one epoch and put them into rows.

    Args:
        lengths: Tokens of each example, shape (examples,).
        packing: `none` and `padded` make every example a row, `padded` so that those of a step are alike in length;
            `bfd` packs within windows of the shuffled order.
        capacity: Tokens of a row.
        window: Examples that are packed, or grouped by length, together.
        seed: Seed of the run.
        epoch: Number of the epoch; each has its own order.
        global_batch_size: Rows per optimizer step; it matters to `padded` alone.

    Returns:
        The plan; every example stands in exactly one row.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if packing is Packing.padded:
        order = _grouped(order, lengths, window, global_batch_size, random)
    if packing is not Packing.bfd:
        return Plan(order, np.arange(len(order) + 1))
    rows: list[np.ndarray] = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        bins = best_fit_decreasing(lengths[part].tolist(), capacity)
        # bins come out with long examples first: shuffle, or every window would begin with them
        rows += [part[bins[number]] for number in random.permutation(len(bins))]
    return Plan(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def _grouped(order: np.ndarray, lengths: np.ndarray, window: int, size: int, random: np.random.Generator) -> np.ndarray:
    """The order with examples of like length brought together into steps of `size`, within windows of whole steps.

    What is left over for the smaller last step is whatever the shuffle put last, so that it is of no special length.
    """
    whole = len(order) // size * size
    window = max(window // size, 1) * size
    parts = []
    for begin in range(0, whole, window):
        part = order[begin : min(begin + window, whole)]
        steps = part[np.argsort(lengths[part], kind="stable")].reshape(-1, size)
        parts.append(steps[random.permutation(len(steps))].ravel())
    return np.concatenate([*parts, order[whole:]])


class Planner:
    """The plans of all epochs of a run.

    Args:
        lengths: Tokens of each example.
        packing: How rows are made; not `auto`.
        capacity: Tokens of a row.
        window: Examples that are packed together.
        seed: Seed of the run.
        global_batch_size: Rows per optimizer step.
        sides: Of an encoder-decoder the tokens of each example's two texts, which together are its `lengths`.

    Attributes:
        settings: What, beside the data, decides which examples make up which step; by setting.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        packing: Packing,
        capacity: int,
        window: int,
        seed: int,
        global_batch_size: int,
        sides: Sequence[np.ndarray] = (),
    ):
        self._sides = sides or [lengths]
        self.global_batch_size = global_batch_size
        self._lengths, self._packing, self._capacity = lengths, packing, capacity
        self.settings = {
            "data.packing": packing.value,
            "data.max_length": capacity,
            "data.pack_window": window,
            "train.seed": seed,
            "batch.global_batch_size": global_batch_size,
        }
        self.epoch = lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(lengths, packing, capacity, window, seed, epoch, global_batch_size)
        )

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last one may be smaller than the others."""
        return -(-self.epoch(epoch).rows // self.global_batch_size)

    def total_steps(self, epochs: int | None, max_steps: int | None) -> int:
        """Optimizer steps until the first of the two limits; packing makes epochs differ by a step or so."""
        total, epoch = 0, 0
        while (epochs is None or epoch < epochs) and (max_steps is None or total < max_steps):
            total, epoch = total + self.steps(epoch), epoch + 1
        return total if max_steps is None else min(total, max_steps)

    def describe(self, micro_batch_size: int) -> dict[str, float | int | str]:
        """The first epoch's packing, for the audit.

        Where rows are flat, `row_fill` is the share of a row of `max_length` that is used; where they are padded,
        `padding` is the share of all positions that are, in micro-batches of `micro_batch_size` rows.
        """
        rows, tokens = self.epoch(0).rows, int(self._lengths.sum())
        fill = (
            {"padding": 1 - tokens / self._positions(micro_batch_size)}
            if self._packing is Packing.padded
            else {"row_fill": tokens / (rows * self._capacity)}
        )
        return {
            "packing": self._packing.value,
            "examples": len(self._lengths),
            "rows": rows,
            "steps_per_epoch": self.steps(0),
            "examples_per_row": len(self._lengths) / rows,
            **fill,
        }

    def _positions(self, micro_batch_size: int) -> int:
        """Rows times width over all padded micro-batches of the first epoch."""
        count, total = self.global_batch_size // micro_batch_size, 0
        for step in range(self.steps(0)):
            examples = np.concatenate(self.step_rows(0, step))
            for rows in filter(None, share_alike(self._lengths[examples].tolist(), 1, count)):
                total += len(rows) * sum(int(side[examples[rows]].max()) for side in self._sides)
        return total

    def share(self, loads: list[int], ranks: int, accumulation: int, capacity: int) -> list[list[int]]:
        """Share the rows of a step out among its micro-batches.

        Args:
            loads: Tokens of each row.
            ranks: How many ranks share the step.
            accumulation: Micro-batches per rank.
            capacity: Rows of a full micro-batch.

        Returns:
            Row numbers of each micro-batch; rank r's are those at r, r + ranks, and so on.
        """
        if self._packing is Packing.padded:
            return share_alike(loads, ranks, accumulation)
        return share(loads, ranks * accumulation, capacity)

    def step_rows(self, epoch: int, step: int) -> list[np.ndarray]:
        """Rows of one global step, each an array of example numbers."""
        plan = self.epoch(epoch)
        begin = step * self.global_batch_size
        return [plan.row(number) for number in range(begin, min(begin + self.global_batch_size, plan.rows))]


def share(loads: list[int], bins: int, capacity: int) -> list[list[int]]:
    """Share rows out so that no bin waits long for another: the heaviest first, each to the lightest bin with a place.

    Args:
        loads: Tokens of each row.
        bins: Micro-batches of a global step: ranks x accumulation.
        capacity: Rows of a full micro-batch.

    Returns:
        Row numbers of each bin, in rising order. Where there are fewer rows than bins some stay empty.
    """
    content: list[list[int]] = [[] for _ in range(bins)]
    weight = [0] * bins
    for row in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        chosen = min((b for b in range(bins) if len(content[b]) < capacity), key=lambda b: (weight[b], b))
        content[chosen].append(row)
        weight[chosen] += loads[row]
    return [sorted(rows) for rows in content]


def share_alike(loads: list[int], ranks: int, accumulation: int) -> list[list[int]]:
    """Share padded rows out so that the rows of a bin are alike in length, and no rank waits long for another.

    From the shortest row to the longest, ranks take bins of neighbouring lengths at the same time; the one that takes
    the shortest takes the longest the next time.

    Args:
        loads: Tokens of each row.
        ranks: How many ranks there are.
        accumulation: Bins of each of them.

    Returns:
        Row numbers of each bin, in rising order, as many as possible alike in all; rank r's are those at r, r + ranks,
        and so on. Where there are fewer rows than bins some stay empty.
    """
    order = sorted(range(len(loads)), key=lambda i: (loads[i], i))
    fewest, more = divmod(len(order), ranks * accumulation)
    content: list[list[int]] = []
    begin = 0
    for turn in range(accumulation):
        bins = []
        for number in range(turn * ranks, (turn + 1) * ranks):
            end = begin + fewest + (number < more)
            bins.append(sorted(order[begin:end]))
            begin = end
        content += bins[::-1] if turn % 2 else bins
    return content
