"""BLEU of single texts with the smoothing methods of Chen and Cherry (2014), numbered as NLTK numbers them; NLTK is the
judge. A set's value is the mean over records.

Words are those of BLEU. A text that shares no word with its references has 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from dsft.metrics.metric import judged
from dsft.metrics.scores.language import AUTO, by_language, tokens
from dsft.metrics.scores.score import WORDS, Choices, Maker, Score, means

ORDERS = 4
EPSILON, K, ALPHA = 0.1, 5, 5
"""Of method 1, methods 4 and 7, and method 6, as NLTK has them."""

Counts = list[tuple[float, float]]
"""Of each order of n-grams those that match, and those that there are, at least 1."""


def sentence_bleu(prediction: list[str], references: list[list[str]], method: int) -> float:
    """BLEU of one text, 0 to 1.

    Args:
        prediction: Its words.
        references: Those of its references, at least one.
        method: Smoothing method, 1 to 7; 0 is none.
    """
    counts = [_matches(prediction, references, order) for order in range(1, ORDERS + 2)]
    if not counts[0][0]:
        return 0.0
    smooth = _METHODS[method](counts, len(prediction))
    length = len(prediction)
    closest = min((len(one) for one in references), key=lambda own: (abs(own - length), own))
    penalty = 1.0 if length > closest else math.exp(1 - closest / length)
    if not method and not all(smooth):
        return 0.0
    # what smoothing leaves at 0 is left out, as NLTK does
    return penalty * math.exp(sum(math.log(share) for share in smooth if share) / ORDERS)


def _matches(prediction: list[str], references: list[list[str]], order: int) -> tuple[float, float]:
    own = _grams(prediction, order)
    most: Counter[tuple[str, ...]] = Counter()
    for one in references:
        most |= _grams(one, order)
    return float((own & most).total()), float(max(1, own.total()))


def _grams(text: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[begin : begin + order]) for begin in range(len(text) - order + 1))


def _shares(counts: Counts) -> list[float]:
    return [match / there for match, there in counts]


def _none(counts: Counts, length: int) -> list[float]:
    return _shares(counts[:ORDERS])


def _little(counts: Counts, length: int) -> list[float]:
    return [(match or EPSILON) / there for match, there in counts[:ORDERS]]


def _one_more(counts: Counts, length: int) -> list[float]:
    first, *rest = counts[:ORDERS]
    return [first[0] / first[1], *((match + 1) / (there + 1) for match, there in rest)]


def _halving(counts: Counts, length: int) -> list[float]:
    return _instead_of_nothing(counts, 1.0)


def _halving_by_length(counts: Counts, length: int) -> list[float]:
    return _instead_of_nothing(counts, K / math.log(length)) if length > 1 else _none(counts, length)


def _instead_of_nothing(counts: Counts, factor: float) -> list[float]:
    made, power = [], 1.0
    for match, there in counts[:ORDERS]:
        power *= 1 if match else 2
        made.append((match or 1 / (power * factor)) / there)
    return made


def _averaged(counts: Counts, length: int) -> list[float]:
    return _neighbours(_shares(counts[:ORDERS]), counts)


def _neighbours(shares: list[float], counts: Counts) -> list[float]:
    """Each the mean of the one before, itself and the one after."""
    before, made = shares[0] + 1, []
    for own, after in zip(shares, [*shares[1:], *_shares(counts[ORDERS:])]):
        before = (before + own + after) / 3
        made.append(before)
    return made


def _interpolated(counts: Counts, length: int) -> list[float]:
    made = _shares(counts[:ORDERS])
    for order in range(2, ORDERS):
        prior = made[order - 1] ** 2 / made[order - 2] if made[order - 2] else 0.0
        grams = max(0, length - order)
        made[order] = (counts[order][0] + ALPHA * prior) / (grams + ALPHA)
    return made


def _both(counts: Counts, length: int) -> list[float]:
    return _neighbours(_halving_by_length(counts, length), counts)


_METHODS: tuple[Callable[[Counts, int], list[float]], ...] = (
    *(_none, _little, _one_more, _halving, _halving_by_length, _averaged, _interpolated, _both),
)


def _maker(method: int) -> Maker:
    name = f"sentence_bleu_{method}"

    def make(choices: Choices) -> Score:
        def tokenizer(language: str) -> str:
            return by_language(language) if choices.tokenizer == AUTO else choices.tokenizer

        def count(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
            said, *right = (tokens(text, tokenizer(language)) for text in (prediction, *references))
            return [1.0, sentence_bleu(said, right, method)]

        label = f"Sentence BLEU, smoothing {method}"
        metric = judged("mean over records, 0 to 1", label, name, "{:.4f}")
        return Score({name: metric}, count, means(name), lambda language: f"smooth:{method}|tok:{tokenizer(language)}")

    return Maker(make, WORDS)


makers = {f"sentence_bleu_{method}": _maker(method) for method in range(len(_METHODS))}
