"""ROUGE is that of the library rouge-score where this can read a text; Chinese is worked out by hand."""

import random
import time

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer, lcs_ind
from written import pairs

from dsft.metrics.scores import SCORES, Choices, chosen
from dsft.metrics.scores.language import tokens, words
from dsft.metrics.scores.rouge import KINDS, subsequence

PARTS = ("_precision", "_recall", "")


def judged(records, **options):
    judge = RougeScorer(list(KINDS), **options)
    return [judge.score_multi(references, said) for said, references, _ in records]


def holds(name, records, right):
    score = SCORES[name]
    for (said, references, own), expected in zip(records, right):
        found = score.of_record(said, references, own)
        for kind in KINDS:
            for place, part in enumerate(PARTS):
                number = f"{name.removeprefix('rouge').lstrip('_')}{'_' if name != 'rouge' else ''}{kind}{part}"
                assert found[number] == expected[kind][place], (said, references, number)
                assert score.metrics[number].label


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", ["rouge", "rouge_stemmed"])
def test_each_record_in_english_is_the_librarys_own(name, lines):
    records = pairs(300, lines=lines)
    right = judged(records, use_stemmer=name == "rouge_stemmed")
    holds(name, records, right)
    whole = SCORES["rouge"].of_set(records)
    if name == "rouge":
        for kind in KINDS:
            assert whole[kind] == pytest.approx(np.mean([one[kind].fmeasure for one in right]), abs=1e-12)


class Words:
    def tokenize(self, text):
        return words(text, "zh")


@pytest.mark.parametrize("lines", [False, True])
def test_each_record_in_chinese_is_the_librarys_with_our_words(lines):
    records = pairs(300, chinese=True, lines=lines)
    holds("rouge", records, judged(records, tokenizer=Words()))


def test_of_several_common_subsequences_the_librarys_is_found():
    draw = random.Random(1)
    for _ in range(500):
        left, right = ([draw.choice("abcd") for _ in range(draw.randint(0, 40))] for _ in range(2))
        assert subsequence(left, right) == lcs_ind(left, right)


def test_stemming_changes_english_alone():
    said, right = "running dogs", ["run dog"]
    assert SCORES["rouge"].of_record(said, right)["rouge1"] == 0
    assert SCORES["rouge_stemmed"].of_record("wa", ["was"])["stemmed_rouge1"] == 0  # three letters are left alone
    assert SCORES["rouge_stemmed"].of_record(said, right)["stemmed_rouge1"] == 1
    assert SCORES["rouge_stemmed"].of_record(said, right, "de")["stemmed_rouge1"] == 0
    assert "stem:PorterStemmer" in SCORES["rouge_stemmed"].signature("en")
    assert "stem:no" in SCORES["rouge_stemmed"].signature("zh")


@pytest.mark.parametrize(
    ("said", "right", "one", "two", "longest"),
    [
        # three characters in common of four; the pair 春天 of three; 春天来 in order
        ("春天来了。", "春天到来", (3 / 4, 3 / 4), (1 / 3, 1 / 3), (3 / 4, 3 / 4)),
        # 用, gpt4 and 写 of 我 用 gpt4 写, of 用 gpt4 写 作
        ("我用GPT４写", "用gpt4写作", (3 / 4, 3 / 4), (2 / 3, 2 / 3), (3 / 4, 3 / 4)),
        # the same characters the other way round
        ("月亮", "亮月", (1, 1), (0, 0), (1 / 2, 1 / 2)),
        ("花", "花", (1, 1), (0, 0), (1, 1)),
        ("花花花", "花", (1 / 3, 1), (0, 0), (1 / 3, 1)),
        ("，。", "花", (0, 0), (0, 0), (0, 0)),
        ("花", "", (0, 0), (0, 0), (0, 0)),
    ],
)
def test_chinese_by_hand(said, right, one, two, longest):
    found = SCORES["rouge"].of_record(said, [right], "zh")
    for kind, expected in (("rouge1", one), ("rouge2", two), ("rougeL", longest)):
        assert (found[f"{kind}_precision"], found[f"{kind}_recall"]) == pytest.approx(expected)


def test_chinese_words_of_rjieba_by_hand():
    """我 来到 北京 清华大学 beside 我 在 清华大学: two of four words, and two of three."""
    score = chosen(["rouge"], Choices(tokenizer="words"))["rouge"]
    assert tokens("我在清华大学", "words") == ["我", "在", "清华大学"]
    found = score.of_record("我来到北京清华大学。", ["我在清华大学。"])
    assert (found["rouge1_precision"], found["rouge1_recall"]) == (2 / 4, 2 / 3)
    assert score.signature("zh") == "tok:words|stem:no"


def test_the_librarys_own_tokenizer_gives_nothing_for_chinese():
    """Why there is one of ours."""
    assert RougeScorer(["rouge1"]).score("春天来了", "春天来了")["rouge1"].fmeasure == 0
    assert SCORES["rouge"].of_record("春天来了", ["春天来了"])["rouge1"] == 1


def test_sentences_of_a_summary_are_lines():
    """Each line of the reference is found in another line: 5 of 5, where one text has 3 in order."""
    found = SCORES["rouge"].of_record("他来了\n花开", ["花开\n他来了"], "zh")
    assert (found["rougeLsum"], found["rougeL"]) == (1, 3 / 5)


def test_the_best_reference_counts_for_each_kind():
    # of 一二三四: three characters but no pair, or one pair alone
    found = SCORES["rouge"].of_record("一二三四", ["三一四七", "一二七八"], "zh")
    assert (found["rouge1"], found["rouge2"]) == pytest.approx((3 / 4, 1 / 3))


def test_long_texts_take_no_minutes():
    draw = random.Random(0)
    said, right = (" ".join(draw.choice("abcdefghijkl") for _ in range(10_000)) for _ in range(2))
    begun = time.perf_counter()
    SCORES["rouge"].of_record(said, [right])
    assert time.perf_counter() - begun < 20  # rouge-score's table of 100 million cells takes a minute and gigabytes
