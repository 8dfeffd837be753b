"""Questions about texts, as SQuAD and CMRC nest them in articles and paragraphs: a row for each question."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsft.data.raw import BadRecord, Fields, Raw

NAMES = {"context_text": "context", "query_text": "question", "query_id": "id", "context_id": None}
"""CMRC's own names; None for what each of its questions has a longer one of."""


def unnested(raw: Raw) -> Iterator[Raw | BadRecord]:
    """A row for each question of an article or a paragraph, with the fields of both; any other row as it is.

    An article has `paragraphs`, a paragraph has `qas`; each a list of objects.
    """
    article = _is_article(raw.fields)
    if not article and not _has_questions(raw.fields):
        yield raw
        return
    about = {name: value for name, value in raw.fields.items() if name != "paragraphs"}
    for number, paragraph in enumerate(raw.fields["paragraphs"] if article else [{}], start=1):
        origin = f"{raw.origin}, paragraph {number}" if article else raw.origin
        if not isinstance(paragraph, dict) or not isinstance((about | paragraph).get("qas"), list):
            yield BadRecord(origin, "it has no list `qas` of objects with questions")
            continue
        fields = about | paragraph
        for place, question in enumerate(fields.pop("qas")):
            if not isinstance(question, dict):
                yield BadRecord(f"{origin}, question {place + 1}", f"it is no object, but {question!r:.40}")
                continue
            name = question.get("id", question.get("query_id", place + 1))
            yield Raw(_named(fields | question), f"{origin}, question {name}", set(raw.notes), raw.hint)


def _has_questions(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("qas"), list)


def _is_article(value: Any) -> bool:
    paragraphs = value.get("paragraphs") if isinstance(value, dict) else None
    return isinstance(paragraphs, list) and any(map(_has_questions, paragraphs))


def _named(fields: Fields) -> dict[str, Any]:
    named = {NAMES.get(name, name): value for name, value in fields.items()}
    return {name: value for name, value in named.items() if name is not None}
