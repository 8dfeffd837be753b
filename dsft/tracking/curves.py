"""Curves as inline SVG whose colours are the page's own, so that they follow its light or dark theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsft.metrics import Metric

Rows = list[dict[str, float]]
Series = tuple[list[float], list[float]]

LIMIT = 2000
"""Points of one curve; a longer one keeps the extremes of each stretch, so that no spike is lost."""

# The figure is drawn in these colours, and each is then replaced by a variable of the page's style sheet.
COLOURS = {"#000001": "var(--ink)", "#000002": "var(--faint)", "#000003": "var(--train)", "#000004": "var(--eval)"}
INK, FAINT, TRAIN, EVAL = COLOURS


def curves(rows: Rows, metrics: Mapping[str, Metric]) -> list[tuple[str, str]]:
    """Draw what the rows hold.

    Args:
        rows: Rows of `metrics.jsonl`.
        metrics: All that the run declares, by name.

    Returns:
        Title and SVG of each figure that has at least one finite point: loss, learning rate, gradient norm,
        throughput, step time.
    """
    figures = {
        "train/loss": _loss(rows),
        "train/lr": _line(rows, "train/lr", noisy=False),
        "train/grad_norm": _line(rows, "train/grad_norm"),
        "time/tokens_per_second": _line(rows, "time/tokens_per_second", from_zero=True),
        "time/step_seconds": _step_time(rows),
    }
    return [(f"{metrics[name].label}, {metrics[name].unit}", svg) for name, svg in figures.items() if svg]


def series(rows: Rows, name: str) -> Series:
    """Steps and finite values of one metric."""
    points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
    return [x for x, _ in points], [y for _, y in points]


def _loss(rows: Rows) -> str | None:
    train, evaluation = series(rows, "train/loss"), series(rows, "eval/loss")
    if not train[0] and not evaluation[0]:
        return None
    figure, axes = _axes(width=9.6, height=3.2)
    _draw(axes, train, "training")
    axes.plot(*evaluation, color=EVAL, linewidth=1.6, marker="o", markersize=4, label="evaluation")
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")
    return _svg(figure)


def _line(rows: Rows, name: str, noisy: bool = True, from_zero: bool = False) -> str | None:
    points = series(rows, name)
    if not points[0]:
        return None
    figure, axes = _axes()
    _draw(axes, points, noisy=noisy)
    values = points[1]
    if from_zero:
        axes.set_ylim(bottom=0)
    elif min(values) > 0 and max(values) > 100 * sorted(values)[len(values) // 2]:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_number)
    return _svg(figure)


def _step_time(rows: Rows) -> str | None:
    points = series(rows, "time/step_seconds")
    (steps, low), (_, high) = series(rows, "time/step_seconds_min"), series(rows, "time/step_seconds_max")
    if not points[0]:
        return None
    figure, axes = _axes()
    if steps and len(low) == len(high):
        stretches = _stretches(len(steps), LIMIT // 4)
        bottom, top = [min(low[s]) for s in stretches], [max(high[s]) for s in stretches]
        axes.fill_between([steps[s.start] for s in stretches], bottom, top, color=EVAL, alpha=0.5, linewidth=0)
    _draw(axes, points)
    axes.set_ylim(bottom=0)
    return _svg(figure)


def _draw(axes: Axes, points: Series, label: str | None = None, noisy: bool = True) -> None:
    """One curve; a long and noisy one is drawn faint, with its running mean over it."""
    xs, ys = points
    long = noisy and len(xs) > 100
    style = {"alpha": 0.35, "linewidth": 0.8} if long else {"linewidth": 1.6, "label": label}
    axes.plot(*_thinned(points), color=TRAIN, marker=_marker(points), markersize=3, **style)
    if long:
        smooth = (xs, _running_mean(ys, span=len(ys) / 50))
        axes.plot(*_thinned(smooth), color=TRAIN, linewidth=1.6, label=label and f"{label}, smoothed")


def _running_mean(values: list[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, without a pull towards a made-up start."""
    keep, total, weight, means = 1 - 1 / max(span, 1.0), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def _thinned(points: Series) -> Series:
    """At most `LIMIT` points: of each stretch its lowest and its highest."""
    xs, ys = points
    if len(xs) <= LIMIT:
        return points
    kept = []
    for stretch in _stretches(len(xs), LIMIT // 2):
        places = range(len(xs))[stretch]
        kept += sorted({min(places, key=ys.__getitem__), max(places, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def _stretches(length: int, most: int) -> list[slice]:
    """Cut `length` places into at most `most` stretches of equal size."""
    size = math.ceil(length / most)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _marker(points: Series) -> str | None:
    return "o" if len(points[0]) <= 30 else None


def _axes(width: float = 4.7, height: float = 2.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(_number)
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _number(value: float, _: float) -> str:
    """A tick of the vertical axis."""
    return f"{value:,.4g}" if abs(value) >= 1 else f"{value:.3g}"


def _svg(figure: Figure) -> str:
    """The figure's `<svg>` element alone: nothing that names another place, no id but those it refers to itself."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    tag, body = svg[svg.index("<svg") :].split(">", 1)
    tag = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", tag)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # its rules would reach the whole page
    body = re.sub(r" font-family: [^;]*;", "", body)
    svg = tag + ">" + re.sub(r'<g id="[^"]*"', "<g", body)
    for drawn, shown in COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg
