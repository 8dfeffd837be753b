"""BLEU of single texts is NLTK's, for each of its smoothing methods."""

import warnings

import pytest
from nltk.translate import bleu_score
from written import pairs

from dsft.metrics.scores import SCORES, Choices, chosen
from dsft.metrics.scores.language import tokens
from dsft.metrics.scores.sentence_bleu import sentence_bleu


def nltks(right, given, method):
    smoothing = getattr(bleu_score.SmoothingFunction(), f"method{method}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bleu_score.sentence_bleu(right, given, smoothing_function=smoothing)


@pytest.mark.parametrize("longest", [6, 18])
@pytest.mark.parametrize("method", range(8))
def test_it_is_nltks(method, longest):
    compared = 0
    for said, references, _ in pairs(700, longest=longest):
        given, right = said.split(), [one.split() for one in references]
        try:
            expected = nltks(right, given, method)
        except AssertionError:  # NLTK's sixth wants common triples; ours goes on by the same formula
            assert method == 6
            continue
        assert sentence_bleu(given, right, method) == pytest.approx(expected, rel=1e-12, abs=1e-60), (said, references)
        compared += 1
    assert compared >= 300 or (method, longest) == (6, 6)


@pytest.mark.parametrize("method", range(8))
def test_a_set_is_the_mean_over_its_records(method):
    """By the words of BLEU: 13a's, or single characters of Chinese."""
    name = f"sentence_bleu_{method}"
    records = [(said, right, own) for said, right, own in pairs(40) + pairs(40, chinese=True) if said]
    expected, counted = 0.0, []
    for said, right, own in records:
        kind = "zh" if own == "zh" else "13a"
        try:
            expected += nltks([tokens(one, kind) for one in right], tokens(said, kind), method)
            counted.append((said, right, own))
        except AssertionError:
            continue
    assert len(counted) > 10
    assert SCORES[name].of_set(counted)[name] == pytest.approx(expected / len(counted), rel=1e-12)
    assert SCORES[name].signature("zh") == f"smooth:{method}|tok:zh"


def test_the_tokenizer_can_be_chosen():
    score = chosen(["sentence_bleu_3"], Choices(tokenizer="char"))["sentence_bleu_3"]
    found = score.of_record("abcd x", ["abcde"])["sentence_bleu_3"]
    assert found == pytest.approx(nltks([list("abcde")], list("abcdx"), 3)) and "tok:char" in score.signature("en")
