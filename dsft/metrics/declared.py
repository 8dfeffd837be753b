"""The metrics that a run declares: those of every run, and its task's."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dsft.metrics.metric import Metric, Reduction, Row

_training = partial(Metric, reduction=Reduction.SAME, row=Row.TRAINING, bar=None, headline=False)

_BEFORE: dict[str, Metric] = {
    "time/tokens_per_second": _training(
        "tokens per second, all ranks", "Throughput", "{:,.0f}", ("new_tokens", "seconds"), operator.truediv,
        reduction=Reduction.MAX, bar="{value} tokens/s", better="higher",
    ),
    "train/lr": _training(
        "peak over parameter groups", "Learning rate", "{:.2e}", ("lr",), bar="lr {value}",
        meaning="the largest peak rate x the schedule",
    ),
    "train/grad_norm": _training(
        "2-norm before clipping", "Gradient norm", "{:.3g}", ("grad_norm",), bar="grad norm {value}"
    ),
    "train/epoch": _training("epochs", "Epoch", "{:.2f}", ("epoch",), meaning="done, counted in steps"),
    "train/tokens": _training(
        "tokens", "Tokens", "{:,.0f}", ("tokens",), int, headline=True, meaning="trained on since the run began"
    ),
}  # fmt: skip

_AFTER: dict[str, Metric] = {
    "train/skipped_steps": _training(
        "optimizer steps", "Skipped steps", "{:,.0f}", ("skipped_steps",), int, headline=True, bar="{value} skipped",
        quiet=0, meaning="skipped for overflow or NaN since the run began",
    ),
    "train/loss_scale": _training(
        "factor", "Loss scale", "{:g}", ("loss_scale",), optional=True, meaning="with fp16 only"
    ),
    "time/step_seconds_min": _training(
        "seconds, fastest rank", "Step time", "{:.3f}", ("seconds", "steps"), operator.truediv,
        reduction=Reduction.MIN, meaning="waiting for other ranks included",
    ),
    "time/step_seconds": _training(
        "seconds, mean over ranks", "Step time", "{:.3f}", ("seconds", "steps"), operator.truediv,
        reduction=Reduction.MEAN, meaning="waiting for other ranks included",
    ),
    "time/step_seconds_max": _training(
        "seconds, slowest rank", "Step time", "{:.3f}", ("seconds", "steps"), operator.truediv,
        reduction=Reduction.MAX, meaning="waiting for other ranks included",
    ),
    "time/own_seconds_min": _training(
        "seconds, rank with the least work or the fastest", "Own work", "{:.3f}", ("own_seconds", "steps"),
        operator.truediv, reduction=Reduction.MIN, meaning="waiting for a batch, and forward passes",
    ),
    "time/own_seconds": _training(
        "seconds, mean over ranks", "Own work", "{:.3f}", ("own_seconds", "steps"), operator.truediv,
        reduction=Reduction.MEAN, meaning="waiting for a batch, and forward passes",
    ),
    "time/own_seconds_max": _training(
        "seconds, the straggler", "Own work", "{:.3f}", ("own_seconds", "steps"), operator.truediv,
        reduction=Reduction.MAX,
        meaning="a rank's own work in a step: waiting for a batch and forward passes, without waiting for other "
        "ranks, so that a straggler shows (under ZeRO-3 forward passes gather weights, so some waiting is in it)",
    ),
    "memory/peak_bytes": _training(
        "bytes, largest rank", "Peak memory", lambda value: f"{value / 2**30:.2f} GiB per rank", ("peak_bytes",), int,
        reduction=Reduction.MAX, headline=True, meaning="allocated on a GPU, resident on a CPU",
    ),
}  # fmt: skip

_EVALUATION: dict[str, Metric] = {
    "eval/examples": Metric(
        "examples", "Examples", "{:,.0f}", ("examples",), int, bar=None, meaning="each exactly once over all ranks"
    ),
    "time/eval_seconds": Metric(
        "seconds, slowest rank", "Evaluation time", "{:.1f}", ("eval_seconds",), reduction=Reduction.MAX, bar=None,
        headline=False, meaning="of one evaluation",
    ),
}  # fmt: skip


def declare(task: Mapping[str, Metric], target: str) -> dict[str, Metric]:
    """All metrics of a run, in the order of its rows.

    Args:
        task: The task's own by name without prefix, `loss` among them (`Task.metrics`). They become `eval/NAME` and
            `test/NAME`, and `loss` is `train/loss` as well.
        target: What the weights of examples count (`Task.target`).
    """
    words = target.replace("_", " ")
    weight = partial(Metric, words, words.capitalize(), "{:,.0f}", form=round, bar=None)
    return {
        "train/loss": replace(task["loss"], row=Row.TRAINING, headline=False),
        **_BEFORE,
        f"train/{target}": weight(
            ("weight_so_far",), reduction=Reduction.SAME, row=Row.TRAINING, meaning="trained on since the run began"
        ),
        **_AFTER,
        **{f"eval/{name}": replace(metric, row=Row.EVALUATION) for name, metric in task.items()},
        "eval/examples": _EVALUATION["eval/examples"],
        f"eval/{target}": weight(("weight",), headline=False, meaning="evaluated"),
        "time/eval_seconds": _EVALUATION["time/eval_seconds"],
        **{f"test/{name}": _of_test(metric) for name, metric in task.items()},
        "test/examples": _of_test(_EVALUATION["eval/examples"]),
    }


def _of_test(metric: Metric) -> Metric:
    """The same metric of the test set; nothing is chosen by it."""
    return replace(metric, label=f"Test: {metric.label.lower()}", row=Row.TEST)


def comparable(metrics: Mapping[str, Metric]) -> list[str]:
    """Names of an evaluation's metrics by which one value is better than another."""
    return [name for name, metric in metrics.items() if metric.row is Row.EVALUATION and metric.better]
