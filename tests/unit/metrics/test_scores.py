"""Scores against their judges: sacrebleu and rouge-score called by hand, NLTK, and Chinese worked out by hand."""

from __future__ import annotations

import math
import random
import warnings
from fractions import Fraction

import numpy as np
import pytest
import sacrebleu
from nltk.translate import bleu_score
from rouge_score.rouge_scorer import RougeScorer

from dsft.metrics.scores import SCORES, Score, language, match
from dsft.metrics.scores.sentence_bleu import sentence_bleu

WORDS = "the cat sat on a mat in the big red house , and it was very happy today .".split()
HAN = "春天来了大地复苏万物生长我们去山上看花今天很高兴"


def pairs(count: int, chinese: bool = False, most: int = 3) -> list[tuple[str, list[str], str]]:
    """Predictions with one to `most` references that share much with them."""
    draw, made = random.Random(0), []
    alphabet, between = (HAN, "") if chinese else (WORDS, " ")
    for _ in range(count):
        own = [draw.choice(alphabet) for _ in range(draw.randint(0 if draw.random() < 0.05 else 1, 18))]
        references = []
        for _ in range(draw.randint(1, most)):
            other = [word if draw.random() < 0.7 else draw.choice(alphabet) for word in own] or [draw.choice(alphabet)]
            references.append(between.join(other[: draw.randint(1, len(other))] + other[: draw.randint(0, 2)]))
        made.append((between.join(own), references, "zh" if chinese else "en"))
    return made


@pytest.mark.parametrize("chinese", [False, True])
def test_those_of_sacrebleu_are_what_it_gives_for_the_whole_set(chinese):
    records = pairs(300, chinese)
    said = [record[0] for record in records]
    columns = [[record[1][n] if n < len(record[1]) else None for record in records] for n in range(3)]
    expected = {
        "bleu": sacrebleu.corpus_bleu(said, columns, tokenize="zh" if chinese else "13a"),
        "chrf": sacrebleu.corpus_chrf(said, columns),
        "chrf_words": sacrebleu.corpus_chrf(said, columns, word_order=2),
        "ter": sacrebleu.corpus_ter(said, columns, normalized=chinese, asian_support=chinese),
    }
    for name, right in expected.items():
        assert SCORES[name].of_set(records)[name] == pytest.approx(right.score, abs=1e-9), name
        assert 0 < right.score < 100
        assert f"version:{sacrebleu.__version__}" in SCORES[name].signature("zh" if chinese else "en")
    assert "tok:zh" in SCORES["bleu"].signature("zh") and "tok:13a" in SCORES["bleu"].signature("de")


@pytest.mark.parametrize("stemmed", [False, True])
def test_rouge_of_english_is_the_librarys_own(stemmed):
    records = pairs(300)
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    judge = RougeScorer(kinds, use_stemmer=stemmed)
    found = SCORES["rouge_stemmed" if stemmed else "rouge"].of_set(records)
    each = [judge.score_multi(references, said) for said, references, _ in records]
    for kind in kinds:
        for place, part in enumerate(("_precision", "_recall", "")):
            right = np.mean([one[kind][place] for one in each])
            assert found[f"{'stemmed_' if stemmed else ''}{kind}{part}"] == pytest.approx(right, abs=1e-12)


def test_rouge_of_chinese_by_hand():
    """The library's own tokenizer gives 0 for the same text twice."""
    own = RougeScorer(["rouge1"]).score("春天来了", "春天来了")["rouge1"].fmeasure
    assert own == 0 and SCORES["rouge"].of_record("春天来了", ["春天来了"], "zh")["rouge1"] == 1
    # 春天来了 and 春天到来: three characters in common of four; one pair, 春天, of three; 春天来 in order
    found = SCORES["rouge"].of_record("春天来了。", ["春天到来"], "zh")
    assert [found["rouge1"], found["rouge2"], found["rougeL"]] == pytest.approx([3 / 4, 1 / 3, 3 / 4])
    # GPT４ is the word gpt4 between characters
    found = SCORES["rouge"].of_record("我用GPT４写", ["用gpt4写作"], "zh")
    assert (found["rouge1_precision"], found["rouge1_recall"]) == (3 / 4, 3 / 4)  # 用, gpt4, 写 of four


@pytest.mark.parametrize("method", range(8))
def test_sentence_bleu_is_nltks(method):
    smoothing, compared = bleu_score.SmoothingFunction(), 0
    for said, references, _ in pairs(330):
        given, right = said.split(), [one.split() for one in references]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = bleu_score.sentence_bleu(
                    right, given, smoothing_function=getattr(smoothing, f"method{method}")
                )
            except AssertionError:  # NLTK's sixth wants common trigrams
                continue
        assert sentence_bleu(given, right, method) == pytest.approx(expected, rel=1e-9, abs=1e-60), (said, references)
        compared += 1
    assert compared >= (100 if method == 6 else 300)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", 7), ("#### 1,234", 1234), (r"so \boxed{42} and 7", 42), ("-5", -5), ("5−3 is −2", -2),
        ("3/4", Fraction(3, 4)), ("50%", Fraction(1, 2)), ("１２．５", Fraction(25, 2)), ("答案是12个。", 12),
        (".5", Fraction(1, 2)), ("1,2", 2), ("none", None), ("", None), ("1/0", None), ("7.", 7),
        ("1,000,000.25", 1_000_000.25),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert match.last_number(text) == number


def test_numbers_and_answers_match_any_reference():
    assert SCORES["number"].of_set([("it is 7.0", ["six", "7"], "en"), ("eight", ["8"], "en")]) == {"number": 0.5}
    assert SCORES["answer"].of_record("The Moon!", ["sun", "moon"], "en") == {"exact": 1, "token_f1": 1}
    assert SCORES["answer"].of_record("月亮上", ["月亮"], "zh") == {"exact": 0, "token_f1": pytest.approx(0.8)}


def test_diversity_by_hand():
    found = SCORES["diversity"].of_set([("a b a b a b a b", ["a b c d"], "en"), ("", ["x y"], "en")])
    # 2 of 8 words, 2 of 7 pairs and 2 of 5 runs of four are different ones; 8 words beside 6
    assert found == {
        "length_ratio": pytest.approx(8 / 6), "distinct_1": 2 / 8, "distinct_2": 2 / 7, "repetition": 1 - 2 / 5,
    }  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("said", ["", "。", "🙂", "a", "word " * 3000])
@pytest.mark.parametrize("own", ["en", "zh", "ja", "other"])
def test_nothing_breaks_on_what_models_write(name, said, own):
    if len(said) > 1000 and name in ("ter", "rouge", "rouge_stemmed"):
        said = said[:2000]
    score = SCORES[name]
    numbers = score.of_record(said, ["", "a 字"], own)
    assert set(numbers) <= set(score.metrics) and all(math.isfinite(value) for value in numbers.values())
    assert len(score.statistics(said, ["x"], own)) == len(score.statistics("x y z", ["a", "b"], own))
    assert score.signature(own)


def test_languages():
    assert language.told("auto", ["今天 good"]) == "other" or language.told("auto", ["今天天气不错 good"]) == "zh"
    assert [language.told("auto", [text]) for text in ("今天天气 ok", "fine", "schön", "12", "")] == [
        "zh",
        "en",
        "other",
        "en",
        "en",
    ]
    assert language.told("ja", ["今天天气"]) == "ja"
    assert language.words("ＡＢ12 你好,World", "zh") == ["ab12", "你", "好", "world"]
    assert language.words("きょう x", "ja") == ["き", "ょ", "う", "x"]


def test_a_score_is_one_value(monkeypatch):
    """What CONTRIBUTING shows: statistics of a record, and what is formed of their sums."""
    shouting = Score(
        metrics={},
        statistics=lambda prediction, references, own: np.array([prediction.isupper(), 1.0]),
        form=lambda sums: {"shouting": sums[0] / sums[1]},
        signature=lambda own: "capitals",
    )
    assert shouting.of_set([("YES", [], "en"), ("no", [], "en")]) == {"shouting": 0.5}
    assert shouting.of_set([]) == {}
