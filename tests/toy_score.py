"""A whole score in one file: how often a prediction shouts where its references do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsft.metrics.metric import judged
from dsft.metrics.scores.score import TEXTS, Maker, Numbers, Score


def shouts(text: str) -> int:
    return text.count("!")


def count(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
    return [max(0, shouts(prediction) - max(map(shouts, references))), 1]


def form(sums: np.ndarray) -> Numbers:
    return {"shouting": float(sums[0] / sums[1])} if sums[1] else {}


METRICS = {"shouting": judged("exclamation marks a record", "Shouting", "shouting", "{:.2f}", better="lower")}

shouting = Maker(lambda choices: Score(METRICS, count, form, sign=lambda language: "marks:!"), reads=TEXTS)
