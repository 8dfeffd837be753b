"""Tool calls, tool results and tool definitions, in the one form that the rest works with (OpenAI's newer one)."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


FRAME = ("id", "type", "index")
"""What stands around the function of a call."""


def calling(message: Message, field: str) -> Message:
    """The message with its calls as `tool_calls`, each wrapped in `function`, its arguments an object.

    `function_call`, the older form of one call, becomes the newer one.

    Raises:
        ValueError: A call has no name, or arguments that are no object; the message names the field.
    """
    message = dict(message)
    calls, older = message.pop("tool_calls", None), message.pop("function_call", None)
    if calls and older:
        raise ValueError(f"field `{field}` has both tool_calls and function_call, the older form of the same")
    if not calls and not older:
        return message
    name = "tool_calls" if calls else "function_call"
    calls = from_json(calls or older, f"{field}.{name}")
    made = [_call(call, f"{field}.{name}[{n}]") for n, call in enumerate(calls if isinstance(calls, list) else [calls])]
    return message | {"tool_calls": made}


def _call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"field `{field}` is not an object with a function's name")
    given: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
    arguments = from_json(given, f"{field}.arguments") if given != "" else {}
    if not isinstance(arguments, dict):
        raise ValueError(f"field `{field}.arguments` is an object, but this is {type(arguments).__name__}")
    frame = {key: one for key, one in call.items() if (key in FRAME or "function" in call) and one is not None}
    _refuse_no_text(frame.get("id"), f"{field}.id")
    rest = {
        key: one for key, one in function.items() if key != "parameters" and (key not in FRAME or function is not call)
    }
    return {"type": "function"} | frame | {"function": rest | {"arguments": arguments}}


def extra(messages: list[Message]) -> set[str]:
    """Fields of calls beyond those that make a call."""
    made = [call for message in messages for call in message.get("tool_calls", [])]
    outside = {key for call in made for key in call if key not in (*FRAME, "function")}
    return outside | {key for call in made for key in call["function"] if key not in ("name", "arguments")}


def _refuse_no_text(identity: Any, field: str) -> None:
    if identity is not None and not isinstance(identity, str):
        raise ValueError(f"field `{field}` is text, but this is {type(identity).__name__}")


def paired(messages: list[Message], field: str) -> list[Message]:
    """The messages with every tool result behind its call: in the calls' order, with its tool's name.

    Results say by `tool_call_id` which call they answer; without, they are in order.

    Raises:
        ValueError: A result answers no call; the message names the field.
    """
    made: list[Message] = []
    calls: list[dict[str, Any]] = []
    results: list[tuple[int, Message]] = []
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            results.append((number, message))
            continue
        made += _ordered(results, calls, field)
        results = []
        if message.get("tool_calls") or message["role"] == "user":
            calls = message.get("tool_calls") or []
        made.append(message)
    return made + _ordered(results, calls, field)


def _ordered(results: list[tuple[int, Message]], calls: list[dict[str, Any]], field: str) -> list[Message]:
    for number, result in results:
        _refuse_no_text(result.get("tool_call_id"), f"{field}[{number}].tool_call_id")
    if calls and len(results) == len(calls) and not any("id" in call for call in calls):
        for call, (_, result) in zip(calls, results):
            if isinstance(result.get("tool_call_id"), str):
                call["id"] = result["tool_call_id"]
    places = {call["id"]: place for place, call in enumerate(calls) if "id" in call}
    ranked = []
    for rank, (number, result) in enumerate(results):
        identity = result.get("tool_call_id")
        if identity is not None and places and identity not in places:
            raise ValueError(
                f"field `{field}[{number}].tool_call_id` is {identity!r}, and the calls before are {', '.join(places)}"
            )
        place = places.get(identity, rank)
        name = {"name": calls[place]["function"]["name"]} if "name" not in result and place < len(calls) else {}
        ranked.append((place, name | result))
    return [result for _, result in sorted(ranked, key=lambda pair: pair[0])]


def tools(value: Any, field: str) -> list[dict[str, Any]] | None:
    """Tool definitions, each wrapped in `function`; None if there are none.

    Raises:
        ValueError: They are no list of objects with a name.
    """
    found = from_json(value, field) if value else None
    if not found:
        return None
    if not isinstance(found, list):
        raise ValueError(f"field `{field}` is a list of objects")
    made = []
    for number, tool in enumerate(found):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"field `{field}[{number}]` is not an object with a function's name")
        made.append(tool if "function" in tool else {"type": "function", "function": tool})
    return made


def from_json(value: Any, field: str) -> Any:
    """What a string holds as JSON; anything else as it is.

    Raises:
        ValueError: It holds no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"field `{field}` is a string, but not JSON: {error}") from error
