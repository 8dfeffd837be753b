"""How a chat template wants a conversation, found out by what becomes of markers in all of its fields.

A field that a template does not write would vanish without a word: the model would learn to answer nothing where it
should call a tool. So every text, name, argument and definition is replaced by a marker, the conversation is rendered,
and each marker must be where it belongs. What is found out holds for all conversations of the same structure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from dsft.tasks import reasoning
from dsft.tasks.calls import Message
from dsft.tasks.conversation import Conversation
from dsft.tasks.template import ChatTemplate
from dsft.tasks.turns import MODES, Form, Mode, Passage, Writer

ARGUMENTS = 4
"""Arguments of a call, and properties of a tool, that are looked at."""


@dataclass(frozen=True)
class Manner:
    """How conversations of one structure are rendered.

    Attributes:
        form: How messages are handed to the template.
        modes: How each turn that is learnt is rendered, by its number.
        missing: Fields that do not appear where they belong, whatever is tried.
        problem: Why no turn could be rendered at all, or "".
    """

    form: Form
    modes: dict[int, Mode]
    missing: tuple[str, ...]
    problem: str = ""


def manner(conversation: Conversation, writer: Writer, turns: list[int]) -> Manner:
    """How a conversation is to be rendered.

    Args:
        conversation: Any.
        writer: Its template and what goes with that.
        turns: The assistant's turns that are learnt.
    """
    marked = _Marked(conversation)
    structure = json.dumps([marked.messages, marked.tools, marked.fields, marked.thoughts], ensure_ascii=False)
    return _manner(structure, writer.template, writer.specials, writer.turn_end, tuple(turns))


class _Marked:
    """A conversation with a marker in place of everything that it says.

    Attributes:
        messages: Its turns.
        tools: Its tool definitions, or None.
        fields: Marker -> (field, number of its message; -1 for tools; whether it is reasoning).
        thoughts: Each turn's reasoning, or None.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.fields: dict[str, tuple[str, int, bool]] = {}
        self.thoughts: list[str | None] = []
        self._identities: dict[str, int] = {}
        self.messages = [self._message(message, number) for number, message in enumerate(conversation.messages)]
        tools = conversation.tools
        self.tools = [self._tool(tool) for tool in tools[:2]] if tools else None

    def _marker(self, field: str, number: int, thought: bool = False) -> str:
        """A new marker; `zq1qz` is part of no other."""
        marker = f"zq{len(self.fields)}qz"
        self.fields[marker] = (field, number, thought)
        return marker

    def _message(self, message: Message, number: int) -> Message:
        place = f"messages[{number}]"
        made = {key: message[key] for key in ("role", "content", "reasoning_content", "tool_calls") if key in message}
        assistant = message["role"] == "assistant"
        thought = None
        if "reasoning_content" in made:
            made["reasoning_content"] = thought = self._marker(f"{place}.reasoning_content", number, thought=True)
        content = made["content"]
        if content and content.strip():
            parts = reasoning.apart(content) if assistant else reasoning.Parts("", "", "", content)
            inside = ""
            if parts.closed and parts.reasoning.strip():
                inside = thought = self._marker(f"{place}.content", number, thought=True)
            answer = self._marker(f"{place}.content", number) if parts.answer.strip() else ""
            made["content"] = parts.opened + inside + parts.closed + answer
        if "tool_calls" in made:
            made["tool_calls"] = [
                self._call(call, f"{place}.tool_calls[{n}]", number) for n, call in enumerate(made["tool_calls"])
            ]
        self.thoughts.append(thought)
        identity = {"tool_call_id": self._identity(message["tool_call_id"])} if "tool_call_id" in message else {}
        return made | identity | ({"name": "name"} if "name" in message else {})

    def _identity(self, given: Any) -> str:
        """An id of the same length; some templates insist on it."""
        number = self._identities.setdefault(str(given), len(self._identities))
        return f"{number:0{len(str(given))}d}"

    def _call(self, call: dict[str, Any], place: str, number: int) -> dict[str, Any]:
        given = call["function"]["arguments"]
        arguments = {
            self._marker(f"{place}.arguments", number): self._value(value, f"{place}.arguments", number)
            for value in list(given.values())[:ARGUMENTS]
        }
        identity = {"id": self._identity(call["id"])} if "id" in call else {}
        function = {"name": self._marker(f"{place}.name", number), "arguments": arguments}
        return identity | {"type": "function", "function": function}

    def _value(self, value: Any, place: str, number: int) -> Any:
        if isinstance(value, str):
            return self._marker(place, number)
        if isinstance(value, list):
            return [self._marker(place, number)] if value else []
        if isinstance(value, dict):
            return {self._marker(place, number): 1} if value else {}
        return type(value)(1) if value is not None else None

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = tool["function"]
        made = {**function, "name": self._marker("tools.name", -1)}
        if isinstance(function.get("description"), str) and function["description"]:
            made["description"] = self._marker("tools.description", -1)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict) and properties:
            names = [self._marker("tools.parameters", -1) for _ in list(properties)[:ARGUMENTS]]
            described = {name: {"type": "string", "description": "of it"} for name in names}
            made["parameters"] = {"type": "object", "properties": described, "required": []}
        kept = {key: made[key] for key in ("name", "description", "parameters") if key in made}
        return {"type": "function", "function": kept}


@lru_cache(maxsize=4096)
def _manner(
    structure: str, template: ChatTemplate, specials: tuple[str, ...], turn_end: str | None, turns: tuple[int, ...]
) -> Manner:
    messages, tools, fields, thoughts = json.loads(structure)
    best: Manner | None = None
    for form in _forms(messages):
        writer = Writer(template, form.messages(messages), tools, specials, turn_end)
        found = _tried(writer, form, fields, thoughts, turns)
        if not found.missing and not found.problem:
            return found
        if best is None or (bool(found.problem), len(found.missing)) < (bool(best.problem), len(best.missing)):
            best = found
    assert best is not None, "there is always a form"
    return best


def _forms(messages: list[Message]) -> Iterator[Form]:
    """Forms in which these messages may be handed to a template, the usual one first."""
    thinks = any("reasoning_content" in message for message in messages)
    calls = any("tool_calls" in message for message in messages)
    null = any(message["content"] is None for message in messages)
    for ids, empty, text, name in product(
        ("given", "functions", "digits") if calls else ("given",),
        (True, False) if null else (True,),
        (False, True) if calls else (False,),
        ("reasoning_content", "reasoning", "thinking") if thinks else ("reasoning_content",),
    ):
        yield Form(name, text, empty, ids)


def _tried(
    writer: Writer, form: Form, fields: dict[str, Any], thoughts: list[str | None], turns: tuple[int, ...]
) -> Manner:
    """What comes of one form."""
    modes: dict[int, Mode] = {}
    missing: list[str] = []
    try:
        for turn in turns:
            modes[turn], lost = _mode(writer, turn, fields, thoughts)
            missing += lost
        missing += _lost_of_whole(writer, form, fields)
    except ValueError as problem:
        return Manner(form, {}, (), str(problem))
    return Manner(form, modes, tuple(dict.fromkeys(missing)))


def _mode(writer: Writer, turn: int, fields: dict[str, Any], thoughts: list[str | None]) -> tuple[Mode, list[str]]:
    """The mode that shows all of a turn, or the most of it, and the fields that it does not show."""
    found: tuple[Mode, list[str]] | None = None
    problem: ValueError | None = None
    for mode in MODES[thoughts[turn] is not None]:
        try:
            passage = writer.passage(turn, mode, thoughts[turn])
        except ValueError as error:
            problem = problem or error
            continue
        lost = _lost(passage, fields)
        if not lost:
            return mode, []
        if found is None or len(lost) < len(found[1]):
            found = mode, lost
    if found is None:
        assert problem is not None, "a mode was tried"
        raise problem
    return found


def _lost(passage: Passage, fields: dict[str, Any]) -> list[str]:
    """Fields whose markers are not where they belong: the turn's own in what the assistant writes, others before it."""
    before, own = passage.text[: passage.begin], passage.text[passage.begin :]
    lost = []
    for marker, (field, number, thought) in fields.items():
        if number == passage.turn:
            lost += [field] if marker not in own or _misquoted(marker, own) else []
        elif number < passage.turn and not thought:
            lost += [field] if marker not in before or _misquoted(marker, before) else []
    return lost


def _misquoted(marker: str, text: str) -> bool:
    """Whether an argument's name stands in Python's notation, or in JSON that was quoted once more as a string."""
    return f"'{marker}':" in text or f'\\"{marker}\\"' in text


def _lost_of_whole(writer: Writer, form: Form, fields: dict[str, Any]) -> list[str]:
    """Fields that the rendering of all messages does not show, but for reasoning, which may be history there."""
    text = writer.whole()
    lost = [field for marker, (field, _, thought) in fields.items() if marker not in text and not thought]
    if form.null and any(message["content"] is None for message in writer.messages):
        empty = [message | {"content": message["content"] or ""} for message in writer.messages]
        if text.count("None") > replace(writer, messages=empty).whole().count("None"):
            lost.append("a content that is null")
    return lost
