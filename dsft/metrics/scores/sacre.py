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
from dsft.metrics.scores.language import AUTO, CHINESE, UNSPACED, by_language, tokens
from dsft.metrics.scores.score import TEXTS, WORDS, Choices, Maker, Numbers, Score


@cache
def _bleu(tokenizer: str) -> Any:
    """sacrebleu's own but for the words, which it is given."""
    made = BLEU(tokenize="none", force=True)
    made.tokenizer_signature = "rjieba" if tokenizer == "words" else tokenizer
    return made


@cache
def _chrf(word_order: int) -> Any:
    return CHRF(word_order=word_order)


@cache
def _ter(language: str) -> Any:
    """Characters instead of words where these are not parted by spaces, as sacrebleu's documentation has it."""
    asian = language == CHINESE or language in UNSPACED
    made = TER(normalized=asian, asian_support=asian)
    # without the memory of the last 65,536 texts
    made.tokenizer = made.tokenizer.__call__.__wrapped__.__get__(made.tokenizer)
    return made


def _score(name: str, label: str, metric: Callable[[str], Any], better: str = "higher", words: Any = None) -> Score:
    def count(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
        if words:
            prediction, *references = (words(text, language) for text in (prediction, *references))
        # what sacrebleu itself sums, and resamples for its intervals
        (own,) = metric(language)._extract_corpus_statistics([prediction], [[one] for one in references])
        return own

    def form(sums: np.ndarray) -> Numbers:
        return {name: float(metric("en")._aggregate_and_compute([sums.tolist()]).score)}

    def sign(language: str) -> str:
        asked = metric(language)
        asked.num_refs = -1  # each record may have a number of its own
        return str(asked.get_signature())

    declared = judged("0 to 100", label, name, "{:.2f}", better=better, **SHOWN)
    return Score({name: declared}, count, form, sign)


def _make_bleu(choices: Choices) -> Score:
    def tokenizer(language: str) -> str:
        return by_language(language) if choices.tokenizer == AUTO else choices.tokenizer

    def words(text: str, language: str) -> str:
        return " ".join(tokens(text, tokenizer(language)))

    return _score("bleu", "BLEU", lambda language: _bleu(tokenizer(language)), words=words)


bleu = Maker(_make_bleu, WORDS)
chrf = Maker(lambda choices: _score("chrf", "chrF", lambda language: _chrf(0)), TEXTS)
chrf_words = Maker(lambda choices: _score("chrf_words", "chrF++", lambda language: _chrf(2)), TEXTS)
ter = Maker(lambda choices: _score("ter", "TER", _ter, better="lower"), TEXTS)
