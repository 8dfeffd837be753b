"""How well an answer to a question agrees with those of people: exact match and F1, in English and in Chinese.

Questions about a text with more Chinese characters than letters go by the rules of CMRC 2018's script, all others by
those of SQuAD's (1.1 and 2.0). A question without an answer is answered rightly by nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dsft.types import HAN

_HAN = re.compile(f"({HAN})")
_LETTER = re.compile(r"[^\W\d_]")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LEFT_OUT = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
"""What CMRC's script leaves out: of ASCII these marks alone; of an ellipsis nothing, as it looks for two at once."""

_WORD = re.compile(r"[^\W_]+(?:[.,'][^\W_]+)*|[^\w\s]|_")
"""Words between Chinese characters; CMRC's script asks NLTK for them, which also cuts `don't` in two."""


class Score(NamedTuple):
    """How well an answer agrees with the best of the reference answers, each 0 to 1."""

    exact: float
    f1: float


def score(given: str, references: Sequence[str], chinese: bool) -> Score:
    """The scores of one answer.

    Args:
        given: The answer; empty where there is said to be none.
        references: Those of people, of which the best counts for each score; none of a question without an answer.
        chinese: Whether CMRC's rules hold, and not SQuAD's.
    """
    plain, segments, common = _RULES[chinese]
    right = [one for one in references if plain(one)] or [""]
    exact = max(float(plain(given) == plain(one)) for one in right)
    return Score(exact, max(_f1(segments(given), segments(one), common) for one in right))


def is_chinese(text: str) -> bool:
    """Whether a text has more Chinese characters than other letters."""
    han = len(_HAN.findall(text))
    return han > len(_LETTER.findall(text)) - han


def no_answer_threshold(margins: np.ndarray, gains: np.ndarray) -> float:
    """By how much `nothing` has to be better than the best span, so that most is won over a whole set.

    Args:
        margins: Of each question, score of nothing less score of the best span.
        gains: What answering with nothing wins over answering with the span, weighted.

    Returns:
        The threshold above which nothing is answered, the largest of equally good ones.
    """
    order = np.argsort(-margins, kind="stable")
    rising = -margins[order]
    won = np.concatenate([[0.0], np.cumsum(gains[order])])
    # questions of equal margin are answered alike
    allowed = np.concatenate([[True], np.append(rising[1:] != rising[:-1], True)]) if len(margins) else np.ones(1, bool)
    best = int(np.argmax(np.where(allowed, won, -np.inf)))
    if best == len(margins):
        return float(margins.min() - 1) if len(margins) else 0.0
    if best == 0:
        return float(margins.max())
    return float((margins[order[best - 1]] + margins[order[best]]) / 2)


def _f1(given: list[str], right: list[str], common: Callable[[list[str], list[str]], int]) -> float:
    if not given or not right:
        return float(given == right)
    return 2 * common(given, right) / (len(given) + len(right))


def _squad(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _words(text: str) -> list[str]:
    return _squad(text).split()


def _shared(left: list[str], right: list[str]) -> int:
    return (Counter(left) & Counter(right)).total()


def _cmrc(text: str) -> str:
    return text.lower().strip().translate(_LEFT_OUT)


def _characters(text: str) -> list[str]:
    """Chinese characters one by one, and words of all else."""
    found: list[str] = []
    for part in _HAN.split(_cmrc(text)):
        found += [part] if _HAN.fullmatch(part) else _WORD.findall(part)
    return found


def _longest_run(left: list[str], right: list[str]) -> int:
    """Length of the longest run that stands in both."""
    best, before = 0, [0] * (len(right) + 1)
    for one in left:
        here = [0] * (len(right) + 1)
        for place, other in enumerate(right, start=1):
            if one == other:
                here[place] = before[place - 1] + 1
                best = max(best, here[place])
        before = here
    return best


_RULES: dict[bool, tuple[Callable[[str], str], Callable[[str], list[str]], Callable[[list[str], list[str]], int]]] = {
    False: (_squad, _words, _shared),
    True: (_cmrc, _characters, _longest_run),
}
