"""Conversations, and the shapes that they come in, recognised by their field names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dsft.data.sources import Fields
from dsft.tasks import calls, media, reasoning, weights
from dsft.tasks.calls import Message
from dsft.tasks.task import text_of
from dsft.types import Record

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

KNOWN = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "weight"}
"""What a message is made of here; whatever else it has is handed to the chat template, and noted."""


@dataclass(kw_only=True)
class Conversation(Record):
    """A chat, or a plain text.

    Attributes:
        messages: Chat turns, each `{"role": ..., "content": ..., ...}`, where content may be None beside `tool_calls`,
            and reasoning stands in `reasoning_content`; empty for plain text.
        text: Plain text to be learnt as a whole, with no chat template; None for a chat.
        tools: Tool definitions handed to the chat template, or None.
        weights: Weight that each message carries, or None; as many as messages, or empty if none carries any.
        context: How many messages at the beginning are only read: those of a `prompt`.
    """

    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    weights: list[float | None] = field(default_factory=list)
    context: int = 0

    def texts(self) -> dict[str, str]:
        if self.text is not None:
            return {"text": self.text}
        return {f"messages[{n}].content": turn["content"] for n, turn in enumerate(self.messages) if turn["content"]}

    def with_texts(self, texts: Mapping[str, str]) -> Conversation:
        turns = [turn | {"content": texts.get(f"messages[{n}].content", turn["content"])}
                 for n, turn in enumerate(self.messages)]  # fmt: skip
        return replace(self, messages=turns, text=self.text if self.text is None else texts["text"])

    def with_examples(self, examples: Sequence[Conversation]) -> Conversation:
        """The same chat with the examples' turns before it, behind its system turn; they count nothing."""
        if not self.messages or not all(one.messages for one in examples):
            raise ValueError("a plain text takes no few-shot examples and is none (data.few_shot.path): give chats")
        before = [message for one in examples for message in one.messages]
        if any(one.tools for one in examples) or any(turn["role"] in ("system", "developer") for turn in before):
            raise ValueError("a few-shot example has no system turn and no tools: a record brings its own")
        at = next(n for n, turn in enumerate(self.messages) if turn["role"] not in ("system", "developer"))
        weights = self.weights or [None] * len(self.messages)
        return replace(
            self,
            messages=[*self.messages[:at], *before, *self.messages[at:]],
            weights=[*weights[:at], *[0.0] * len(before), *weights[at:]],
            context=self.context and self.context + len(before),
        )

    def weight_of(self, turn: int) -> float | None:
        """The weight that a message carries."""
        return self.weights[turn] if self.weights else None


def plain_text(fields: Fields, origin: str) -> Conversation:
    """A plain text, to be learnt as a whole."""
    media.refuse_fields(fields)
    text = text_of(fields["text"], "text", empty=False)
    return Conversation(text=text, weight=weights.of_record(fields), origin=origin)


def _chat(
    name: str,
    messages_of: Callable[[Fields], list[Message]],
    context_of: Callable[[Fields], int] | None = None,
    asked: bool = False,
) -> Callable[[Fields, str], Conversation]:
    """What makes a conversation of a row, from what makes its messages; one that is `asked` may want an answer."""
    return partial(_conversation, messages_of, context_of, name, asked)


def _conversation(
    messages_of: Callable[[Fields], list[Message]],
    context_of: Callable[[Fields], int] | None,
    name: str,
    asked: bool,
    fields: Fields,
    origin: str,
) -> Conversation:
    """The conversation that a row holds; its fields `tools`, `functions`, `system` and its weight count in every shape.

    Raises:
        ValueError: A field is missing, empty, of the wrong type or holds an unknown role; or the turns cannot be
            trained on. The message names the field.
    """
    media.refuse_fields(fields)
    messages = messages_of(fields)
    context = context_of(fields) if context_of else 0
    if fields.get("system"):
        if any(message["role"] in ("system", "developer") for message in messages):
            raise ValueError(f"field `system` stands beside a system turn in `{name}`: leave one of them out")
        messages.insert(0, {"role": "system", "content": text_of(fields["system"], "system")})
        context += bool(context)
    _check_turns(messages, name, asked)
    carried = [message.pop("weight", None) for message in messages]
    left = {key for message in messages for key in message.pop("left", ())}
    extra = {key for message in messages for key in message if key not in KNOWN}
    return Conversation(
        messages=calls.paired(messages, name),
        tools=_tools(fields, messages),
        weight=weights.of_record(fields),
        weights=carried if any(weight is not None for weight in carried) else [],
        context=context,
        notes={f"field `{key}` of messages handed to the chat template" for key in extra}
        | {f"field `{key}` of a content's parts left out" for key in left}
        | {f"field `{key}` of tool calls handed to the chat template" for key in calls.extra(messages)},
        origin=origin,
    )


def _messages(name: str) -> Callable[[Fields], list[Message]]:
    return partial(_turns_in, name)


def _turns_in(name: str, fields: Fields) -> list[Message]:
    return _turns(fields[name], name)


def _prompt_completion(fields: Fields) -> list[Message]:
    return _side(fields["prompt"], "prompt", "user") + _side(fields["completion"], "completion", "assistant")


def _prompt_turns(fields: Fields) -> int:
    return len(_side(fields["prompt"], "prompt", "user"))


def _side(value: Any, field: str, role: str) -> list[Message]:
    if isinstance(value, str):
        media.refuse_placeholders(value, field)
        return [{"role": role, "content": text_of(value, field, empty=False)}]
    return _turns(value, field)


def _asked(question: str, fields: Fields) -> list[Message]:
    return _side(fields[question], question, "user")


def _pair(question: str, answer: str, fields: Fields) -> list[Message]:
    return _side(fields[question], question, "user") + _side(fields[answer], answer, "assistant")


def _instruction(fields: Fields) -> list[Message]:
    messages = _instructed(fields)
    messages.append({"role": "assistant", "content": text_of(fields["output"], "output", empty=False)})
    media.refuse_placeholders(messages[-1]["content"], "instruction+output")
    return messages


def _instructed(fields: Fields) -> list[Message]:
    messages: list[Message] = []
    history = fields.get("history") or []
    if not isinstance(history, list | tuple):
        raise ValueError(f"field `history` is a list of [question, answer] pairs, but this is {type(history).__name__}")
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"field `history[{number}]` is not a [question, answer] pair")
        question, answer = (text_of(side, f"history[{number}]", empty=False) for side in pair)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [text_of(fields[name], name) for name in ("instruction", "input") if fields.get(name)]
    messages.append({"role": "user", "content": text_of("\n\n".join(parts), "instruction", empty=False)})
    for message in messages:
        media.refuse_placeholders(message["content"], "instruction+output")
    return messages


def _turns(value: Any, field: str) -> list[Message]:
    """Messages as role/content or from/value, or a JSON string of these, as CSV holds them."""
    turns = calls.from_json(value, field)
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
    others = {key: item for key, item in turn.items() if key not in (role_key, content_key) and item is not None}
    media.refuse_fields(others, f"{field}.")
    weight = weights.of_message(others, field)
    carried = {} if weight is None else {"weight": weight}
    content = turn.get(content_key)
    if role == CALL:
        others, role, content = others | {"tool_calls": content}, "assistant", None
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(
            f"field `{field}.{role_key}` is the unknown role {role!r}; known are {', '.join([*ROLES, CALL])}"
        )
    content, thought, left = _content(content, f"{field}.{content_key}")
    role = ROLES[role.lower()]
    thought = thought or reasoning.take(others, field)
    if thought and role != "assistant":
        raise ValueError(f"field `{field}` carries reasoning, and only an assistant's turn has any")
    message = calls.calling({"role": role, "content": content, **others, **carried}, field)
    if "tool_calls" in message and role != "assistant":
        raise ValueError(f"field `{field}.tool_calls`: only an assistant's turn has any")
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"field `{field}.{content_key}` is missing")
    return message | ({"reasoning_content": thought} if thought else {}) | ({"left": left} if left else {})


def _content(value: Any, field: str) -> tuple[str | None, str | None, set[str]]:
    """Text, or text parts laid end to end; reasoning that stands in parts of its own; other fields of the parts."""
    if value is None:
        return None, None, set()
    if not isinstance(value, list):
        text = text_of(value, field)
        media.refuse_placeholders(text, field)
        return text, None, set()
    text, thought, left = "", "", set[str]()
    for number, part in enumerate(value):
        place = f"{field}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("thinking", "reasoning"):
            thought += text_of(part.get(kind, part.get("text")), place)
        elif kind in media.TEXT_PARTS:
            text += text_of(part.get("text"), place)
        else:
            raise ValueError(f"field `{place}` is a part that is not text: {kind or type(part).__name__}")
        left |= {key for key in part if key not in ("type", "text", kind)}
    media.refuse_placeholders(text, field)
    return text, thought or None, left


def _tools(fields: Fields, messages: list[Message]) -> list[dict[str, Any]] | None:
    """Tool definitions of a record, under their newer or older name, or with its system turn."""
    found = {name: made for name in ("tools", "functions") if (made := calls.tools(fields.get(name), name))}
    for number, message in enumerate(messages):
        if message["role"] in ("system", "developer") and (made := calls.tools(message.pop("tools", None), "tools")):
            found[f"messages[{number}].tools"] = made
    if len(found) > 1:
        raise ValueError(f"field `{min(found)}` stands beside `{max(found)}`: leave one of them out")
    return next(iter(found.values()), None)


def _check_turns(messages: list[Message], field: str, asked: bool) -> None:
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    if not asked and not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError(f"field `{field}` has no assistant turn to learn from")
    if not turns:
        raise ValueError(f"field `{field}` has no turn")
    if turns[0]["role"] != "user":
        raise ValueError(f"field `{field}`: the first turn is the {turns[0]['role']}'s, but the user's is expected")
    for number, message in enumerate(messages):
        needs_content = message["role"] in ("user", "assistant") and not message.get("tool_calls")
        if needs_content and not message["content"].strip():
            raise ValueError(f"field `{field}`: turn {number + 1}, the {message['role']}'s, is empty")


SHAPES: dict[tuple[str, ...], Callable[[Fields, str], Conversation]] = {
    ("messages",): _chat("messages", _messages("messages")),
    ("conversations",): _chat("conversations", _messages("conversations")),
    ("prompt", "completion"): _chat("prompt+completion", _prompt_completion, _prompt_turns),
    ("instruction", "output"): _chat("instruction+output", _instruction),
    ("question", "answer"): _chat("question+answer", partial(_pair, "question", "answer")),
    ("query", "response"): _chat("query+response", partial(_pair, "query", "response")),
    ("text",): plain_text,
}
"""Fields that a shape needs -> what makes a conversation of a row that has them; the first that fits is taken."""

ASKED: dict[tuple[str, ...], Callable[[Fields, str], Conversation]] = {
    ("messages",): _chat("messages", _messages("messages"), asked=True),
    ("conversations",): _chat("conversations", _messages("conversations"), asked=True),
    ("prompt",): _chat("prompt", partial(_asked, "prompt"), asked=True),
    ("instruction",): _chat("instruction", _instructed, asked=True),
    ("question",): _chat("question", partial(_asked, "question"), asked=True),
    ("query",): _chat("query", partial(_asked, "query"), asked=True),
}
"""The same of chats that may want an answer."""
