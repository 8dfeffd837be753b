"""What a person sees while a run goes on: bars on a terminal, plain lines in the log of a batch job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from dsft.metrics import Metric, Row

INTERVAL = 2.0
"""Seconds between plain lines about the same thing."""


class Progress:
    """The steps of a run, the work inside them, and messages between.

    Args:
        metrics: All that the run declares, by name.
        total_steps: Optimizer steps of the whole run.
        initial: Steps done before, when a run goes on from a checkpoint.
        enabled: Whether steps and work are shown at all; messages always are.
        stream: Where to; stderr by default. Bars where it is a terminal, else lines.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        total_steps: int,
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._metrics = metrics
        self._stream = stream or sys.stderr
        self._clock = clock
        self._enabled = enabled
        self._terminal = self._stream.isatty()
        self._initial, self._total = initial, total_steps
        self._lines = _Lines(self._line, clock)
        self._bar: Any = self._tqdm("train", total_steps, initial=initial, unit="step") if self._bars else None
        self._start: tuple[float, float] | None = None

    @property
    def _bars(self) -> bool:
        return self._enabled and self._terminal

    def update(self, row: dict[str, float]) -> None:
        """Show a row of metrics: training numbers beside the bar, an evaluation on a line of its own."""
        if evaluation := self._said(row, Row.EVALUATION):
            self.note(f"evaluation at step {row['step']}: {', '.join(evaluation)}")
        if test := self._said(row, Row.TEST):
            self.note(f"test at step {row['step']}: {', '.join(test)}")
        if not self._enabled:
            return
        if self._bar is not None:
            self._advance(row)
        elif training := self._said(row, Row.TRAINING):
            self._lines.offer(self._plain(row, training), last=row["step"] >= self._total)
        self._start = self._start or (row["step"], self._clock())

    def note(self, message: str) -> None:
        """Print `message` on lines of its own, above any bar."""
        if self._bars:
            tqdm.write(message, file=self._stream)
        else:
            self._line(message)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show work inside a step: an evaluation, a generation.

        Args:
            description: What is done, in a word or two.
            total: How many of it.

        Yields:
            A function to call with how many more are done.
        """
        if not self._enabled:
            yield lambda count: None
        elif self._terminal:
            with self._tqdm(description, total, leave=False) as bar:
                yield lambda count: bar.update(count) and None
        else:
            yield self._counter(description, total)

    def close(self) -> None:
        """Leave the bar as it stands, or print the last line if it was held back."""
        if self._bar is not None:
            self._bar.close()
        self._lines.flush()

    def _tqdm(self, description: str, total: int, **options: Any) -> tqdm:
        return tqdm(desc=description, total=total, file=self._stream, dynamic_ncols=True, **options)

    def _advance(self, row: dict[str, float]) -> None:
        if row["step"] <= self._initial:
            self._bar.unpause()  # the clock of the ETA starts after the first evaluation, not before it
        self._bar.set_postfix_str(", ".join(self._said(row, Row.TRAINING)) or self._bar.postfix or "", refresh=False)
        self._bar.update(row["step"] - self._bar.n)
        self._bar.refresh()

    def _plain(self, row: dict[str, float], training: list[str]) -> str:
        parts = [f"step {row['step']}/{self._total}", *training]
        first, since = self._start or (row["step"], 0.0)
        if row["step"] > first:
            seconds = (self._clock() - since) / (row["step"] - first) * (self._total - row["step"])
            parts.append(f"ETA {tqdm.format_interval(seconds)}")
        return ", ".join(parts)

    def _counter(self, description: str, total: int) -> Callable[[int], None]:
        done, lines = 0, _Lines(self._line, self._clock)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            lines.offer(f"{description}: {done}/{total}", last=done >= total)

        return advance

    def _said(self, row: dict[str, float], kind: Row) -> list[str]:
        """What of a row is worth a place beside the bar, in the order of declaration."""
        shown = [self._metrics[name].beside_the_bar(row[name]) for name in self._of(kind) if name in row]
        return [text for text in shown if text]

    def _of(self, kind: Row) -> list[str]:
        return [name for name, metric in self._metrics.items() if metric.row is kind]

    def _line(self, message: str) -> None:
        self._stream.write(message + "\n")
        self._stream.flush()


class _Lines:
    """Lets a line through when the one before is old enough, or when it is the last."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]):
        self._write, self._clock = write, clock
        self._next = clock()
        self._held: str | None = None

    def offer(self, line: str, last: bool) -> None:
        self._held = line
        if last or self._clock() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write the line that was held back, if there is one."""
        if self._held is not None:
            self._write(self._held)
            self._held, self._next = None, self._clock() + INTERVAL
