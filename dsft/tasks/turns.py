"""An assistant's turn in the rendering that the model sees when it has to write it.

Many templates write history in another way than the turn at hand: they drop the reasoning of earlier turns, or end the
last turn differently. So each turn is looked at with itself as the last one, behind the prompt for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsft.tasks import reasoning
from dsft.tasks.calls import Message
from dsft.tasks.template import ChatTemplate, Span, special_at

Options = tuple[tuple[str, Any], ...]
THINKING: Options = (("enable_thinking", True), ("thinking", True))
NOT_THINKING: Options = (("enable_thinking", False), ("thinking", False))
"""Variables by which chat templates choose between answering with and without reasoning, under both usual names."""

CONTEXT = 40
"""Characters shown on either side of the place where two renderings part."""


@dataclass(frozen=True)
class Form:
    """How messages are handed to a template, as templates differ in it.

    Attributes:
        reasoning: The field that reasoning goes in.
        arguments_as_text: Whether a call's arguments are JSON text, and no object.
        null: Whether a turn that is nothing but calls has None for its content, and no empty text.
        ids: Whose ids the calls have: `given` (the record's, or none), `functions` (`functions.NAME:0`, counted
            through the conversation), or `digits` (nine of them).
    """

    reasoning: str = "reasoning_content"
    arguments_as_text: bool = False
    null: bool = True
    ids: str = "given"

    def messages(self, messages: Iterable[Message]) -> list[Message]:
        """The messages in this form."""
        made: list[Message] = []
        count, unanswered, renamed = 0, list[str](), dict[str, str]()
        for message in map(dict, messages):
            if thought := message.pop("reasoning_content", None):
                message[self.reasoning] = thought
            if message["content"] is None and not self.null:
                message["content"] = ""
            if found := message.get("tool_calls"):
                message["tool_calls"] = [self._call(call, count + n) for n, call in enumerate(found)]
                if self.ids != "given":
                    unanswered = [call["id"] for call in message["tool_calls"]]
                    renamed |= {old["id"]: new for old, new in zip(found, unanswered) if "id" in old}
                count += len(found)
            if message["role"] == "tool" and self.ids != "given":
                given = renamed.get(message.get("tool_call_id", ""))
                message["tool_call_id"] = given or (unanswered[0] if unanswered else "")
                unanswered = [one for one in unanswered if one != message["tool_call_id"]]
            made.append(message)
        return made

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        function = dict(call["function"])
        if self.arguments_as_text:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        identity = {"functions": f"functions.{function['name']}:{number}", "digits": f"{number:09d}"}.get(self.ids)
        return {**call, "function": function} | ({"id": identity} if identity else {})


@dataclass(frozen=True)
class Mode:
    """How a turn is rendered.

    Attributes:
        options: Variables of the template.
        composed: Whether the turn is put together here: behind a prompt that opens reasoning, where the template itself
            leaves reasoning out.
    """

    options: Options = ()
    composed: bool = False


MODES = {
    True: (Mode(), Mode(THINKING), Mode(composed=True), Mode(THINKING, composed=True)),
    False: (Mode(), Mode(NOT_THINKING), Mode(composed=True)),
}
"""By whether a turn has reasoning: modes, of which the first that shows all of the turn is taken."""


@dataclass(frozen=True)
class Passage:
    """A turn of the assistant where the model has to write it.

    Attributes:
        turn: Its number among the messages.
        text: The conversation up to its end.
        begin: Where in it the prompt ends, and the assistant writes.
        spans: What is learnt of it.
    """

    turn: int
    text: str
    begin: int
    spans: tuple[Span, ...]

    @property
    def end(self) -> int:
        """The end of what is learnt."""
        return max((end for _, end in self.spans), default=self.begin)


@dataclass(frozen=True)
class Writer:
    """Renders the turns of one conversation.

    Attributes:
        template: The chat template.
        messages: In the form that the template wants.
        tools: Tool definitions.
        specials: Texts of special tokens.
        turn_end: The one that ends a turn.
    """

    template: ChatTemplate
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    specials: tuple[str, ...]
    turn_end: str | None

    def whole(self) -> str:
        """All messages."""
        return self.template.write(self.messages, self.tools)[0]

    def passage(self, turn: int, mode: Mode, thought: str | None) -> Passage:
        """The passage of a turn.

        Args:
            turn: Its number.
            mode: How.
            thought: Its reasoning, if it has any.

        Raises:
            ValueError: The template refuses the conversation, or the turn does not begin with the prompt for it.
        """
        text, marks = self.template.write(self.messages[: turn + 1], self.tools, options=mode.options)
        if self.template.marks:
            before, earlier = self.template.write(self.messages[:turn], self.tools, options=mode.options)
            own = marks[len(earlier) :]
            end = special_at(text, own[-1][1], self.specials) if own else ""
            return Passage(turn, text, _common(before, text), tuple(self._closed(text, mark, end) for mark in own))
        prompt, _ = self.template.write(self.messages[:turn], self.tools, prompt=True, options=mode.options)
        if mode.composed:
            text = _composed(prompt, text, thought, self.messages[turn])
        if not text.startswith(prompt):
            raise ValueError(_where_they_part(f"prompt for turn {turn + 1}", prompt, f"up to turn {turn + 1}", text))
        return Passage(turn, text, len(prompt), (self._closed(text, (len(prompt), len(text)), ""),))

    def _closed(self, text: str, span: Span, end: str) -> Span:
        """The span from its first character to the end token of the turn, and no further."""
        begin, body = span[0], text[slice(*span)].rstrip()
        if not body.endswith(self.specials):
            return (begin, span[1] + len(end)) if text.startswith(end, span[1]) else span
        # some templates write a further token behind the last turn alone; no model has to write that
        stop, rest = len(body), body
        while last := next((special for special in self.specials if rest.endswith(special)), None):
            if last == self.turn_end:
                stop = len(rest)
            rest = rest[: -len(last)].rstrip()
        return begin, begin + stop


def _composed(prompt: str, text: str, thought: str | None, message: Message) -> str:
    """The turn behind a prompt that opens reasoning, where the template does not write that; else the text as it is."""
    opened = reasoning.opener(prompt)
    header = prompt[: len(prompt) - len(opened)]
    if not opened or not text.startswith(header):
        return text
    rest = text[len(header) :]
    if thought and thought.strip() in rest:
        begin = rest[: len(rest) - len(rest.lstrip()) + len(opened.strip())]
        return prompt + rest[len(reasoning.opener(begin)) :].lstrip("\n")
    parts = reasoning.apart(message["content"] or "") if thought else reasoning.Parts("", "", "", "")
    inside = parts.reasoning if parts.closed else (thought or "").strip("\n")
    closed = parts.closed or reasoning.close(opened)
    return prompt + inside + closed + reasoning.without_empty(rest).lstrip("\n")


def grouped(passages: list[Passage]) -> list[list[Passage]]:
    """Passages that stand, each up to its end, in the text of the last one of their group; in order."""
    groups = []
    left = list(passages)
    while left:
        last = left[-1]
        fitting = [one for one in left if last.text[: one.end] == one.text[: one.end]]
        groups.append(fitting)
        left = [one for one in left if one not in fitting]
    return groups[::-1]


def rewriting(earlier: Passage, later: Passage) -> str:
    """Says where the rendering of an earlier turn parts from how a later one has it in its history."""
    names = f"up to turn {earlier.turn + 1}", f"up to turn {later.turn + 1}"
    return _where_they_part(names[0], earlier.text[: earlier.end], names[1], later.text)


def _common(left: str, right: str) -> int:
    """Characters that two texts have in common at the beginning."""
    parting = (i for i, (a, b) in enumerate(zip(left, right)) if a != b)
    return next(parting, min(len(left), len(right)))


def _where_they_part(part: str, piece: str, whole: str, text: str) -> str:
    at = _common(piece, text)
    around = slice(max(0, at - CONTEXT), at + CONTEXT)
    width = max(len(part), len(whole)) + 1
    return (
        f"the chat template writes a conversation differently when it goes on. They part at character {at}:\n"
        f"  {part + ':':<{width}} {piece[around]!r}\n  {whole + ':':<{width}} {text[around]!r}"
    )
