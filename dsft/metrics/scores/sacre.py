"""BLEU, chrF and TER of a set as sacrebleu counts them (Post 2018, arXiv:1804.08771), in parts that add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from dsft.metrics.metric import SHOWN, judged
from dsft.metrics.scores.language import CHINESE, UNSPACED
from dsft.metrics.scores.score import Score


@cache
def _bleu(language: str) -> Any:
    """A record of the set may be in any language, so that n-grams of several tokenizers may be summed."""
    return BLEU(tokenize="zh" if language == CHINESE else "char" if language in UNSPACED else "13a")


@cache
def _chrf(language: str) -> Any:
    return CHRF()


@cache
def _chrf_words(language: str) -> Any:
    return CHRF(word_order=2)


@cache
def _ter(language: str) -> Any:
    asian = language == CHINESE or language in UNSPACED
    return TER(normalized=asian, asian_support=asian)


def _made(name: str, label: str, metric: Callable[[str], Any], better: str = "higher") -> Score:
    def statistics(prediction: str, references: Sequence[str], language: str) -> np.ndarray:
        # what sacrebleu itself sums, and resamples for its intervals
        (own,) = metric(language)._extract_corpus_statistics([prediction], [[one] for one in references])
        return np.array(own, np.float64)

    def form(sums: np.ndarray) -> dict[str, float]:
        whole = [int(n) if float(n).is_integer() else n for n in sums.tolist()]
        return {name: float(metric("en")._aggregate_and_compute([whole]).score)}

    def signature(language: str) -> str:
        asked = metric(language)
        asked._extract_corpus_statistics([""], [[""]])  # it knows the number of references from then on
        return str(asked.get_signature()).replace("nrefs:1|", "")  # each record may have a number of its own

    declared = judged("0 to 100", label, name, "{:.2f}", better=better, **SHOWN)
    return Score({name: declared}, statistics, form, signature)


bleu = _made("bleu", "BLEU", _bleu)
chrf = _made("chrf", "chrF", _chrf)
chrf_words = _made("chrf_words", "chrF++", _chrf_words)
ter = _made("ter", "TER", _ter, better="lower")
