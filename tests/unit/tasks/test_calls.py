"""Tool calls, results and definitions in all the forms that they are written in."""

import pytest
from tiny import conversation

from dsft.data.sources import BadRecord

USER, ASSISTANT = {"role": "user", "content": "北京?"}, {"role": "assistant", "content": "晴"}
WEATHER = {"name": "weather", "arguments": {"city": "北京"}}
SCHEMA = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}


def calling(**fields):
    return {"role": "assistant", "content": None, **fields}


def made(*turns, **fields):
    return conversation({"messages": [USER, *turns], **fields}, "f.jsonl:1")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [{"type": "function", "function": WEATHER}]},
        {"tool_calls": [{"type": "function", "function": WEATHER | {"arguments": '{"city": "北京"}'}}]},
        {"tool_calls": [WEATHER]},
        {"tool_calls": WEATHER},
        {"tool_calls": '[{"name": "weather", "arguments": {"city": "北京"}}]'},
        {"function_call": WEATHER},
        {"function_call": WEATHER | {"arguments": '{"city": "\\u5317\\u4eac"}'}},
    ],
)
def test_a_call_is_the_same_however_it_is_written(fields):
    turn = made(calling(**fields)).messages[1]
    assert turn == {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": WEATHER}]}


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_no_arguments_are_an_empty_object(arguments):
    turn = made(calling(tool_calls=[{"name": "now", "arguments": arguments}])).messages[1]
    assert turn["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            r"tool_calls\[0\]\.arguments` is an object, but this is list",
        ),
        ({"tool_calls": [{"name": "f", "arguments": 3}]}, r"tool_calls\[0\]\.arguments` is an object, but this is int"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, r"arguments` is a string, but not JSON"),
        ({"tool_calls": [{"arguments": {}}]}, r"tool_calls\[0\]` is not an object with a function's name"),
        ({"tool_calls": [{"name": 3}]}, r"tool_calls\[0\]` is not an object with a function's name"),
        ({"function_call": "auto"}, r"function_call` is a string, but not JSON"),
        ({"function_call": WEATHER, "tool_calls": [WEATHER]}, "both tool_calls and function_call"),
    ],
)
def test_what_is_no_call_is_refused_by_name(fields, problem):
    with pytest.raises(BadRecord, match=r"f\.jsonl:1: field `messages\[1\].*" + problem.removeprefix("`")):
        made(calling(**fields))


def test_results_stand_behind_their_calls_in_the_calls_order_with_their_names():
    calls = [{"id": "b", **WEATHER}, {"id": "a", "name": "time", "arguments": {}}]
    results = [
        {"role": "tool", "content": "12:00", "tool_call_id": "a"},
        {"role": "tool", "content": "晴", "tool_call_id": "b"},
    ]
    turns = made(calling(tool_calls=calls), *results, ASSISTANT).messages
    assert [(turn["name"], turn["content"]) for turn in turns[2:4]] == [("weather", "晴"), ("time", "12:00")]
    assert [call["id"] for call in turns[1]["tool_calls"]] == ["b", "a"]
    with pytest.raises(BadRecord, match=r"`messages\[2\]\.tool_call_id` is 'c', and the calls before are b, a"):
        made(calling(tool_calls=calls), results[0] | {"tool_call_id": "c"}, ASSISTANT)


def test_results_of_the_older_form_are_results():
    turns = made(calling(function_call=WEATHER), {"role": "function", "name": "weather", "content": "晴"}, ASSISTANT)
    assert turns.messages[2] == {"role": "tool", "name": "weather", "content": "晴"}


def test_definitions_are_the_same_under_both_names_and_with_and_without_their_frame():
    framed = [{"type": "function", "function": SCHEMA}]
    for fields in ({"tools": framed}, {"tools": [SCHEMA]}, {"functions": [SCHEMA]}):
        assert made(ASSISTANT, **fields).tools == framed
    inside = conversation({"messages": [{"role": "system", "content": "s", "tools": [SCHEMA]}, USER, ASSISTANT]}, "")
    assert inside.tools == framed and "tools" not in inside.messages[0]
    with pytest.raises(BadRecord, match="field `functions` stands beside `tools`"):
        made(ASSISTANT, tools=framed, functions=[SCHEMA])
    with pytest.raises(BadRecord, match=r"field `tools\[0\]` is not an object with a function's name"):
        made(ASSISTANT, tools=[{"type": "function"}])
