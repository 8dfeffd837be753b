"""Entities are those that seqeval finds."""

import random

import pytest
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities

from dsft.metrics.entities import Found, entities, is_scheme, repaired

BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
BIOES = [*BIO, "E-PER", "S-PER", "E-LOC", "S-LOC"]


def seqevals(tags):
    return [(kind, begin, end + 1) for kind, begin, end in get_entities(tags)]


@pytest.mark.parametrize("tags", [BIO, BIOES])
def test_any_sequence_is_read_as_seqeval_reads_it(tags):
    chance = random.Random(0)
    for _ in range(3000):
        sentence = chance.choices(tags, k=chance.randint(1, 9))
        assert entities(sentence) == seqevals(sentence), sentence


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-PER", "I-PER", "O"], [("PER", 0, 2)]),
        (["I-PER", "I-PER"], [("PER", 0, 2)]),
        (["B-PER", "B-PER"], [("PER", 0, 1), ("PER", 1, 2)]),
        (["B-PER", "I-LOC"], [("PER", 0, 1), ("LOC", 1, 2)]),
        (["O", "O"], []),
        (["S-PER", "S-PER"], [("PER", 0, 1), ("PER", 1, 2)]),
        (["B-PER", "I-PER", "E-PER", "I-PER"], [("PER", 0, 3), ("PER", 3, 4)]),
        (["B-LOC", "L-LOC", "U-PER"], [("LOC", 0, 2), ("PER", 2, 3)]),
        (["B-地名", "M-地名", "E-地名"], [("地名", 0, 3)]),
        (["E-PER"], [("PER", 0, 1)]),
        (["B-date-time", "I-date-time"], [("date-time", 0, 2)]),
        (["B", "I", "O", "B"], [("_", 0, 2), ("_", 3, 4)]),
    ],
)
def test_worked_out_by_hand(tags, expected):
    assert entities(tags) == expected


@pytest.mark.parametrize("tags", [BIO, BIOES])
def test_a_repaired_sequence_holds_the_same_entities_and_stays(tags):
    chance = random.Random(1)
    for _ in range(1000):
        sentence = chance.choices(tags, k=chance.randint(1, 8))
        mended = repaired(sentence)
        assert entities(mended) == entities(sentence)
        assert repaired(mended) == mended


def test_precision_recall_and_f1_are_seqevals():
    chance = random.Random(2)
    true = [chance.choices(BIO, k=8) for _ in range(60)]
    predicted = [[tag if chance.random() < 0.7 else chance.choice(BIO) for tag in row] for row in true]
    found = Found()
    for ours, theirs in zip(predicted, true):
        found.add(ours, theirs)
    report = classification_report(true, predicted, output_dict=True, zero_division=0)
    numbers = found.numbers()
    assert [numbers[name] for name in ("precision", "recall", "f1")] == pytest.approx(
        [report["micro avg"][name] for name in ("precision", "recall", "f1-score")]
    )
    assert numbers["f1_macro"] == pytest.approx(report["macro avg"]["f1-score"])
    for kind, row in found.by_type().items():
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(
            [report[kind][name] for name in ("precision", "recall", "f1-score", "support")]
        )


def test_a_sentence_that_counts_twice_is_two():
    twice, both = Found(), Found()
    twice.add(["B-A", "O"], ["B-A", "B-A"], 2.0)
    for _ in range(2):
        both.add(["B-A", "O"], ["B-A", "B-A"])
    assert twice.by_type() == both.by_type() and Found().numbers() == {}


def test_plain_labels_are_no_scheme():
    assert is_scheme(["O", "B-PER", "I-PER"]) and is_scheme(["S", "B", "E", "O"])
    assert not is_scheme(["NOUN", "VERB"]) and not is_scheme(["O"]) and not is_scheme(["B-PER", "noun"])
