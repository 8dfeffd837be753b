"""Answers in texts: records, windows, what is learnt of them, and how a question's windows are joined."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from dsft.config.schema import DataConfig, OnOverflow, TaskConfig
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.tasks import TASKS, encode, extract
from dsft.tasks.task import View, read
from dsft.types import Batch, Dropped

TEXT = "月亮在山上 , says the owl over the hill"


def record(**fields):
    return read(extract.SHAPES, {"question": "where ?", "context": TEXT} | fields, "rows:1")


def encoded(row: dict, data: DataConfig | None = None, tokens=None, **settings):
    context = tiny.collator("extract", tokens=tokens, **settings).context
    raw = Raw({"question": "where ?", "context": TEXT} | row, "rows:1")
    return encode(raw, TASKS["extract"], replace(context, data=data or DataConfig())), raw.notes


@pytest.mark.parametrize(
    ("answers", "start"),
    [
        ([{"text": "the owl", "answer_start": 13}], None),
        ({"text": ["the owl"], "answer_start": [13]}, None),
        ({"text": "the owl", "answer_start": 13}, None),
        ("the owl", 13),
        (["the owl", "owl", "the owl"], None),
        ("the owl", None),
    ],
)
@pytest.mark.parametrize("name", ["answers", "answer"])
def test_answers_in_any_form(answers, start, name):
    made = record(**{name: answers, "answer_start": start, "id": 7})
    assert TEXT[slice(*made.span)] == "the owl" and made.answers[0] == "the owl"
    assert made.metadata["id"] == 7 and made.protected_spans() == {"context": [(13, 20)]}
    assert len(made.answers) == (2 if isinstance(answers, list) and len(answers) == 3 else 1)


@pytest.mark.parametrize("answers", [[], {"text": [], "answer_start": []}, "", " "])
@pytest.mark.parametrize("impossible", [None, True])
def test_no_answer(answers, impossible):
    made = record(answers=answers, is_impossible=impossible)
    assert made.span is None and made.answers == () and made.protected_spans() == {}


def test_an_answer_elsewhere_than_it_says_is_the_nearest_one_and_counted():
    made = record(answers=[{"text": "the", "answer_start": 30}])
    assert made.span == (26, 29) and extract.MOVED in made.notes
    made = record(answers=[{"text": "the", "answer_start": -1}])
    assert made.span == (13, 16) and not made.notes


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"answers": ["moon"]}, "field `answers`: the answer 'moon' is no part of `context`"),
        ({"answers": 3}, "field `answers` is a text, a list or an object, but this is int"),
        ({"answers": [3]}, r"field `answers\[0\]` has no `text`"),
        ({"answers": [{"text": " "}]}, r"field `answers\[0\]` has no `text`"),
        ({"answers": [{"text": "owl", "answer_start": "3"}]}, r"`answers\[0\].answer_start` is a number of characters"),
        ({"answers": [{"text": "owl", "answer_start": True}]}, r"`answers\[0\].answer_start` is a number"),
        ({"answers": {"text": ["owl"], "answer_start": []}}, "has 1 texts, and not as many in `answer_start`"),
        ({"answers": ["owl"], "is_impossible": True}, "`is_impossible` is true, and `answers` has an answer"),
        ({"answers": [], "is_impossible": False}, "`is_impossible` is false, and `answers` has no answer"),
        ({"answers": ["owl"], "is_impossible": "no"}, "`is_impossible` is true or false"),
        ({"answers": ["owl"], "question": " "}, "field `question` is empty"),
        ({"answers": ["owl"], "context": 3}, "field `context` is text"),
        ({"context": TEXT}, "field `answers` is missing beside `question`"),
    ],
)
def test_what_is_no_question_is_refused_by_its_field(fields, problem):
    with pytest.raises(BadRecord, match=problem):
        record(**fields)


def test_every_window_knows_its_characters_and_the_whole_answer_or_that_it_is_not_there():
    """Windows cut answers in two; what is cut is not there."""
    long, answer = " ".join([TEXT] * 8), "the owl"
    data = DataConfig(max_length=24)
    for at in (place for place in range(len(long)) if long.startswith(answer, place)):
        row = {"context": long, "answers": [{"text": answer, "answer_start": at}]}
        parts, _ = encoded(row, data, overlap=6)
        assert len(parts) > 3 and all(part.tokens <= 24 and part.weight == 1 for part in parts)
        for part in parts:
            columns, (begin, end) = part.columns, part.columns["target"]
            inside = columns["begins"] >= 0
            for token, b, e in zip(part.ids[inside], columns["begins"][inside], columns["ends"][inside]):
                said = tiny.ENCODER_TOKENIZER.decode([token])
                assert said == long[b:e] or "\ufffd" in said  # a part of a character's bytes
            held = columns["begins"][inside].min() <= at and columns["ends"].max() >= at + len(answer)
            assert (begin > 0) == held
            if held:
                assert long[columns["begins"][begin] : columns["ends"][end]].strip() == answer
        assert any(part.columns["target"][0] for part in parts)
        places = [span for part in parts for span in zip(part.columns["begins"], part.columns["ends"])]
        covered = {place for begin, end in places for place in range(begin, end)}
        assert covered >= {c for c in range(len(long)) if long[c] != " "}
        assert json.loads(parts[0].columns["answers"].tobytes()) == [answer]
        assert not len(parts[1].columns["answers"]) and not len(parts[1].columns["context"])
        assert [part.labels for part in parts[:2]] == [(extract.WITH_ANSWER,), ()]


def test_text_of_any_length_and_what_becomes_of_it():
    long = {"context": TEXT * 9, "answers": ["the owl"]}
    parts, _ = encoded(long, DataConfig(max_length=24, on_overflow=OnOverflow.drop))
    assert isinstance(parts, Dropped)
    for overflow, problem in ((OnOverflow.error, "rows:1: .* tokens"), (OnOverflow.truncate, "would cut answers off")):
        with pytest.raises(UserError, match=problem):
            encoded(long, DataConfig(max_length=24, on_overflow=overflow))
    parts, _ = encoded(long | {"question": TEXT * 9}, DataConfig(max_length=24))
    assert parts == Dropped(extract.NO_ROOM)
    parts, _ = encoded(long | {"weight": 0}, DataConfig(max_length=24))
    assert isinstance(parts, Dropped)
    with pytest.raises(UserError, match="task=extract: .* class token"):
        encoded(long, tokens=tiny.TOKENIZER)


def found(answered: list[list[tuple[float, float, int, int]]], rows: list[dict], threshold: float | None):
    """What is judged of questions by (score, nothing, begin, end) of each of their windows."""
    context = tiny.collator("extract", overlap=4, no_answer_threshold=threshold).context
    context = replace(context, data=DataConfig(max_length=24))
    data, windows = [], []
    for number, (row, given) in enumerate(zip(rows, answered)):
        parts = encode(Raw(row, "row"), TASKS["extract"], context)
        assert len(parts) == len(given)
        data += [replace(part, record=number) for part in parts]
        windows += given
    arrays = dict(zip(("score", "nothing", "begin", "end"), map(np.array, zip(*windows))))
    shuffled = np.random.default_rng(0).permutation(len(data))
    judged = {name: values[shuffled] for name, values in arrays.items()} | {"number": shuffled}
    return extract.judge(judged, context, data)


def test_the_best_span_of_all_windows_counts_and_nothing_by_its_threshold():
    row = {"question": "where ?", "context": "the owl over the hill " * 9, "answers": ["the hill"]}
    context = tiny.collator("extract", overlap=4).context
    parts = encode(Raw(row, "row"), TASKS["extract"], replace(context, data=DataConfig(max_length=24)))
    spans = [part.columns["target"].tolist() for part in parts]
    first = next(n for n, (begin, _) in enumerate(spans) if begin)
    assert len(parts) > 2
    windows = [(0.0, 0.0, 9, 9) if n != first else (5.0, 8.0, *spans[n]) for n in range(len(parts))]
    none = row | {"answers": []}
    numbers, about = found([windows, windows], [row, none], threshold=None)
    assert numbers == {"questions": 2, "exact": 0.5, "f1": 0.5, "no_answer_accuracy": 0, "f1_with_answer": 1}
    # nothing scores 0 in the other windows, 5 less than the span: the least counts
    numbers, _ = found([windows, windows], [row, none], threshold=-4.9)
    assert numbers["exact"] == 0.5 and numbers["no_answer_accuracy"] == 0
    numbers, _ = found([windows, windows], [row, none], threshold=-5.1)
    assert numbers["exact"] == 0.5 and numbers["no_answer_accuracy"] == 1
    assert about["best_no_answer_threshold"]["f1"] == 0.5
    numbers, about = found([windows], [row], threshold=None)
    assert numbers == {"questions": 1, "exact": 1, "f1": 1} and about == {}


@pytest.mark.parametrize("padded", [False, True])
def test_the_best_span_is_that_of_trying_all(padded):
    torch.manual_seed(0)
    lengths = [9, 14, 5]
    logits = torch.randn(3, 14, 2)
    inside = torch.rand(3, 14) < 0.7
    inside[:, 3] = True
    flat = [logits[n, :length] for n, length in enumerate(lengths)]
    batch = Batch({"lengths": torch.tensor(lengths)}, lengths, 3.0, 3, [0, 1, 2], padded=padded)
    laid = logits.flatten(0, 1) if padded else torch.cat(flat)
    rows = extract._by_window(laid, batch, -torch.inf)
    kept = [inside[n, :length].long() for n, length in enumerate(lengths)]
    of_text = inside.long().flatten() if padded else torch.cat(kept)
    best = extract._best_spans(rows, extract._by_window(of_text, batch, 0), TaskConfig(max_answer_tokens=4))
    for n, length in enumerate(lengths):
        places = [place for place in range(length) if inside[n, place]]
        tried = {(b, e): float(logits[n, b, 0] + logits[n, e, 1]) for b in places for e in places if b <= e < b + 4}
        expected = max(tried, key=tried.__getitem__)
        assert (int(best["begin"][n]), int(best["end"][n])) == expected
        assert float(best["score"][n]) == pytest.approx(tried[expected])
        assert float(best["nothing"][n]) == pytest.approx(float(logits[n, 0].sum()))


@pytest.mark.parametrize(("counts", "expected"), [({}, None), ({extract.WITHOUT_ANSWER: [1, "x"]}, 0.0)])
def test_whether_there_may_be_no_answer_is_told_by_the_training_data(counts, expected):
    data = SimpleNamespace(labels={"data.train=x": {extract.WITH_ANSWER: [3, "x"]} | counts, "data.validation=y": {}})
    context = tiny.collator("extract").context
    settled = extract.settle(context, data, [])
    assert settled.task.no_answer_threshold == expected and settled.labels.names == ("start", "end")
    given = replace(context, task=replace(context.task, no_answer_threshold=1.5))
    assert extract.settle(given, data, ["LABEL_0", "LABEL_1"]).task.no_answer_threshold == 1.5
    assert extract.settle(given, data, ["LABEL_0", "LABEL_1"]).labels.names == ("LABEL_0", "LABEL_1")


def test_inputs_bring_the_place_of_the_answer():
    ((example, *_), _) = encoded({"answers": ["the owl"]}, DataConfig())
    made = extract.inputs(replace(example, number=4, weight=0.5), View(), tiny.collator("extract").context)
    assert made["document_target"].tolist() == example.columns["target"].tolist()
    assert made["document_weight"] == 0.5 and made["document_number"] == 4
    assert made["of_context"].sum() == (example.columns["begins"] >= 0).sum()
