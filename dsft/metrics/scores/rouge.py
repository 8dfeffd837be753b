"""ROUGE-1, -2, -L and -Lsum (Lin 2004), with words of any language; the library `rouge-score` is the judge.

The library's own tokenizer keeps ASCII letters and digits alone, so that it gives 0 for Chinese whatever is written.
For English its rule holds, for every other language `language.words`. Sentences of Lsum are lines, as in the library.
The longest common subsequence is found with a bit for each word (Hyyrö 2004), a thousand words in a millisecond.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

from dsft.errors import UserError
from dsft.metrics.metric import SHOWN, judged
from dsft.metrics.scores.language import AUTO, ENGLISH, tokens, words
from dsft.metrics.scores.score import WORDS, Choices, Maker, Score, means

_ASCII = re.compile(r"[a-z0-9]+")
_SAYS = re.compile(r"[^\W_]")

Three = tuple[float, float, float]
"""Precision, recall and F1."""


def subsequence(left: Sequence[str], right: Sequence[str]) -> list[int]:
    """Places of a longest common subsequence in `left`, the one that `rouge-score` finds of several."""
    rows = _rows(left, right)
    found, row, column = [], len(left), len(right)
    while row and column:
        if left[row - 1] == right[column - 1]:
            found.append(row - 1)
            row, column = row - 1, column - 1
        elif _length(rows[row], column - 1) > _length(rows[row - 1], column):
            column -= 1
        else:
            row -= 1
    return found[::-1]


def _rows(left: Sequence[str], right: Sequence[str]) -> list[int]:
    """For each beginning of `left` a number whose bit j is 0 where the longest common subsequence with `right[:j + 1]`
    is longer than with `right[:j]`."""
    places: dict[str, int] = {}
    for place, word in enumerate(right):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(right)) - 1
    rows = [whole]
    for word in left:
        before, at = rows[-1], places.get(word, 0)
        rows.append(((before + (before & at)) | (before & ~at)) & whole)
    return rows


def _length(row: int, columns: int) -> int:
    return columns - (row & ((1 << columns) - 1)).bit_count()


def _joined(lines: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(lines))


def _three(hits: int, said: int, right: int) -> Three:
    precision, recall = hits / max(said, 1), hits / max(right, 1)
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def _grams(order: int) -> Callable[[list[list[str]], list[list[str]]], Three]:
    def compare(said: list[list[str]], right: list[list[str]]) -> Three:
        own, true = (Counter(zip(*(joined[n:] for n in range(order)))) for joined in (_joined(said), _joined(right)))
        return _three((own & true).total(), own.total(), true.total())

    return compare


def _longest(said: list[list[str]], right: list[list[str]]) -> Three:
    own, true = _joined(said), _joined(right)
    return _three(_length(_rows(true, own)[-1], len(own)), len(own), len(true))


def _of_lines(said: list[list[str]], right: list[list[str]]) -> Three:
    """By the union over all lines of what each has in common with a line of the reference; no word counts twice."""
    left = Counter(_joined(said))
    hits = 0
    for line in right:
        for place in sorted({place for other in said for place in subsequence(line, other)}):
            if left[line[place]]:
                hits += 1
                left[line[place]] -= 1
    return _three(hits, sum(map(len, said)), sum(map(len, right)))


KINDS: dict[str, Callable[[list[list[str]], list[list[str]]], Three]] = {
    "rouge1": _grams(1),
    "rouge2": _grams(2),
    "rougeL": _longest,
    "rougeLsum": _of_lines,
}
"""Of each the three, of lines of words that were written and of the reference's."""


@cache
def _stemmer() -> Any:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise UserError(
            "rouge_stemmed needs the package nltk, which has Porter's stemmer: pip install 'dsft[stem]'; or take rouge."
        ) from None
    return PorterStemmer()


def _maker(prefix: str, stemmed: bool) -> Maker:
    names = [f"{prefix}{kind}{part}" for kind in KINDS for part in ("_precision", "_recall", "")]

    def make(choices: Choices) -> Score:
        def parted(text: str, language: str) -> list[str]:
            if choices.tokenizer != AUTO:
                return [token for token in tokens(text.lower(), choices.tokenizer) if _SAYS.search(token)]
            return _ASCII.findall(text.lower()) if language == ENGLISH else words(text, language)

        def lines(text: str, language: str) -> list[list[str]]:
            made = [parted(line, language) for line in text.split("\n") if line]
            if not stemmed or language != ENGLISH:
                return made
            # as in the library, words of more than three letters alone
            return [[_stemmer().stem(word) if len(word) > 3 else word for word in line] for line in made]

        def count(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
            said, right = lines(prediction, language), [lines(one, language) for one in references]
            # of several references the first one with the best F1
            best = [
                max((compare(said, one) for one in right), key=lambda three: three[2]) for compare in KINDS.values()
            ]
            return [1.0, *(value for three in best for value in three)]

        def sign(language: str) -> str:
            own = "rouge-score" if language == ENGLISH else "words and Han characters"
            stem = type(_stemmer()).__name__ if stemmed and language == ENGLISH else "no"
            return f"tok:{own if choices.tokenizer == AUTO else choices.tokenizer}|stem:{stem}"

        metrics = {name: judged("mean over records", _label(name), name) for name in names}
        metrics |= {name: replace(metric, **SHOWN) for name, metric in metrics.items() if name.endswith(tuple(KINDS))}
        return Score(metrics, count, means(*names), sign)

    return Maker(make, WORDS)


def _label(name: str) -> str:
    kind, _, part = name.removeprefix("stemmed_").partition("_")
    stemmed = ", stemmed" if name.startswith("stemmed_") else ""
    return f"{kind.replace('rouge', 'ROUGE-')} {part or 'F1'}{stemmed}"


rouge = _maker("", stemmed=False)
rouge_stemmed = _maker("stemmed_", stemmed=True)
"""The same with Porter's stemmer on English words."""
