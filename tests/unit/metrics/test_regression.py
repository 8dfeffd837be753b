"""Metrics of regression are scipy's and scikit-learn's."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as judge

from dsft.metrics.regression import regression


@pytest.mark.parametrize("numbers", [1, 3])
@pytest.mark.parametrize("coarse", [False, True])
def test_plain(numbers, coarse):
    random = np.random.default_rng(numbers)
    targets = random.normal(size=(200, numbers)) * 3 + 1
    predictions = targets + random.normal(size=targets.shape)
    if coarse:
        targets, predictions = targets.round(0), predictions.round(0)
    found = regression(predictions, targets, np.ones(200))
    columns = range(numbers)
    expected = {
        "mse": judge.mean_squared_error(targets, predictions),
        "rmse": judge.mean_squared_error(targets, predictions) ** 0.5,
        "mae": judge.mean_absolute_error(targets, predictions),
        "r2": judge.r2_score(targets, predictions),
        "pearson": np.mean([stats.pearsonr(targets[:, n], predictions[:, n])[0] for n in columns]),
        "spearman": np.mean([stats.spearmanr(targets[:, n], predictions[:, n])[0] for n in columns]),
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_whole_weight_is_as_many_records():
    random = np.random.default_rng(5)
    targets, predictions = random.normal(size=(2, 50, 2)).round(1)
    counts = random.integers(0, 4, 50).astype(float)
    repeated = [np.repeat(part, counts.astype(int), axis=0) for part in (predictions, targets)]
    assert regression(predictions, targets, counts) == pytest.approx(
        regression(*repeated, np.ones(int(counts.sum()))), abs=1e-12
    )


def test_what_cannot_be_formed_is_left_out():
    found = regression(np.array([[1.0], [2.0]]), np.array([[3.0], [3.0]]), np.ones(2))
    assert found.keys() == {"mse", "rmse", "mae"} and found["mae"] == 1.5
    assert regression(np.zeros((0, 1)), np.zeros((0, 1)), np.zeros(0)) == {}
