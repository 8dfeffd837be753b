"""Lengths and repetition, by hand; the length ratio of BLEU's words is sacrebleu's."""

import pytest
from sacrebleu.metrics import BLEU
from written import pairs

from dsft.metrics.scores import SCORES, Choices, chosen


def test_by_hand():
    records = [("a b a b a b a b", ["a b c d"], "en"), ("", ["x y"], "en"), ("A, b!", ["x"], "en")]
    # 2 + 2 of 8 + 2 words, 2 + 1 of 7 + 1 pairs and 2 of 5 runs of four are different ones
    assert SCORES["diversity"].of_set(records) == pytest.approx(
        {"distinct_1": 4 / 10, "distinct_2": 3 / 8, "repetition": 1 - 2 / 5}
    )
    assert SCORES["length"].of_set(records) == {"length_ratio": 10 / 7}


def test_chinese_by_hand():
    found = SCORES["diversity"].of_record("看花看花看花。", [])
    assert found == pytest.approx({"distinct_1": 2 / 6, "distinct_2": 2 / 5, "repetition": 1 - 2 / 3})
    assert SCORES["length"].of_record("看花。", ["看花去", "我们去看花"], "zh") == {"length_ratio": 2 / 3}


@pytest.mark.parametrize("chinese", [False, True])
def test_the_length_ratio_is_sacrebleus(chinese):
    records, name = pairs(300, chinese), "zh" if chinese else "13a"
    columns = [[record[1][n] if n < len(record[1]) else None for record in records] for n in range(3)]
    right = BLEU(tokenize=name).corpus_score([record[0] for record in records], columns)
    score = chosen(["length"], Choices(tokenizer=name))["length"]
    assert score.of_set(records)["length_ratio"] == pytest.approx(right.ratio, rel=1e-12)


def test_nothing_is_no_number():
    assert SCORES["diversity"].of_record("", []) == {} == SCORES["length"].of_record("a", [""])
