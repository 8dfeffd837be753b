"""An assistant's reasoning: in a field of its own, or between tags at the beginning of what it says."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_text", "thoughts")
"""Names under which a message carries its reasoning."""

TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
}
"""Tags around reasoning that stands in the text."""

_SIGNS = tuple({tag[0] for tag in (*TAGS, *TAGS.values())})
_OPENED = "|".join(re.escape(tag) for tag in TAGS)
_CLOSED = "|".join(re.escape(tag) for tag in TAGS.values())
_BLOCK = re.compile(rf"\s*(?:(?P<open>{_OPENED})\s*)?(?P<reasoning>.*?)(?P<close>\s*(?:{_CLOSED})\s*)", re.DOTALL)
_OPENER = re.compile(rf"(?:{_OPENED})\s*$")
_LEFT = re.compile(rf"(?:{_OPENED})?\s*$")
_RIGHT = re.compile(rf"\s*(?:{_CLOSED})\s*")


class Parts(NamedTuple):
    """What an assistant says, taken apart.

    Attributes:
        opened: The tag that opens its reasoning and white space around that; "" where there is none.
        reasoning: The reasoning itself, or "".
        closed: The tag that closes it, with white space; "" where there is none.
        answer: The rest.
    """

    opened: str
    reasoning: str
    closed: str
    answer: str


def apart(content: str) -> Parts:
    """The parts of a turn's content; reasoning may lack its opening tag, as the prompt may have written that.

    Raises:
        ValueError: A tag at the beginning is not closed.
    """
    if not any(sign in content for sign in _SIGNS):
        return Parts("", "", "", content)
    found = _BLOCK.match(content)
    if found is None:
        if opened := re.match(rf"\s*(?:{_OPENED})", content):
            raise ValueError(f"opens {opened[0].strip()} and does not close it")
        return Parts("", "", "", content)
    begin = found.start("reasoning")
    return Parts(content[:begin], found["reasoning"], found["close"], content[found.end() :])


def take(message: dict[str, Any], field: str) -> str | None:
    """The reasoning that a message carries in a field, which is taken out of it.

    Raises:
        ValueError: It is no text, or there are several that differ.
    """
    found = {name: value for name in FIELDS if (value := message.pop(name, None)) is not None and value != ""}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"field `{field}.{name}` is text, but this is {type(value).__name__}")
    if len(set(found.values())) > 1:
        raise ValueError(f"field `{field}` carries different reasoning in {', '.join(found)}")
    return next(iter(found.values()), None)


def opener(prompt: str) -> str:
    """The tag, with white space, by which a prompt already begins the reasoning; "" if it does not."""
    found = _OPENER.search(prompt)
    return found[0] if found else ""


def close(opened: str) -> str:
    """What ends reasoning that a prompt has begun so, before the answer."""
    tag = TAGS[opened.strip()]
    return f"\n{tag}\n\n" if opened.endswith("\n") else tag


def without_empty(text: str) -> str:
    """The text without tags at its beginning that hold no reasoning."""
    return re.sub(rf"^\s*(?:{_OPENED})?\s*(?:{_CLOSED})\s*", "", text)


def place(text: str, reasoning: str) -> tuple[int, int] | None:
    """Where the reasoning stands in what an assistant writes, its tags and the white space around them included.

    Returns:
        Characters (begin, end), or None if it is not there.
    """
    at = text.find(reasoning.strip())
    if at < 0:
        return None
    left = _LEFT.search(text, 0, at)
    right = _RIGHT.match(text, at + len(reasoning.strip()))
    return left.start() if left else at, right.end() if right else at + len(reasoning.strip())
