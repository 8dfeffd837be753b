"""A metric is declared once, and ledger, bar, report, W&B, checks and documents act on the declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean
from typing import Any, Literal


class Reduction(Enum):
    """How the numbers of all ranks, in the order of ranks, become one."""

    SUM = "sum"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    SAME = "same"
    """Every rank has it already."""

    def __call__(self, values: Sequence[float]) -> float:
        """The one number."""
        return _REDUCTIONS[self](values)


_REDUCTIONS: dict[Reduction, Callable[[Sequence[float]], float]] = {
    Reduction.SUM: sum,
    Reduction.MEAN: fmean,
    Reduction.MIN: min,
    Reduction.MAX: max,
    Reduction.SAME: lambda values: values[0],
}


class Row(Enum):
    """Which rows of `metrics.jsonl` a metric stands in."""

    TRAINING = "training"
    EVALUATION = "evaluation"
    TEST = "test"


def _as_it_is(value: float) -> float:
    return value


@dataclass(frozen=True)
class Metric:
    """What is known of a number that a run records.

    Attributes:
        unit: What it counts.
        label: Its name for people.
        format: Turns it into text: a format string such as `{:.4f}`, or a function.
        of: Quantities that it is formed from. A task's are sums: `loss`, `weight`, and the task's own; a run's are
            listed in `metrics.declared`.
        form: (these quantities, each already reduced over ranks) -> the number, or None where there is none and rows
            leave it out. Quotients are formed here, once.
        reduction: How each quantity becomes one over ranks.
        better: Which way is up, where one value is to be chosen over another; None where neither is.
        row: Which rows it stands in.
        bar: How the progress bar says it, with `{label}` and `{value}`; None where it does not.
        headline: Whether the report's head and the final summary name it.
        optional: Whether a row may lack it, as not every run has the quantities.
        quiet: A value that the bar leaves out.
        needs: A setting that leaves it out where it is 0.
        meaning: More about it, for the table of metrics.
    """

    unit: str
    label: str
    format: str | Callable[[float], str]
    of: tuple[str, ...]
    form: Callable[..., float | None] = _as_it_is
    reduction: Reduction = Reduction.SUM
    better: Literal["lower", "higher"] | None = None
    row: Row = Row.EVALUATION
    bar: str | None = "{label} {value}"
    headline: bool = True
    optional: bool = False
    quiet: float | None = None
    needs: str | None = None
    meaning: str = ""

    def shown(self, value: float) -> str:
        """The number as text."""
        return self.format.format(value) if isinstance(self.format, str) else self.format(value)

    def beside_the_bar(self, value: float) -> str:
        """What the progress bar says; empty where it says nothing."""
        if self.bar is None or value == self.quiet:
            return ""
        return self.bar.format(label=self.label.lower(), value=self.shown(value))

    def gain(self, value: float, over: float) -> float:
        """By how much `value` is better than another one; negative where it is worse.

        Raises:
            ValueError: The metric has no direction.
        """
        if self.better is None:
            raise ValueError(f"no value of the metric {self.label!r} is better than another")
        return value - over if self.better == "higher" else over - value


def judged(unit: str, label: str, name: str, format: str = "{:.2%}", **more: Any) -> Metric:
    """A metric that a task forms of a whole evaluation (`Task.judge`), which every rank has, and a row may lack.

    Args:
        unit: As of `Metric`; likewise `label`, `format` and `more`. Unless they say it, higher is better, and neither
            bar nor headline has it.
        name: The quantity.
    """
    options: dict[str, Any] = {"better": "higher", "bar": None, "headline": False} | more
    return Metric(unit, label, format, (name,), reduction=Reduction.SAME, optional=True, **options)


SHOWN: dict[str, Any] = {"bar": "{label} {value}", "headline": True}
"""Options of a metric (`judged`) that bar and headline name."""


def mean(total: float, count: float) -> float | None:
    """`total` for each that was counted; None of none."""
    return total / count if count else None


def form(metrics: Mapping[str, Metric], row: Row, ranks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The numbers of a row.

    Args:
        metrics: All that the run declares, by name.
        row: Which row.
        ranks: Every rank's value of each quantity, in the order of ranks.

    Raises:
        ValueError: A quantity is missing that a metric is formed from.
    """
    made: dict[str, float | None] = {}
    for name, metric in metrics.items():
        if metric.row is not row:
            continue
        missing = [quantity for quantity in metric.of if quantity not in ranks]
        if not missing:
            made[name] = metric.form(*(metric.reduction(ranks[quantity]) for quantity in metric.of))
        elif not metric.optional:
            raise ValueError(f"the metric {name} is formed from {', '.join(missing)}, which nothing gives")
    return {name: value for name, value in made.items() if value is not None}
