"""Scores of texts that are data: JSON, and calls of tools."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsft.metrics.metric import SHOWN, judged
from dsft.metrics.scores.score import Maker, Numbers, Score, means

_FENCE = re.compile(r"```\w*\n")
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.S)
_MARKED = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>")
_LIKE_CALLS = re.compile(r"(?:```json)?[\s\[]*\{.*\"name\"", re.S)

DEEPEST = 100
"""Lists and objects in one another, as in data."""


def parsed(text: str) -> Any:
    """What a text holds as JSON: by itself, or fenced as code.

    Raises:
        ValueError: It holds none; NaN and infinity, a name twice in an object, and what is nested too deep are none.
    """
    text = text.strip()
    if (fence := _FENCE.match(text)) and text.endswith("\n```"):
        text = text[fence.end() : -3]
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [part for one in level if isinstance(one, (dict, list)) for part in _parts(one)]
    if level:
        raise ValueError("nested too deep")
    return value


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def same(left: Any, right: Any) -> bool:
    """Whether two values of JSON are equal: names in any order, 1 and 1.0 the same, true and 1 not."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]


def calls(text: str) -> list[Call]:
    """The calls that a text makes, none if it is plain text.

    They are JSON: objects with `name` and `arguments` (or `parameters`; an object, or JSON of one), wrapped in
    `function` or not, one or a list or under `tool_calls`; each between `<tool_call>` and `</tool_call>`, or behind
    `[TOOL_CALLS]` or `<|python_tag|>`, or the whole text.

    Raises:
        ValueError: A text that is marked as calls holds none that can be read.
    """
    if tagged := _TAGGED.findall(text):
        return [call for one in tagged for call in _calls(parsed(one))]
    if marked := _MARKED.split(text)[1:]:
        return [call for one in marked for call in _calls(parsed(one))]
    try:
        return _calls(parsed(text))
    except ValueError:
        if _LIKE_CALLS.match(text.strip()):
            raise
        return []


def _calls(value: Any) -> list[Call]:
    if isinstance(value, dict) and "tool_calls" in value:
        value = value["tool_calls"]
    return [_call(one) for one in (value if isinstance(value, list) else [value])]


def _call(value: Any) -> Call:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"no object with a function's name: {str(value)[:80]}")
    given: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
    arguments = parsed(given or "{}") if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {function['name']} are no object")
    return Call(function["name"], arguments)


def _read(references: Sequence[str], name: str, read: Any) -> list[Any]:
    try:
        return [read(one) for one in references]
    except ValueError as problem:
        raise ValueError(f"{name}: a reference cannot be read ({problem})") from problem


def _count_json(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
    right = _read(references, "json", parsed)
    try:
        said = parsed(prediction)
    except ValueError:
        return [1.0, 0.0, 0.0]
    return [1.0, 1.0, any(same(said, one) for one in right)]


def _count_calls(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
    right = _read(references, "calls", calls)
    try:
        said, read = calls(prediction), 1.0
    except ValueError:
        said, read = [], 0.0
    best = max((_agreement(said, one) for one in right), key=lambda counts: (counts[0], counts[1], counts[4]))
    # what cannot be read is not the right answer where no call is wanted either
    return [1.0, read, best[0] and read, *best[1:]]


def _agreement(said: list[Call], right: list[Call]) -> list[float]:
    """Whether all is right; functions that are right, that were called, that should be; and so for their arguments.

    The order of calls does not count. Each call that should be is held against the one of its function, of those that
    are left, with most arguments right.
    """
    left, fields = list(said), 0
    for call in right:
        ours = [(_fields(one, call), -place) for place, one in enumerate(left) if one.name == call.name]
        if ours:
            own, place = max(ours)
            fields += own
            del left[-place]
    names = (Counter(call.name for call in said) & Counter(call.name for call in right)).total()
    given, due = (sum(len(call.arguments) for call in which) for which in (said, right))
    whole = names == len(said) == len(right) and fields == given == due
    return [whole, names, len(said), len(right), fields, given, due]


def _fields(said: Call, right: Call) -> int:
    shared = said.arguments.keys() & right.arguments.keys()
    return sum(same(said.arguments[name], right.arguments[name]) for name in shared)


def _form_calls(sums: np.ndarray) -> Numbers:
    records, read, whole, *counts = sums.tolist()
    if not records:
        return {}
    found = {"calls_read": read / records, "calls_exact": whole / records}
    for name, (right, given, due) in (("calls_function", counts[:3]), ("calls_argument", counts[3:])):
        shares = {"precision": (right, given), "recall": (right, due), "f1": (2 * right, given + due)}
        found |= {f"{name}_{part}": above / below for part, (above, below) in shares.items() if below}
    return found


json_match = Maker(
    lambda choices: Score(
        {
            "json_read": judged("share of records", "JSON that parses", "json_read"),
            "json_equal": judged("share of records", "JSON that is equal", "json_equal", **SHOWN),
        },
        _count_json,
        means("json_read", "json_equal"),
        lambda language: "by value",
    )
)
tool_calls = Maker(
    lambda choices: Score(
        {
            "calls_read": judged("share of records", "Tool calls that parse", "calls_read"),
            "calls_exact": judged("share of records", "Tool calls all right", "calls_exact", **SHOWN),
            **{
                f"calls_{what}_{part}": judged(
                    f"over all {what}s", f"Tool calls, {what} {part}", f"calls_{what}_{part}"
                )
                for what in ("function", "argument")
                for part in ("precision", "recall", "f1")
            },
        },
        _count_calls,
        _form_calls,
        lambda language: "by value, in any order",
    )
)
