"""Conversations, and the shapes that they come in, recognised by their field names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dsft.data.sources import Fields
from dsft.tasks.task import text_of
from dsft.types import Record

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Role as written -> role that chat templates know."""

CALL = "function_call"
"""ShareGPT's role for an assistant's turn that is nothing but a tool call, written as JSON."""


@dataclass(kw_only=True)
class Conversation(Record):
    """A chat, or a plain text.

    Attributes:
        messages: Chat turns, each `{"role": ..., "content": ..., ...}`; empty for plain text.
        text: Plain text to be learnt as a whole, with no chat template; None for a chat.
        tools: Tool definitions handed to the chat template, or None.
    """

    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    tools: list[dict[str, Any]] | None = None

    def texts(self) -> dict[str, str]:
        if self.text is not None:
            return {"text": self.text}
        return {f"messages[{number}].content": turn["content"] for number, turn in enumerate(self.messages)}

    def with_texts(self, texts: Mapping[str, str]) -> Conversation:
        turns = [turn | {"content": texts[f"messages[{n}].content"]} for n, turn in enumerate(self.messages)]
        return replace(self, messages=turns, text=self.text if self.text is None else texts["text"])


def plain_text(fields: Fields, origin: str) -> Conversation:
    """A plain text, to be learnt as a whole."""
    return Conversation(text=text_of(fields["text"], "text", empty=False), origin=origin)


def _chat(name: str, messages_of: Callable[[Fields], list[Message]]) -> Callable[[Fields, str], Conversation]:
    """What makes a conversation of a row, from what makes its messages."""
    return partial(_conversation, messages_of, name)


def _conversation(
    messages_of: Callable[[Fields], list[Message]], name: str, fields: Fields, origin: str
) -> Conversation:
    """The conversation that a row holds; its fields `tools` and `system` count for every shape.

    Raises:
        ValueError: A field is missing, empty, of the wrong type or holds an unknown role; or the turns cannot be
            trained on. The message names the field.
    """
    messages = messages_of(fields)
    if fields.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text_of(fields["system"], "system")})
    _check_turns(messages, name)
    return Conversation(messages=messages, tools=_tools(fields.get("tools")), origin=origin)


def _messages(name: str) -> Callable[[Fields], list[Message]]:
    return partial(_turns_in, name)


def _turns_in(name: str, fields: Fields) -> list[Message]:
    return _turns(fields[name], name)


def _prompt_completion(fields: Fields) -> list[Message]:
    return _side(fields["prompt"], "prompt", "user") + _side(fields["completion"], "completion", "assistant")


def _side(value: Any, field: str, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": text_of(value, field, empty=False)}]
    return _turns(value, field)


def _instruction(fields: Fields) -> list[Message]:
    messages: list[Message] = []
    for number, pair in enumerate(fields.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"field `history[{number}]` is not a [question, answer] pair")
        question, answer = (text_of(side, f"history[{number}]") for side in pair)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [text_of(fields[name], name) for name in ("instruction", "input") if fields.get(name)]
    messages.append({"role": "user", "content": text_of("\n\n".join(parts), "instruction", empty=False)})
    messages.append({"role": "assistant", "content": text_of(fields["output"], "output", empty=False)})
    return messages


def _turns(value: Any, field: str) -> list[Message]:
    """Messages as role/content or from/value, or a JSON string of these, as CSV holds them."""
    turns = _from_json(value, field)
    if not isinstance(turns, list):
        raise ValueError(f"field `{field}` is a list of messages, but this is {type(turns).__name__}")
    return [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(turns)]


def _turn(turn: Any, field: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"field `{field}` is not an object with role and content")
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    role = turn.get(role_key)
    if role is None:
        raise ValueError(f"field `{field}.role` is missing")
    if role == CALL:
        calls = _from_json(turn.get(content_key), f"{field}.{content_key}")
        return _calling({"role": "assistant", "content": "", "tool_calls": calls}, field)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(
            f"field `{field}.{role_key}` is the unknown role {role!r}; known are {', '.join([*ROLES, CALL])}"
        )
    content = turn.get(content_key)
    if content is None and not turn.get("tool_calls"):
        raise ValueError(f"field `{field}.{content_key}` is missing")
    others = {key: item for key, item in turn.items() if key not in (role_key, content_key) and item is not None}
    content = "" if content is None else _content(content, f"{field}.{content_key}")
    return _calling({"role": ROLES[role.lower()], "content": content, **others}, field)


def _calling(message: Message, field: str) -> Message:
    """The message with its tool calls as templates expect them: wrapped in `function`, arguments as an object.

    OpenAI's interface writes arguments as a JSON string, which a template would quote once more.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    made = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise ValueError(f"field `{field}.tool_calls[{number}]` is not an object with a function's name")
        place = f"{field}.tool_calls[{number}].arguments"
        function = {**function, "arguments": _from_json(function.get("arguments", {}), place)}
        made.append({"type": "function", **(call if "function" in call else {}), "function": function})
    return {**message, "tool_calls": made}


def _content(value: Any, field: str) -> str:
    """Text, or a list of text parts laid end to end."""
    if not isinstance(value, list):
        return text_of(value, field)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"field `{field}` holds a part that is not text")
    return "".join(text_of(part.get("text"), field) for part in value)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    tools = _from_json(value, "tools") if value else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("field `tools` is a list of objects")
    return tools or None


def _from_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"field `{field}` is a string, but not JSON: {error}") from error


def _check_turns(messages: list[Message], field: str) -> None:
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError(f"field `{field}` has no assistant turn to learn from")
    if turns[0]["role"] != "user":
        raise ValueError(f"field `{field}`: the first turn is the {turns[0]['role']}'s, but the user's is expected")
    for number, message in enumerate(messages):
        needs_content = message["role"] in ("user", "assistant") and not message.get("tool_calls")
        if needs_content and not message["content"].strip():
            raise ValueError(f"field `{field}`: turn {number + 1}, the {message['role']}'s, is empty")


SHAPES: dict[tuple[str, ...], Callable[[Fields, str], Conversation]] = {
    ("messages",): _chat("messages", _messages("messages")),
    ("conversations",): _chat("conversations", _messages("conversations")),
    ("prompt", "completion"): _chat("prompt+completion", _prompt_completion),
    ("instruction", "output"): _chat("instruction+output", _instruction),
    ("text",): plain_text,
}
"""Fields that a shape needs -> what makes a conversation of a row that has them; the first that fits is taken."""
