"""Metrics of regression, formed from the predictions for all records; scipy and scikit-learn are their judges."""

from __future__ import annotations

import numpy as np


def regression(predictions: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Metrics of one number for each record, or of several, of which each gives the mean.

    Args:
        predictions: Shape (records, numbers), in the targets' own unit.
        targets: The same shape.
        counts: What each record counts, shape (records,).

    Returns:
        `mse`, `rmse` (its root, of all numbers together), `mae`, `r2` (1 - error / variance), `pearson` and `spearman`
        (ties get the mean of their ranks; ranks are weighted). Left out where a number is the same for all records.
    """
    if not counts.sum() > 0:
        return {}
    predictions, targets = predictions.astype(np.float64), targets.astype(np.float64)
    mse = _mean((predictions - targets) ** 2, counts)
    found = {"mse": float(mse.mean()), "rmse": float(np.sqrt(mse.mean()))}
    found["mae"] = float(_mean(np.abs(predictions - targets), counts).mean())
    variance = _mean((targets - _mean(targets, counts)) ** 2, counts)
    if (variance > 0).all():
        found["r2"] = float((1 - mse / variance).mean())
    kept = counts > 0
    ranks = [_ranks(part[kept], counts[kept]) for part in (predictions, targets)]
    correlations = {
        "pearson": _correlation(predictions, targets, counts),
        "spearman": _correlation(ranks[0], ranks[1], counts[kept]),
    }
    return found | {name: value for name, value in correlations.items() if value is not None}


def _mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return (values * counts[:, None]).sum(0) / counts.sum()


def _correlation(left: np.ndarray, right: np.ndarray, counts: np.ndarray) -> float | None:
    left, right = left - _mean(left, counts), right - _mean(right, counts)
    spread = _mean(left**2, counts) * _mean(right**2, counts)
    if not (spread > 0).all():
        return None
    return float((_mean(left * right, counts) / np.sqrt(spread)).mean())


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks of each column, those of equal values the mean of theirs; a record that counts twice takes two ranks."""
    ranked = np.empty_like(values)
    for column in range(values.shape[1]):
        _, group = np.unique(values[:, column], return_inverse=True)
        sizes = np.bincount(group, weights=counts)
        ranked[:, column] = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
    return ranked
