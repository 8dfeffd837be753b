"""JSON and tool calls, by hand."""

import json

import pytest

from dsft.metrics.scores import SCORES
from dsft.metrics.scores.structured import Call, calls, parsed, same

WEATHER = '{"name": "weather", "arguments": {"city": "北京", "days": 3}}'


@pytest.mark.parametrize(
    ("said", "read", "equal"),
    [
        ('{"b": [1, 2], "a": null}', 1, 1),
        ('{"a": null, "b": [1.0, 2e0]}', 1, 1),
        ('```json\n{"a": null, "b": [1, 2]}\n```', 1, 1),
        ('{"a": null, "b": [2, 1]}', 1, 0),
        ('{"a": null, "b": [true, 2]}', 1, 0),
        ('{"a": false, "b": [1, 2]}', 1, 0),
        ('{"b": [1, 2]}', 1, 0),
        ('here: {"a": null, "b": [1, 2]}', 0, 0),
        ('{"a": null, "a": null, "b": [1, 2]}', 0, 0),
        ('{"a": NaN, "b": [1, 2]}', 0, 0),
        ('{"a": null, "b": [1, 2]', 0, 0),
        ("[" * 150 + "]" * 150, 0, 0),
        ("", 0, 0),
    ],
)
def test_json(said, read, equal):
    assert SCORES["json"].of_record(said, ["[]", '{"a": null, "b": [1, 2]}']) == {
        "json_read": read,
        "json_equal": equal,
    }


def test_what_parses_is_what_pythons_own_reader_gives():
    for value in ([], {}, "字", 1, -1.5e9, True, None, [[{"a": [1, {"b": "\n"}]}]]):
        assert parsed(json.dumps(value)) == value and same(parsed(json.dumps(value, indent=2)), value)


@pytest.mark.parametrize(
    "text",
    [
        WEATHER,
        f"[{WEATHER}]",
        f'{{"function": {WEATHER}, "id": "1", "type": "function"}}',
        f'{{"tool_calls": [{{"function": {WEATHER}}}]}}',
        f"I look it up.\n<tool_call>\n{WEATHER}\n</tool_call>",
        f"<tool_call>{WEATHER}",
        f"[TOOL_CALLS] [{WEATHER}]",
        f"<|python_tag|>{WEATHER.replace('arguments', 'parameters')}",
        f"```json\n{WEATHER}\n```",
        json.dumps({"name": "weather", "arguments": '{"city": "北京", "days": 3}'}),
    ],
)
def test_calls_are_read_in_each_form(text):
    assert calls(text) == [Call("weather", {"city": "北京", "days": 3})]


@pytest.mark.parametrize("text", ["It is sunny.", "", "[1, 2]", "42", "```python\nprint()\n```", '{"a": 1}'])
def test_plain_texts_call_nothing(text):
    assert calls(text) == []


@pytest.mark.parametrize(
    "text",
    ["<tool_call>weather</tool_call>", WEATHER[:-1], '[TOOL_CALLS]weather{"a": 1}', '{"name": "f", "arguments": 3}'],
)
def test_calls_that_cannot_be_read_are_counted(text):
    with pytest.raises(ValueError):
        calls(text)
    found = SCORES["calls"].of_record(text, [WEATHER])
    assert (found["calls_read"], found["calls_exact"], found["calls_function_recall"]) == (0, 0, 0)
    assert SCORES["calls"].of_record(text, ["It is sunny."])["calls_exact"] == 0
    with pytest.raises(ValueError, match="calls: a reference cannot be read"):
        SCORES["calls"].statistics("x", [text])


def made(*given):
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in given])


def test_calls_by_hand():
    records = [
        # the other order, and 1 for 1.0: all right
        (made(("g", {}), ("f", {"x": 1})), [made(("f", {"x": 1.0}), ("g", {}))]),
        # of two calls of f the one with y=2 is the nearer one; one of two arguments is right, one more is given
        (made(("f", {"x": 9, "y": 2}), ("f", {"z": 0})), [made(("f", {"x": 1, "y": 2}))]),
        # another function: its arguments are right for none
        (made(("h", {"x": 1})), [made(("f", {"x": 1}))]),
        # none where none is wanted
        ("It is sunny.", ["Sunny."]),
    ]
    found = SCORES["calls"].of_set([(*record, "en") for record in records])
    assert found == {
        "calls_read": 1,
        "calls_exact": 2 / 4,
        "calls_function_precision": 3 / 5,
        "calls_function_recall": 3 / 4,
        "calls_function_f1": 2 * 3 / (5 + 4),
        "calls_argument_precision": 2 / 5,
        "calls_argument_recall": 2 / 4,
        "calls_argument_f1": 2 * 2 / (5 + 4),
    }


def test_of_several_references_the_nearest_counts():
    found = SCORES["calls"].of_record(WEATHER, [made(("weather", {"city": "上海"})), WEATHER])
    assert found["calls_exact"] == found["calls_argument_f1"] == 1
