"""What a score of texts is: numbers of one record that add up, and what is formed of their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsft.metrics.metric import Metric


@dataclass(frozen=True)
class Score:
    """A score of predicted texts against references.

    A set's value is formed of sums over its records, so it depends on no order of them, no number of ranks and no
    size of batches, and that of a part of them is formed in the same way.

    Attributes:
        metrics: Name -> metric; its `of` names what `form` returns.
        statistics: (prediction, references, language) -> numbers of the record, float64, shape (k,), where k is the
            same for all.
        form: (their sums over records) -> the numbers of a set; those that cannot be formed are left out.
        signature: (language) -> what says how it was counted, tokenizer and versions among it.
    """

    metrics: Mapping[str, Metric]
    statistics: Callable[[str, Sequence[str], str], np.ndarray]
    form: Callable[[np.ndarray], dict[str, float]]
    signature: Callable[[str], str]

    def of_record(self, prediction: str, references: Sequence[str], language: str) -> dict[str, float]:
        """The numbers of one record by itself."""
        return self.form(self.statistics(prediction, references, language))

    def of_set(self, records: Iterable[tuple[str, Sequence[str], str]]) -> dict[str, float]:
        """The numbers of a set of (prediction, references, language)."""
        sums: np.ndarray | None = None
        for record in records:
            own = self.statistics(*record)
            sums = own if sums is None else sums + own
        return {} if sums is None else self.form(sums)


def means(*names: str) -> Callable[[np.ndarray], dict[str, float]]:
    """What forms means over records, where the statistics are 1 and one number for each name."""

    def form(sums: np.ndarray) -> dict[str, float]:
        return dict(zip(names, (sums[1:] / sums[0]).tolist())) if sums[0] else {}

    return form
