"""Metrics of classification are scikit-learn's."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as judge

from dsft.metrics import classification as ours


def drawn(records: int, labels: int, seed: int, weighted: bool, coarse: bool = False):
    """Logits that know something of the targets; `coarse` ones are often equal."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(records, labels))
    targets = (logits + random.normal(size=logits.shape)).argmax(-1)
    counts = random.choice([0.0, 0.3, 1.0, 2.5], records) if weighted else np.ones(records)
    counts[0] = 1.0
    return (logits.round(0) if coarse else logits), targets, counts


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("labels", [2, 3, 100])
@pytest.mark.parametrize("coarse", [False, True])
def test_one_label_each(labels, weighted, coarse):
    logits, targets, counts = drawn(400, labels, labels, weighted, coarse)
    found = ours.single_label(logits, targets, counts)
    predicted, given = logits.argmax(-1), {"sample_weight": counts}
    seen = counts > 0
    expected = {
        "accuracy": judge.accuracy_score(targets, predicted, **given),
        "f1_micro": judge.f1_score(targets, predicted, average="micro", **given),
        "mcc": judge.matthews_corrcoef(targets, predicted, **given),
        "log_loss": judge.log_loss(targets, softmax(logits), labels=range(labels), **given),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected["balanced_accuracy"] = judge.balanced_accuracy_score(targets[seen], predicted[seen],
                                                                      sample_weight=counts[seen])  # fmt: skip
        for average in ("macro", "weighted"):
            three = judge.precision_recall_fscore_support(
                targets[seen], predicted[seen], average=average, zero_division=0, sample_weight=counts[seen]
            )
            expected |= dict(zip([f"{name}_{average}" for name in ("precision", "recall", "f1")], three))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize("coarse", [False, True])
def test_areas(labels, weighted, coarse):
    logits, targets, counts = drawn(300, labels, 7, weighted, coarse)
    found, scores = ours.single_label(logits, targets, counts), softmax(logits)
    meant = [1] if labels == 2 else range(labels)
    for name, score in (("roc_auc", judge.roc_auc_score), ("average_precision", judge.average_precision_score)):
        each = [score(targets == one, scores[:, one].round(12), sample_weight=counts) for one in meant]
        assert found[name] == pytest.approx(np.mean(each), abs=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_several_labels_at_once(weighted):
    random = np.random.default_rng(3)
    logits = random.normal(size=(300, 5)).round(1)
    targets = (logits + random.normal(size=logits.shape) > 0.7).astype(int)
    targets[:, 4] = 0  # nobody has it
    counts = random.choice([0.5, 1.0, 2.0], 300) if weighted else np.ones(300)
    halves = np.array([0.5, 0.3, 0.5, 0.8, 0.5])
    found, given = ours.multi_label(logits, targets, counts, halves), {"sample_weight": counts}
    predicted = (1 / (1 + np.exp(-logits)) >= halves).astype(int)
    expected = {
        "accuracy": judge.accuracy_score(targets, predicted, **given),
        "hamming_loss": judge.hamming_loss(targets, predicted, **given),
        "f1_samples": judge.f1_score(targets, predicted, average="samples", zero_division=0, **given),
    }
    for average in ("micro", "macro", "weighted"):
        for name, score in (
            ("precision", judge.precision_score), ("recall", judge.recall_score), ("f1", judge.f1_score)
        ):  # fmt: skip
            value = score(targets, predicted, average=average, zero_division=0, **given)
            expected[f"{name}_{average}"] = value
    scores = 1 / (1 + np.exp(-logits))
    for name, score in (("roc_auc", judge.roc_auc_score), ("average_precision", judge.average_precision_score)):
        expected[name] = np.mean([score(targets[:, one], scores[:, one], **given) for one in range(4)])
    expected["log_loss"] = np.mean(
        [judge.log_loss(targets[:, one], scores[:, one], labels=[0, 1], **given) for one in range(5)]
    )
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-10), name


def test_calibration_worked_out_by_hand():
    # two records promised 0.9, one of them right; one promised 0.6, right: (|1.8 - 1| + |0.6 - 1|) / 3
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    found = ours.single_label(logits, np.array([0, 1, 0]), np.ones(3))
    assert found["calibration_error"] == pytest.approx((0.8 + 0.4) / 3)


def test_what_cannot_be_formed_is_left_out():
    found = ours.single_label(np.array([[2.0, 1.0], [3.0, 0.0]]), np.array([0, 0]), np.ones(2))
    assert found["accuracy"] == 1 and found["f1_macro"] == 1 and "roc_auc" not in found
    assert ours.single_label(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0)) == {}
    assert ours.multi_label(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2), np.full(3, 0.5)) == {}


def test_logits_beyond_what_a_probability_can_tell_still_rank():
    logits = np.array([[0.0, 50.0], [0.0, 60.0], [0.0, 40.0]])
    assert ours.single_label(logits, np.array([0, 1, 0]), np.ones(3))["roc_auc"] == 1


def test_each_label_and_the_table():
    logits, targets, counts = drawn(200, 3, 5, True)
    predicted = logits.argmax(-1)
    table = judge.confusion_matrix(targets, predicted, sample_weight=counts, labels=range(3))
    assert np.allclose(ours.confusion(predicted, targets, counts, 3), table)
    three = judge.precision_recall_fscore_support(targets, predicted, labels=range(3), sample_weight=counts)
    for number, found in enumerate(ours.per_label(logits, targets, counts)):
        assert [found[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx(
            [values[number] for values in three]
        )
        area = judge.roc_auc_score(targets == number, softmax(logits)[:, number], sample_weight=counts)
        assert found["roc_auc"] == pytest.approx(area)


def test_a_tuned_threshold_has_the_best_f1_of_all():
    random = np.random.default_rng(11)
    logits = random.normal(size=(60, 4)).round(1)
    targets = (logits + random.normal(size=logits.shape) > 1).astype(int)
    targets[:, 3] = 0
    counts = random.choice([0.5, 1.0], 60)
    found = ours.tuned_thresholds(logits, targets, counts)
    scores = 1 / (1 + np.exp(-logits))
    assert found[3] == 0.5
    for one in range(3):
        every = [
            judge.f1_score(targets[:, one], scores[:, one] >= cut, sample_weight=counts)
            for cut in np.linspace(0.001, 0.999, 999)
        ]
        mine = judge.f1_score(targets[:, one], scores[:, one] >= found[one], sample_weight=counts)
        assert mine == pytest.approx(max(every), abs=1e-12)


def test_the_order_of_records_does_not_matter():
    logits, targets, counts = drawn(100, 3, 9, True, coarse=True)
    order = np.random.default_rng(0).permutation(100)
    assert ours.single_label(logits, targets, counts) == pytest.approx(
        ours.single_label(logits[order], targets[order], counts[order]), abs=1e-12
    )
