"""ROUGE-1, -2, -L and -Lsum (Lin 2004) by the library `rouge-score`, with words of any language.

The library's own tokenizer keeps ASCII letters and digits alone, so that it gives 0 for Chinese whatever is written. It
is used for English; every other language gets `language.words`. Sentences of Lsum are lines, as in the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from dsft.metrics.metric import SHOWN, judged
from dsft.metrics.scores.language import ENGLISH, words
from dsft.metrics.scores.score import Score, means

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class _Words:
    """The library's form of `language.words`."""

    def __init__(self, language: str) -> None:
        self._language = language

    def tokenize(self, text: str) -> list[str]:
        return words(text, self._language)


@cache
def _scorer(language: str, stemmed: bool) -> RougeScorer:
    tokenizer = DefaultTokenizer(use_stemmer=stemmed) if language == ENGLISH else _Words(language)
    return RougeScorer(list(KINDS), tokenizer=tokenizer)


def _made(prefix: str, stemmed: bool) -> Score:
    names = [f"{prefix}{kind}{part}" for kind in KINDS for part in ("_precision", "_recall", "")]

    def statistics(prediction: str, references: Sequence[str], language: str) -> np.ndarray:
        # of several references the one with the best F1
        best = _scorer(language, stemmed).score_multi(list(references), prediction)
        return np.array([1.0, *(value for kind in KINDS for value in best[kind])])

    def signature(language: str) -> str:
        own = ("stemmed" if stemmed else "own") if language == ENGLISH else "words"
        return f"rouge-score {version('rouge-score')}, tokenizer {own}"

    metrics = {name: judged("mean over records", _label(name), name) for name in names}
    metrics |= {name: replace(metric, **SHOWN) for name, metric in metrics.items() if name.endswith(KINDS)}
    return Score(metrics, statistics, means(*names), signature)


def _label(name: str) -> str:
    kind, _, part = name.removeprefix("stemmed_").partition("_")
    stemmed = ", stemmed" if name.startswith("stemmed_") else ""
    return f"{kind.replace('rouge', 'ROUGE-')} {part or 'F1'}{stemmed}"


rouge = _made("", stemmed=False)
rouge_stemmed = _made("stemmed_", stemmed=True)
"""The same with Porter's stemmer on English words."""
