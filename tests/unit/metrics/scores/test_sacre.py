"""BLEU, chrF and TER are what sacrebleu's functions for a corpus give for the whole set, signature included."""

import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.tokenizers.tokenizer_ter import TercomTokenizer
from written import pairs

from dsft.metrics.scores import SCORES, Choices, chosen
from dsft.metrics.scores.language import tokens

JUDGES = {
    "bleu": lambda chinese: BLEU(tokenize="zh" if chinese else "13a"),
    "chrf": lambda chinese: CHRF(),
    "chrf_words": lambda chinese: CHRF(word_order=2),
    "ter": lambda chinese: TER(normalized=chinese, asian_support=chinese),
}
MOST = 3


def columns(records, most=MOST):
    """References as sacrebleu wants them: the first of each record, the second of each ..."""
    return [[record[1][n] if n < len(record[1]) else None for record in records] for n in range(most)]


@pytest.mark.parametrize("most", [1, MOST])
@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("name", JUDGES)
def test_a_set_is_sacrebleus_corpus(name, chinese, most):
    records = pairs(400, chinese, most)
    judge = JUDGES[name](chinese)
    right = judge.corpus_score([record[0] for record in records], columns(records, most))
    assert 0 < right.score < 100
    # of TER means of references' lengths are summed, in another order
    assert SCORES[name].of_set(records)[name] == pytest.approx(right.score, rel=1e-12 if name == "ter" else 0, abs=0)
    expected = str(judge.get_signature()).replace("nrefs:1|", "nrefs:var|")
    assert SCORES[name].signature("zh" if chinese else "en") == expected


@pytest.mark.parametrize("tokenizer", ["13a", "zh", "char"])
def test_bleu_by_a_chosen_tokenizer(tokenizer):
    records = pairs(200) + pairs(200, chinese=True)
    judge = BLEU(tokenize=tokenizer)
    right = judge.corpus_score([record[0] for record in records], columns(records))
    score = chosen(["bleu"], Choices(tokenizer=tokenizer))["bleu"]
    assert score.of_set(records)["bleu"] == right.score
    assert f"|tok:{tokenizer}|" in score.signature("zh")


def test_bleu_by_words_of_rjieba():
    records = pairs(200, chinese=True, most=1)
    parted = [[" ".join(tokens(text, "words")) for text in (record[0], *record[1])] for record in records]
    right = BLEU(tokenize="none", force=True).corpus_score([p[0] for p in parted], [[p[1] for p in parted]])
    score = chosen(["bleu"], Choices(tokenizer="words"))["bleu"]
    assert score.of_set(records)["bleu"] == right.score and "tok:rjieba" in score.signature("zh")


def test_bleu_of_chinese_by_hand():
    """春天来了。 beside 春天来到。: four tokens of five, two pairs of four, one triple of three; for no four of
    two half of one is taken (sacrebleu's `exp`)."""
    found = SCORES["bleu"].of_record("春天来了。", ["春天来到。"])["bleu"]
    assert found == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25)


def test_a_set_in_two_languages_adds_what_each_is_counted_by():
    english, chinese = pairs(50), pairs(50, chinese=True)
    found = [SCORES["bleu"].of_set(records)["bleu"] for records in (english, chinese, english + chinese)]
    assert min(found[:2]) < found[2] < max(found[:2])
    assert "tok:13a" in SCORES["bleu"].signature("de") and "tok:char" in SCORES["bleu"].signature("ja")


def test_nothing_written_and_nothing_to_write():
    for name, best in (("bleu", 0), ("chrf", 0), ("ter", 0)):
        assert SCORES[name].of_record("", [""], "en") == {name: best}
    assert SCORES["ter"].of_record("", ["a b"], "en") == {"ter": 100}
    assert SCORES["bleu"].of_record("", ["a b"], "en") == {"bleu": 0}


def test_sacrebleu_keeps_no_texts():
    before = TercomTokenizer.__call__.cache_info()
    SCORES["ter"].statistics("a text", ["once"], "en")
    assert TercomTokenizer.__call__.cache_info() == before
