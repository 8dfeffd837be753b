"""What predicted texts are like beside their references: their length, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsft.metrics.metric import judged
from dsft.metrics.scores.language import words
from dsft.metrics.scores.score import Score

REPEATED = 4
"""Words of a sequence that is looked for again in the same text."""


def _statistics(prediction: str, references: Sequence[str], language: str) -> np.ndarray:
    own, right = words(prediction, language), [words(one, language) for one in references]
    closest = min((len(one) for one in right), key=lambda length: (abs(length - len(own)), length))
    made = [len(own), closest]
    for order in (1, 2, REPEATED):
        grams = [tuple(own[begin : begin + order]) for begin in range(len(own) - order + 1)]
        made += [len(set(grams)), len(grams)]
    return np.array(made, np.float64)


def _form(sums: np.ndarray) -> dict[str, float]:
    length, reference, *pairs = sums.tolist()
    made = {"length_ratio": length / reference} if reference else {}
    shares = [own / there if there else None for own, there in zip(pairs[::2], pairs[1::2])]
    for name, share in zip(("distinct_1", "distinct_2", "repetition"), shares):
        if share is not None:
            made[name] = 1 - share if name == "repetition" else share
    return made


diversity = Score(
    {
        "length_ratio": judged("words over those of the closest reference", "Length ratio", "length_ratio", "{:.3f}",
                               better=None),
        "distinct_1": judged("different words of a record over all", "Distinct-1", "distinct_1", better=None),
        "distinct_2": judged("different pairs of a record over all", "Distinct-2", "distinct_2", better=None),
        "repetition": judged("sequences of 4 words that came before in the record", "Repetition", "repetition",
                             better="lower"),
    },
    _statistics,
    _form,
    lambda language: "tokenizer words",
)  # fmt: skip
