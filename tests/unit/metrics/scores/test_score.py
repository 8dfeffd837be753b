"""What holds for every score: sums make it, nothing breaks it, and what it does not know is refused by name."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import toy_score
from written import pairs

from dsft.errors import UserError
from dsft.metrics import scores
from dsft.metrics.scores import MAKERS, SCORES, Choices, chosen, intervals, total

ROOT = Path(__file__).parents[4]
DATA = {"number": "the answer is 1,234", "json": '{"a": [1, 2.5]}', "calls": '{"name": "f", "arguments": {"x": 1}}'}
"""A reference that a score can read, where not any text will do."""
WITHOUT_MODEL = [name for name in SCORES if name != "bertscore"]


def rows_of(name: str, records: list) -> np.ndarray:
    made = []
    for n, (said, references, own) in enumerate(records):
        data = DATA.get(name)
        right = [data] if data else references
        made.append(SCORES[name].statistics(data if data and n % 3 else said, right, own))
    return np.stack(made)


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_a_set_is_its_sums_whatever_the_order(name):
    """So ranks and batches have no say, to the last bit; and a set of one record is that record."""
    records = pairs(60) + pairs(20, chinese=True)
    rows, score = rows_of(name, records), SCORES[name]
    whole = score.form(total(rows))
    assert whole and set(whole) <= set(score.metrics)
    random.Random(0).shuffle(shuffled := list(range(len(rows))))
    assert score.form(total(rows[shuffled])) == whole
    one = score.form(total(rows[:1]))
    assert one == score.form(rows[0])
    group = score.form(total(rows[60:]))
    assert all(math.isfinite(value) for value in group.values())


@pytest.mark.parametrize("name", WITHOUT_MODEL)
@pytest.mark.parametrize(
    "said",
    ["", "。", "!?", "🙂", "👩‍👩‍👧", "a", "字", " \n\t ", "word " * 3000, "1" * 5000, "{" * 3000, "\ud800", "[" * 200],
)
@pytest.mark.parametrize("own", ["en", "zh", "ja", "other", "auto"])
def test_nothing_breaks_on_what_models_write(name, said, own):
    if name == "ter":
        said = said[:300]  # its shifts take minutes
    score = SCORES[name]
    references = [DATA[name]] if name in DATA else ["", "a 字"]
    numbers = score.of_record(said, references, own)
    assert set(numbers) <= set(score.metrics) and all(math.isfinite(value) for value in numbers.values())
    if name not in DATA:
        assert math.isfinite(sum(score.of_record(said, [""], own).values()))
    right = DATA.get(name, "b c")
    assert len(score.statistics(said, [right], own)) == len(score.statistics("x y z", [right, right], own))
    assert score.signature("en" if own == "auto" else own)


@pytest.mark.parametrize("name", SCORES)
def test_without_references_it_is_refused_by_name(name):
    if name == "diversity":
        assert SCORES[name].of_record("a b a b", []) == {"distinct_1": 2 / 4, "distinct_2": 2 / 3, "repetition": 0}
        return
    with pytest.raises(ValueError, match=f"{next(iter(SCORES[name].metrics))}.*this has none"):
        SCORES[name].statistics("x", [])


def test_no_language_is_refused():
    with pytest.raises(ValueError, match="'English' is auto, other, or a code"):
        SCORES["bleu"].statistics("x", ["x"], "English")


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_every_number_is_declared(name):
    for number, metric in SCORES[name].metrics.items():
        assert metric.of == (number,) and metric.unit and metric.shown(0.5)


def test_numbers_of_two_scores_have_names_of_their_own():
    names = [number for score in SCORES.values() for number in score.metrics]
    assert len(set(names)) == len(names)


def test_intervals_are_those_of_a_plain_bootstrap():
    """Against one that draws records one by one and forms the number of each set; with another generator, so nearly."""
    score = SCORES["bleu"]
    rows = rows_of("bleu", pairs(200))
    low, high = intervals(score, rows, resamples=2000)["bleu"]
    draw = np.random.default_rng(5)
    plain = [score.form(total(rows[draw.integers(0, len(rows), len(rows))]))["bleu"] for _ in range(2000)]
    assert (low, high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.7)
    assert low < score.form(total(rows))["bleu"] < high
    assert intervals(score, rows, resamples=50) == intervals(score, rows, resamples=50)
    assert intervals(score, rows[:1]) == {}


def test_what_is_chosen_is_read_or_refused():
    with pytest.raises(UserError, match="there is no 'blue'. Did you mean bleu"):
        chosen(["blue"])
    with pytest.raises(UserError, match="tokenizer is read by bleu.*none of them is asked for"):
        chosen(["chrf", "json"], Choices(tokenizer="char"))
    with pytest.raises(UserError, match="encoder is read by bertscore"):
        chosen(["bleu"], Choices(encoder="model"))
    with pytest.raises(UserError, match="normalize is read by"):
        chosen(["number"], Choices(normalize=("width",)))
    with pytest.raises(UserError, match="tokenizer: there is no 'spm'; there are auto, 13a, zh, char, words"):
        chosen(["bleu"], Choices(tokenizer="spm"))
    with pytest.raises(UserError, match="normalize: there is no 'nfc'; there are width, simplified, case"):
        chosen(["bleu"], Choices(normalize=("nfc",)))
    with pytest.raises(UserError, match="bertscore needs a directory with an encoder"):
        chosen(["bertscore"])
    read = {name for maker in MAKERS.values() for name in maker.reads}
    assert read == {field.name for field in dataclasses.fields(Choices)}


@pytest.mark.parametrize(
    ("package", "names", "choices", "message"),
    [
        ("rjieba", ["bleu"], Choices(tokenizer="words"), "needs the package rjieba"),
        ("opencc", ["bleu"], Choices(normalize=("simplified",)), "needs the package opencc"),
        ("nltk.stem.porter", ["rouge_stemmed"], Choices(), "needs the package nltk"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, names, choices, message):
    for cached in (scores.rouge._stemmer, scores.language._segmenter, scores.language._converter):
        cached.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=message):
        chosen(names, choices)


@pytest.mark.parametrize(
    "name", [name for name, maker in MAKERS.items() if "normalize" in maker.reads and name != "bertscore"]
)
def test_normalize_reaches_every_score_of_texts(name):
    """Of texts that are the same but for what it levels, scores become those of the same text twice."""
    score = chosen([name], Choices(normalize=("case", "simplified", "width")))[name]
    said, right = "ＧＰＴ４ 學習 語言", "gpt4 学习 语言"
    assert score.of_record(said, [right], "zh") == SCORES[name].of_record(right, [right], "zh")
    if name != "diversity":
        assert score.signature("zh") == SCORES[name].signature("zh") + "|normalize:width+simplified+case"
    if name not in ("length", "diversity"):
        assert SCORES[name].of_record(said, [right], "zh") != SCORES[name].of_record(right, [right], "zh")


def test_a_toy_score_is_one_file_and_one_entry(monkeypatch):
    monkeypatch.setitem(MAKERS, "shouting", toy_score.shouting)
    made = chosen(["shouting", "bleu"], Choices(normalize=("width",)))["shouting"]
    assert made.of_set([("Yes!!", ["Yes!", "Yes"], "en"), ("no", ["no"], "en"), ("啊！", ["啊"], "zh")]) == {
        "shouting": 2 / 3
    }
    assert made.of_set([]) == {} and made.signature("zh") == "marks:!|normalize:width"
    text = (ROOT / "tests/toy_score.py").read_text(encoding="utf-8")
    assert text in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MAKERS)
def test_the_document_names_every_score_and_what_it_reads(name):
    text = (ROOT / "docs/SCORES.md").read_text(encoding="utf-8")
    if not name.startswith("sentence_bleu_"):
        assert f"`{name}`" in text
        numbers = [number.removeprefix("stemmed_") for number in SCORES[name].metrics]
        own = [f"`{number}`" in text or f"`_{number.rpartition('_')[2]}`" in text for number in numbers]
        assert all(own), name
    readers = re.search(r"It is read by (.*?);", text, re.S)[1].replace(
        "sentence_bleu_*", name if "sentence" in name else ""
    )
    assert (f"`{name}`" in readers) == ("tokenizer" in MAKERS[name].reads)
