"""Scores of short answers: exact match and F1 of words, and the last number of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from dsft.metrics import answers
from dsft.metrics.metric import SHOWN, judged
from dsft.metrics.scores.language import CHINESE
from dsft.metrics.scores.score import TEXTS, Maker, Score, means

DIGITS = 1000
"""Of a number; what has more is none. Models that go astray write such."""

_MARK = re.compile(r"\\boxed\s*\{|####\s*(?=[-$¥€£]*\s?\.?\d)")
_LATEX = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
# a minus stands behind nothing that it could be taken from
_NUMBER = re.compile(
    r"((?<![\w.)\]])-)?(?:[$¥€£]\s?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(\d+(?:\.\d+)?))?(?:\s?\\?(%))?"
)
_WIDE_COMMA = re.compile("(?<=[０-９])，(?=[０-９]{3})")
_NARROW = str.maketrans("０１２３４５６７８９．％－／＄￥−", "0123456789.%-/$¥-")
"""Not Unicode's NFKC, which makes m2 of a square metre."""


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction
    percent: bool

    def equals(self, other: Number) -> bool:
        """Whether they are the same to the last digit; 50% is 0.5, and beside a plain number 50 as well."""
        plain = self.value == other.value
        return plain if self.percent == other.percent else plain or self._share == other._share

    @property
    def _share(self) -> Fraction:
        return self.value * 100 if self.percent else self.value


def last_number(text: str) -> Number | None:
    r"""The number that a text ends with: in its last `\boxed{}` or behind its last `####` where there is one, else its
    last; None where there is none.

    Full-width digits and signs, a minus, a currency before it, commas between thousands, fractions (`3/4`,
    `\frac{3}{4}`) and percents are read; words, and 万 or 亿 behind a number, are not. A fraction over 0 and what has
    more than `DIGITS` digits are no numbers.
    """
    text = _WIDE_COMMA.sub(",", text).translate(_NARROW)
    if marks := list(_MARK.finditer(text)):
        behind = text[marks[-1].end() :]
        text = _braced(behind) if marks[-1][0].startswith("\\") else behind.partition("\n")[0]
    found = list(_NUMBER.finditer(_LATEX.sub(r"\1/\2", text)))
    if not found:
        return None
    minus, above, below, percent = found[-1].groups()
    if len(above) + len(below or "") > DIGITS or (below and not Fraction(below)):
        return None
    value = Fraction(above.replace(",", "")) / Fraction(below or 1)
    return Number((-value if minus else value) / (100 if percent else 1), bool(percent))


def _braced(text: str) -> str:
    """What stands before the brace that closes one that is open."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:place]
    return text


def _answer(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
    return [1.0, *answers.score(prediction, references, language == CHINESE)]


def _number(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
    said, right = last_number(prediction), [last_number(one) for one in references]
    if missing := [one for one, read in zip(references, right) if read is None]:
        raise ValueError(f"number: there is no number in the reference {missing[0][:80]!r}")
    return [1.0, said is not None and any(said.equals(one) for one in right if one), said is not None]


def _rules(language: str) -> str:
    return f"rules:{'CMRC 2018' if language == CHINESE else 'SQuAD'}"


answer = Maker(
    lambda choices: Score(
        {
            "exact": judged("share of records", "Exact match", "exact", **SHOWN),
            "token_f1": judged("mean over records", "Token F1", "token_f1", **SHOWN),
        },
        _answer,
        means("exact", "token_f1"),
        _rules,
    ),
    TEXTS,
)
number = Maker(
    lambda choices: Score(
        {
            "number": judged("share of records", "Number match", "number", **SHOWN),
            "number_read": judged("share of records", "Predictions with a number", "number_read"),
        },
        _number,
        means("number", "number_read"),
        lambda language: "last number, exact",
    )
)
