"""Every metric that may stand in `metrics.jsonl`: its unit and how it is formed over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes:
        unit: What the number counts.
        reduction: How ranks make one number: `ratio` (sum over sum), `sum`, `max`, `min/mean/max` (three rows), or
            `same` (every rank has it already).
        greater_is_better: Which way is up, where one value is to be chosen over another.
    """

    unit: str
    reduction: str
    greater_is_better: bool = False


METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats per supervised token", "ratio"),
    "train/grad_norm": Metric("2-norm before clipping", "same"),
    "train/lr": Metric("peak over parameter groups", "same"),
    "train/epoch": Metric("epochs begun or done", "same"),
    "train/tokens": Metric("tokens trained on since the run began", "same"),
    "train/supervised_tokens": Metric("supervised tokens trained on since the run began", "same"),
    "train/skipped_steps": Metric("optimizer steps skipped since the run began", "same"),
    "train/loss_scale": Metric("fp16 loss scale", "same"),
    "time/step_seconds": Metric("seconds, mean over ranks", "min/mean/max"),
    "time/step_seconds_min": Metric("seconds, fastest rank", "min/mean/max"),
    "time/step_seconds_max": Metric("seconds, slowest rank", "min/mean/max"),
    "time/own_seconds": Metric("seconds of loading and forward passes, mean over ranks", "min/mean/max"),
    "time/own_seconds_min": Metric("seconds, rank with the least work or the fastest", "min/mean/max"),
    "time/own_seconds_max": Metric("seconds, the straggler", "min/mean/max"),
    "time/tokens_per_second": Metric("tokens per second, all ranks", "sum"),
    "time/eval_seconds": Metric("seconds, slowest rank", "max"),
    "memory/peak_bytes": Metric("bytes, largest rank", "max"),
    "eval/loss": Metric("nats per supervised token", "ratio"),
    "eval/perplexity": Metric("exp of eval/loss", "ratio"),
    "eval/token_accuracy": Metric("share of supervised tokens predicted first", "ratio", greater_is_better=True),
    "eval/examples": Metric("examples", "sum"),
    "eval/supervised_tokens": Metric("supervised tokens", "sum"),
}


def evaluation_metrics(sums: dict[str, float]) -> dict[str, float]:
    """`eval/...` numbers from sums over the whole validation set.

    Args:
        sums: `loss` (nats), `weight` and `correct` (tokens) and `examples`, summed over all ranks.

    Returns:
        Names of METRICS to numbers. Perplexity beyond a float's range is infinity.
    """
    loss = sums["loss"] / sums["weight"]
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval/token_accuracy": sums["correct"] / sums["weight"],
        "eval/examples": int(sums["examples"]),
        "eval/supervised_tokens": int(sums["weight"]),
    }
