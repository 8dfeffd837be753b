"""What predicted texts are like beside their references, and by themselves: length, and how much they repeat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsft.metrics.metric import judged
from dsft.metrics.scores.language import AUTO, tokens, words
from dsft.metrics.scores.score import WORDS, Choices, Maker, Numbers, Score

REPEATED = 4
"""Words of a sequence that is looked for again in the same text (Welleck et al. 2019, arXiv:1908.04319)."""


def _parted(text: str, language: str, choices: Choices) -> list[str]:
    return words(text, language) if choices.tokenizer == AUTO else tokens(text, choices.tokenizer)


def _sign(language: str, choices: Choices) -> str:
    return f"tok:{'words and Han characters' if choices.tokenizer == AUTO else choices.tokenizer}"


def _make_length(choices: Choices) -> Score:
    def count(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
        said, *right = (len(_parted(text, language, choices)) for text in (prediction, *references))
        return [said, min(right, key=lambda length: (abs(length - said), length))]

    def form(sums: np.ndarray) -> Numbers:
        return {"length_ratio": float(sums[0] / sums[1])} if sums[1] else {}

    unit = "words over those of the closest reference"
    metric = judged(unit, "Length ratio", "length_ratio", "{:.3f}", better=None)
    return Score({"length_ratio": metric}, count, form, lambda language: _sign(language, choices))


def _make_diversity(choices: Choices) -> Score:
    def count(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
        own, made = _parted(prediction, language, choices), list[float]()
        for order in (1, 2, REPEATED):
            grams = list(zip(*(own[n:] for n in range(order))))
            made += [len(set(grams)), len(grams)]
        return made

    def form(sums: np.ndarray) -> Numbers:
        different, there = sums[::2], sums[1::2]
        shares = {
            name: float(d / t) for name, d, t in zip(("distinct_1", "distinct_2", "repetition"), different, there) if t
        }
        return shares | {"repetition": 1 - shares["repetition"]} if "repetition" in shares else shares

    metrics = {
        "distinct_1": judged("different words of a text over all", "Distinct-1", "distinct_1", better=None),
        "distinct_2": judged("different pairs of a text over all", "Distinct-2", "distinct_2", better=None),
        "repetition": judged(
            "sequences of 4 words that came before in the text, over all", "Repetition", "repetition", better="lower"
        ),
    }
    return Score(metrics, count, form, lambda language: _sign(language, choices), compares=False)


length = Maker(_make_length, WORDS)
diversity = Maker(_make_diversity, WORDS)
