"""Questions nested in articles and paragraphs become rows."""

import json

from dsft.data.raw import BadRecord
from dsft.data.sources import Found


def read(tmp_path, content, name: str = "x.json"):
    (tmp_path / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return list(Found(str(tmp_path / name)).records())


ANSWER = {"text": "山上", "answer_start": 1}


def test_articles_of_squad(tmp_path):
    qas = [{"id": "q1", "question": "在哪？", "answers": [ANSWER]}, {"id": "q2", "question": "谁？", "answers": []}]
    article = {"title": "月", "paragraphs": [{"context": "在山上", "qas": qas}, {"context": "没有", "qas": []}]}
    found = read(tmp_path, {"version": "1.1", "data": [article]})
    assert [row.fields for row in found] == [{"title": "月", "context": "在山上", **question} for question in qas]
    assert [row.origin.split("x.json")[1] for row in found] == [
        ":1, paragraph 1, question q1",
        ":1, paragraph 1, question q2",
    ]


def test_paragraphs_of_cmrc_under_its_names(tmp_path):
    question = {"query_id": "Q0", "query_text": "在哪？", "answers": ["山上", "山上"]}
    (row,) = read(tmp_path, [{"context_id": "C", "context_text": "在山上", "title": "月", "qas": [question]}])
    assert row.fields == {
        "context": "在山上",
        "title": "月",
        "id": "Q0",
        "question": "在哪？",
        "answers": ["山上", "山上"],
    }


def test_what_is_broken_is_named_and_the_rest_is_read(tmp_path):
    good = {"context": "在山上", "qas": [{"id": 1, "question": "在哪？", "answers": [ANSWER]}, "在哪？"]}
    found = read(tmp_path, {"data": [{"paragraphs": [good, {"context": "x"}, 3]}]})
    assert [type(one) for one in found][1:] == [BadRecord] * 3
    assert [(one.origin.split("x.json:1")[1], one.problem[:30]) for one in found[1:]] == [
        (", paragraph 1, question 2", "it is no object, but '在哪？'"),
        (", paragraph 2", "it has no list `qas` of object"),
        (", paragraph 3", "it has no list `qas` of object"),
    ]


def test_other_rows_stay_as_they_are(tmp_path):
    rows = [{"paragraphs": ["a", "b"]}, {"paragraphs": [{"text": "a"}]}, {"qas": "x"}]
    assert [row.fields for row in read(tmp_path, rows)] == rows
