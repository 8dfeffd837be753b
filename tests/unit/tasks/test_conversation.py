"""Every shape becomes the same conversation, and a bad record is named by origin and field."""

import json

import pytest
from tiny import conversation as to_conversation

from dsft.data.sources import BadRecord

USER, ASSISTANT = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}
SYSTEM = {"role": "system", "content": "Be brief."}


def messages(**fields):
    return to_conversation(fields, "f.jsonl:7").messages


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "世界"}]},
        {"conversations": [USER, ASSISTANT], "id": 3},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "text", "text": "世"}, {"type": "text", "text": "界"}]},
            ]
        },
        {"messages": None, "prompt": "你好", "completion": "世界"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "世界"},
        {"instruction": "你好", "input": "", "output": "世界"},
        {"instruction": "你好", "output": "世界"},
        {"instruction": "你好", "input": None, "output": "世界", "history": []},
    ],
)
def test_shapes_are_recognised_without_being_told(fields):
    assert to_conversation(fields, "").messages == [USER, ASSISTANT]


def test_text_is_no_chat():
    conversation = to_conversation({"text": "床前明月光"}, "f.jsonl:1")
    assert (conversation.text, conversation.messages, conversation.origin) == ("床前明月光", [], "f.jsonl:1")


def test_input_follows_the_instruction_and_history_comes_before_both():
    assert messages(instruction="Add.", input="1 1", output="2", system="Be brief.", history=[["a", "b"]]) == [
        SYSTEM,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Add.\n\n1 1"},
        {"role": "assistant", "content": "2"},
    ]


def test_the_record_s_own_system_turn_comes_first():
    with pytest.raises(BadRecord, match="field `system` stands beside a system turn"):
        messages(messages=[SYSTEM, USER, ASSISTANT], system="other")
    assert messages(conversations=[USER, ASSISTANT], system="Be brief.")[0] == SYSTEM


def test_tool_calls_stay_as_they_are():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"n": None, "城": "北京"}}}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": None},
        ASSISTANT,
    ]
    for given in (tools, json.dumps(tools)):
        conversation = to_conversation({"messages": turns, "tools": given}, "")
        assert conversation.tools == tools
        assert conversation.messages == [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [calls[0] | {"id": "1"}]},
            {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"},
            ASSISTANT,
        ]
    assert to_conversation({"messages": turns, "tools": []}, "").tools is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"front": "a", "back": "b"}, "fields front, back are none of the known shapes: messages, conv"),
        ({}, r"fields \(none\) are none of the known shapes"),
        ({"instruction": "a", "out": "b"}, "field `output` is missing beside `instruction`"),
        ({"completion": "b"}, "field `prompt` is missing beside `completion`"),
        ({"messages": 3}, "field `messages` is a list of messages, but this is int"),
        ({"messages": "hello"}, "field `messages` is a string, but not JSON"),
        ({"messages": []}, "field `messages` has no assistant turn"),
        ({"messages": [USER]}, "field `messages` has no assistant turn"),
        ({"messages": ["a"]}, r"field `messages\[0\]` is not an object"),
        ({"messages": [USER, {"content": "b"}]}, r"field `messages\[1\].role` is missing"),
        ({"messages": [USER, {"role": "assistant"}]}, r"field `messages\[1\].content` is missing"),
        (
            {"messages": [USER, {"role": "assistant", "content": 5}]},
            r"`messages\[1\].content` is text, but this is int",
        ),
        (
            {"messages": [{"role": "usr", "content": "a"}]},
            r"field `messages\[0\].role` is the unknown role 'usr'; known",
        ),
        ({"conversations": [{"from": 1, "value": "a"}]}, r"field `conversations\[0\].from` is the unknown role 1"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "turn 2, the assistant's, is empty"),
        ({"messages": [SYSTEM, ASSISTANT, USER]}, "the first turn is the assistant's"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "a part that is not text"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "field `tools` is a string, but not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "field `tools` is a list of objects"),
        ({"messages": [USER, ASSISTANT], "system": 1}, "field `system` is text, but this is int"),
        ({"prompt": "a", "completion": ""}, "field `completion` is empty"),
        ({"prompt": "[{", "completion": 1}, "field `completion` is a list of messages, but this is int"),
        ({"instruction": "a", "output": 7}, "field `output` is text, but this is int"),
        ({"instruction": "", "output": "b"}, "field `instruction` is empty"),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            r"field `history\[0\]` is not a \[question, answer\] pair",
        ),
        ({"text": " "}, "field `text` is empty"),
        ({"text": 1}, "field `text` is text, but this is int"),
    ],
)
def test_a_bad_record_is_named_by_origin_and_field(fields, problem):
    with pytest.raises(BadRecord, match=r"^f\.jsonl:7: .*" + problem):
        to_conversation(fields, "f.jsonl:7")


def test_tool_calls_of_sharegpt_and_openai_become_what_templates_expect():
    """A call written as JSON text must reach the template as an object, or it is quoted twice."""
    weather = {"name": "weather", "arguments": {"city": "北京"}}
    sharegpt = [
        {"from": "human", "value": "北京天气"},
        {"from": "function_call", "value": json.dumps(weather, ensure_ascii=False)},
        {"from": "observation", "value": "晴"},
        {"from": "gpt", "value": "晴天"},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    openai = [
        {"role": "user", "content": "北京天气"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "晴天"},
    ]
    for name, turns in (("conversations", sharegpt), ("messages", openai)):
        messages = to_conversation({name: turns}, "x:1").messages
        assert messages[1]["tool_calls"][0]["function"] == weather
        assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]


def test_a_tool_call_without_a_name_is_told():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": 3}]}]
    with pytest.raises(BadRecord, match=r"tool_calls\[0\].* function's name"):
        to_conversation({"messages": turns}, "x:1")
