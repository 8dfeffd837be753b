"""Metrics of classification, formed from the logits of all records at once; scikit-learn is their judge.

Numbers that cannot be formed, such as an area under a curve where only one kind of record is there, are left out.
Nothing depends on the order of records.
"""

from __future__ import annotations

import numpy as np

BINS = 15
"""Of the calibration error (Guo et al. 2017, arXiv:1706.04599)."""

Numbers = dict[str, float]


def single_label(logits: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> Numbers:
    """Metrics where each record has one label, which is taken to be the one with the largest logit.

    Args:
        logits: Shape (records, labels).
        targets: Number of each record's label, int, shape (records,).
        counts: What each record counts, shape (records,).

    Returns:
        `accuracy`, `balanced_accuracy`, `mcc`, `log_loss` (nats), `calibration_error`; `precision_macro` and the like,
        `_weighted` by the labels' records; `f1_micro`; `roc_auc` and `average_precision`, of two labels for the second,
        of more the mean over labels, each against the others. Macro means are over labels that a record has or is
        given.
    """
    if not counts.sum() > 0:
        return {}
    predicted, labels = logits.argmax(-1), logits.shape[1]
    table = confusion(predicted, targets, counts, labels)
    right, given, true = np.diag(table), table.sum(0), table.sum(1)
    seen = (given > 0) | (true > 0)
    accuracy = float(right.sum() / true.sum())
    logs = _log_softmax(logits)
    probabilities = np.exp(logs)
    found = {
        "accuracy": accuracy,
        **_averaged(right, given, true, seen),
        "f1_micro": accuracy,
        "balanced_accuracy": float(_ratio(right, true)[true > 0].mean()),
        "mcc": _matthews(table),
        "log_loss": float(-(logs[np.arange(len(targets)), targets] * counts).sum() / counts.sum()),
        "calibration_error": _calibration(probabilities.max(-1), predicted == targets, counts),
    }
    of = [1] if labels == 2 else range(labels)
    return found | _ranked([(_odds(logs, one), targets == one) for one in of], counts)


def multi_label(logits: np.ndarray, targets: np.ndarray, counts: np.ndarray, thresholds: np.ndarray) -> Numbers:
    """Metrics where a record may have several labels, each decided by itself.

    Args:
        logits: Shape (records, labels).
        targets: 1 where a record has the label, else 0; the same shape.
        counts: What each record counts, shape (records,).
        thresholds: Probability from which on a label is given, shape (labels,).

    Returns:
        `accuracy` (records with every label right), `hamming_loss` (share of wrong decisions), `log_loss` (nats, mean
        over records and labels), `calibration_error` (of each label's probability, over all decisions); precision,
        recall and F1 `_micro` (over all decisions), `_macro` (over labels) and `_weighted`; `f1_samples` (over
        records); `roc_auc` and `average_precision` (over labels of both kinds).
    """
    if not counts.sum() > 0:
        return {}
    true = targets > 0
    probabilities = _sigmoid(logits)
    taken = probabilities >= thresholds
    each = counts[:, None]
    right, given, there = ((part * each).sum(0) for part in (taken & true, taken, true))
    total = counts.sum()
    found = {
        "accuracy": float(((taken == true).all(-1) * counts).sum() / total),
        "hamming_loss": float(((taken != true).mean(-1) * counts).sum() / total),
        "log_loss": float((_softplus(np.where(true, -logits, logits)).mean(-1) * counts).sum() / total),
        "calibration_error": _calibration(probabilities.ravel(), true.ravel(), np.repeat(counts, logits.shape[1])),
        **_averaged(right, given, there, np.ones(len(right), bool)),
        "precision_micro": float(_ratio(right.sum(), given.sum())),
        "recall_micro": float(_ratio(right.sum(), there.sum())),
        "f1_micro": float(_ratio(2 * right.sum(), given.sum() + there.sum())),
        "f1_samples": float((_ratio(2 * (taken & true).sum(-1), taken.sum(-1) + true.sum(-1)) * counts).sum() / total),
    }
    return found | _ranked([(logits[:, one], true[:, one]) for one in range(logits.shape[1])], counts)


def confusion(predicted: np.ndarray, targets: np.ndarray, counts: np.ndarray, labels: int) -> np.ndarray:
    """What records count by their label (row) and the one that they were given (column): float64, (labels, labels)."""
    cells = np.bincount(targets * labels + predicted, weights=counts, minlength=labels * labels)
    return cells.reshape(labels, labels)


def per_label(
    logits: np.ndarray, targets: np.ndarray, counts: np.ndarray, thresholds: np.ndarray | None = None
) -> list[Numbers]:
    """For each label `precision`, `recall`, `f1`, `support` (what its records count), `selection_rate` (share of all
    records that are given it) and `false_positive_rate` (of those without it), and where both kinds of records are
    there `roc_auc` and `average_precision`.

    Args:
        logits: Shape (records, labels).
        targets: As in `multi_label` if there are thresholds, else as in `single_label`.
        counts: What each record counts, shape (records,).
        thresholds: As in `multi_label`; None where each record has one label.
    """
    labels = range(logits.shape[1])
    if thresholds is None:
        logs = _log_softmax(logits)
        scores = [_odds(logs, one) for one in labels]
        true, taken = (np.equal.outer(which, np.array(labels)) for which in (targets, logits.argmax(-1)))
    else:
        scores = [logits[:, one] for one in labels]
        true, taken = targets > 0, _sigmoid(logits) >= thresholds
    found = []
    for one in labels:
        right, given, there = (float((part[:, one] * counts).sum()) for part in (taken & true, taken, true))
        numbers = {"precision": float(_ratio(right, given)), "recall": float(_ratio(right, there))}
        numbers |= {"f1": float(_ratio(2 * right, given + there)), "support": there}
        whole = float(counts.sum())
        numbers["selection_rate"] = float(_ratio(given, whole))
        numbers["false_positive_rate"] = float(_ratio(given - right, whole - there))
        found.append(numbers | _ranked([(scores[one], true[:, one])], counts))
    return found


def tuned_thresholds(logits: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each label the threshold with the best F1 on these records, as a probability; shape (labels,).

    It lies halfway between two neighbouring probabilities. Of equally good ones it is the one nearest to one half,
    which is also taken for a label that no record has.
    """
    probabilities = _sigmoid(logits)
    return np.array([_threshold(*pair, counts) for pair in zip(probabilities.T, (targets > 0).T, strict=True)])


def _threshold(probabilities: np.ndarray, true: np.ndarray, counts: np.ndarray) -> float:
    order = np.argsort(-probabilities, kind="stable")
    sorted_ones, there = probabilities[order], (true * counts).sum()
    if not there > 0:
        return 0.5
    right, given = np.cumsum((true * counts)[order]), np.cumsum(counts[order])
    ends = np.flatnonzero(np.append(sorted_ones[1:] != sorted_ones[:-1], True))  # records of one score go together
    scores = _ratio(2 * right[ends], given[ends] + there)
    below = np.append(sorted_ones, 0.0)[ends + 1]
    cuts = (sorted_ones[ends] + below) / 2
    best = cuts[scores >= scores.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def _averaged(right: np.ndarray, given: np.ndarray, true: np.ndarray, seen: np.ndarray) -> Numbers:
    """Precision, recall and F1 over labels: plain means over those `seen`, and means weighted by their records."""
    found = {}
    for name, values in (
        ("precision", _ratio(right, given)),
        ("recall", _ratio(right, true)),
        ("f1", _ratio(2 * right, given + true)),
    ):
        found[f"{name}_macro"] = float(values[seen].mean())
        found[f"{name}_weighted"] = float(_ratio((values * true).sum(), true.sum()))
    return found


def _ranked(pairs: list[tuple[np.ndarray, np.ndarray]], counts: np.ndarray) -> Numbers:
    """ROC-AUC and average precision, means over (scores, which records are meant) that have both kinds of records."""
    both = [
        (scores, true)
        for scores, true in pairs
        if (counts[true] > 0).any() and (counts[~true] > 0).any() and not np.isnan(scores).any()
    ]
    if not both:
        return {}
    areas, precisions = zip(*(_areas(scores, true, counts) for scores, true in both))
    return {"roc_auc": float(np.mean(areas)), "average_precision": float(np.mean(precisions))}


def _areas(scores: np.ndarray, true: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The area under the ROC curve by trapezoids, and the sum of precisions times the steps in recall."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))
    right = np.cumsum((true * counts)[order])[ends]
    wrong = np.cumsum((~true * counts)[order])[ends]
    before_right, before_wrong = (np.concatenate([[0.0], part[:-1]]) for part in (right, wrong))
    area = ((wrong - before_wrong) * (right + before_right)).sum() / 2 / (right[-1] * wrong[-1])
    precision = (_ratio(right, right + wrong) * (right - before_right)).sum() / right[-1]
    return float(area), float(precision)


def _matthews(table: np.ndarray) -> float:
    """Matthews correlation of several labels (Gorodkin 2004); 0 where one side is constant."""
    total, right = table.sum(), np.trace(table)
    given, true = table.sum(0), table.sum(1)
    spread = (total**2 - (given**2).sum()) * (total**2 - (true**2).sum())
    return float((right * total - (given * true).sum()) / np.sqrt(spread)) if spread > 0 else 0.0


def _calibration(probabilities: np.ndarray, right: np.ndarray, counts: np.ndarray) -> float:
    """Mean distance of what was promised and what came true, over equally wide bins of the probability."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    promised, true = (np.bincount(bins, weights=part * counts, minlength=BINS) for part in (probabilities, right))
    return float(np.abs(promised - true).sum() / counts.sum())


def _odds(logs: np.ndarray, one: int) -> np.ndarray:
    """Log-odds of a label against all others together: they still rank where a probability is 1 by rounding."""
    rest = np.delete(logs, one, axis=1)
    top = rest.max(-1, keepdims=True)
    odds = logs[:, one] - (top + np.log(np.exp(rest - top).sum(-1, keepdims=True)))[:, 0]
    return odds.round(9)  # what is equal but for the order of a sum is a tie


def _ratio(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(logits.astype(np.float64) / 2))


def _softplus(values: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, values.astype(np.float64))
