"""Scores of short answers: exact match and F1 of words, and the last number of a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dsft.metrics import answers
from dsft.metrics.metric import SHOWN, judged
from dsft.metrics.scores.language import CHINESE
from dsft.metrics.scores.score import Score, means

_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?|[-−]?\.\d+%?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}|####(.*)")


def last_number(text: str) -> Fraction | None:
    r"""The number that a text ends with: of a `\boxed{}` or behind `####` where there is one, else its last; None where
    there is none.

    Full-width digits, thousands' commas, fractions (`3/4`) and percents (a hundredth) are read.
    """
    text = unicodedata.normalize("NFKC", text)
    marked = ["".join(found) for found in _BOXED.findall(text)]
    numbers = _NUMBER.findall(marked[-1] if marked else text)
    if not numbers:
        return None
    written = numbers[-1].replace(",", "").replace("−", "-")
    share = written.endswith("%")
    above, _, below = written.rstrip("%").partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / int(below or 1) / (100 if share else 1)


def _exact(prediction: str, references: Sequence[str], language: str) -> np.ndarray:
    return np.array([1.0, *answers.score(prediction, references, language == CHINESE)])


def _number(prediction: str, references: Sequence[str], language: str) -> np.ndarray:
    said, right = last_number(prediction), [last_number(one) for one in references]
    return np.array([1.0, float(said is not None and said in right)])


def _rules(language: str) -> str:
    return "CMRC 2018" if language == CHINESE else "SQuAD"


answer = Score(
    {
        "exact": judged("share of records", "Exact match", "exact", **SHOWN),
        "token_f1": judged("mean over records", "Token F1", "token_f1", **SHOWN),
    },
    _exact,
    means("exact", "token_f1"),
    _rules,
)
number = Score(
    {"number": judged("share of records", "Number match", "number", **SHOWN)},
    _number,
    means("number"),
    lambda language: "last number",
)
