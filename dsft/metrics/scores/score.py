"""What a score of texts is: numbers of one record that add up, and what is formed of their sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsft.metrics.metric import Metric
from dsft.metrics.scores import language as languages

Numbers = dict[str, float]


@dataclass(frozen=True)
class Choices:
    """What may be chosen of scores; each `Maker` says what its score reads.

    Attributes:
        tokenizer: `auto` (each score's own, by language), or a name of `language.TOKENIZERS`.
        normalize: What is done to predictions and references before, of `language.NORMALIZATIONS`, in the order of
            those.
        encoder: A directory with the model whose embeddings are compared, as transformers saves it; none if empty.
        layer: Whose output they are, 1 for the first; -1 is the last.
    """

    tokenizer: str = "auto"
    normalize: tuple[str, ...] = ()
    encoder: str = ""
    layer: int = -1


@dataclass(frozen=True)
class Score:
    """A score of predicted texts against references.

    A set's value is formed of sums over its records, so it depends on no order of them, no number of ranks and no
    size of batches; that of a group of them, or of one alone, is formed in the same way, and so are intervals.

    Attributes:
        metrics: Name -> metric; its `of` names what `form` returns.
        count: (prediction, references, language) -> numbers of the record, as many for all; counts are whole.
        form: (their sums over records) -> the numbers of a set; those that cannot be formed are left out.
        sign: (language) -> what says how it was counted, tokenizer and versions among it.
        compares: Whether it needs references.
        normalize: What is done to texts before (`Choices.normalize`).
    """

    metrics: Mapping[str, Metric]
    count: Callable[[str, Sequence[str], str], Sequence[float]]
    form: Callable[[np.ndarray], Numbers]
    sign: Callable[[str], str]
    compares: bool = True
    normalize: tuple[str, ...] = ()

    def statistics(self, prediction: str, references: Sequence[str], language: str = languages.AUTO) -> np.ndarray:
        """The numbers of one record that add up: float64, shape (k,), where k is the same for all.

        Args:
            prediction: What was written; may be empty.
            references: What is right; may be empty texts.
            language: A code such as `zh`, or `auto` (`language.told`).

        Raises:
            ValueError: There are no references where there have to be; one is none of the kind that is compared; or
                it is no language.
        """
        if self.compares and not references:
            raise ValueError(f"{', '.join(self.metrics)}: a text is compared with references, and this has none")
        prediction, *rest = (languages.normalized(text, self.normalize) for text in (prediction, *references))
        own = languages.told(language, rest if references else [prediction])
        return np.array(self.count(prediction, rest, own), np.float64)

    def signature(self, language: str = languages.OTHER) -> str:
        """How records of a language were counted: what has to be the same where two values are compared."""
        done = [name for name in languages.NORMALIZATIONS if name in self.normalize]
        return self.sign(language) + (f"|normalize:{'+'.join(done)}" if done else "")

    def of_record(self, prediction: str, references: Sequence[str], language: str = languages.AUTO) -> Numbers:
        """The numbers of one record by itself."""
        return self.form(self.statistics(prediction, references, language))

    def of_set(self, records: Iterable[tuple[str, Sequence[str], str]]) -> Numbers:
        """The numbers of a set of (prediction, references, language); none of an empty one."""
        rows = [self.statistics(*record) for record in records]
        return self.form(total(np.stack(rows))) if rows else {}


def total(rows: np.ndarray) -> np.ndarray:
    """Sums of statistics over records, each rounded once, so that the order of records has no say.

    Args:
        rows: Those of each record, shape (records, k).

    Returns:
        Float64, shape (k,).
    """
    return np.array([math.fsum(column) for column in rows.T])


def intervals(
    score: Score, rows: np.ndarray, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Between which values a set's numbers lie, by bootstrap over records (Efron 1979; percentiles).

    Args:
        score: Whose statistics they are.
        rows: Those of each record, shape (records, k), in an order that is the same for any number of ranks.
        resamples: How often as many records are drawn as there are, with replacement.
        confidence: Share of resamples whose numbers lie between.
        seed: What is drawn is known from it and the number of records.

    Returns:
        Name -> (lower, upper), of numbers that each resample has. Of fewer than two records none.
    """
    if len(rows) < 2:
        return {}
    random, shares = np.random.default_rng([seed, len(rows)]), np.full(len(rows), 1 / len(rows))
    drawn = [score.form(random.multinomial(len(rows), shares) @ rows) for _ in range(resamples)]
    names = [name for name in drawn[0] if all(name in one for one in drawn)]
    outside = (1 - confidence) / 2
    found = {name: np.quantile([one[name] for one in drawn], [outside, 1 - outside]) for name in names}
    return {name: (float(lower), float(upper)) for name, (lower, upper) in found.items()}


def means(*names: str) -> Callable[[np.ndarray], Numbers]:
    """What forms means over records, where the statistics are 1 and one number for each name."""

    def form(sums: np.ndarray) -> Numbers:
        return dict(zip(names, (sums[1:] / sums[0]).tolist())) if sums[0] else {}

    return form


@dataclass(frozen=True)
class Maker:
    """What makes a score, and which of `Choices` it reads.

    Attributes:
        make: (choices) -> score.
        reads: Names of what it reads.
    """

    make: Callable[[Choices], Score]
    reads: frozenset[str] = frozenset()

    def __call__(self, choices: Choices) -> Score:
        """The score as it was chosen."""
        made = self.make(choices)
        return replace(made, normalize=choices.normalize) if "normalize" in self.reads else made


TEXTS = frozenset({"normalize"})
WORDS = frozenset({"normalize", "tokenizer"})
"""What scores read that compare texts, and words of texts."""
