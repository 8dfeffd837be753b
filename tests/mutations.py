"""Records as people have them, and random damage to them: types, nesting, encodings, fields, roles, numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

RICH = (  # a template that writes all that a conversation can have, and drops the reasoning of earlier turns
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\\n' }}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{% if m.content is not none %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气 of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 3}}}

CORPUS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the red fox"},
                  {"role": "assistant", "content": "the owl", "weight": 0.5}, {"role": "user", "content": "月亮在哪里"},
                  {"role": "assistant", "content": "在山上 。"}], "id": 7, "source": "web"},
    {"messages": [{"role": "user", "content": "北京?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "c1", "content": "晴"}, {"role": "assistant", "content": "晴天 。"}],
     "tools": [TOOL]},
    {"messages": [{"role": "user", "content": "where?"},
                  {"role": "assistant", "content": "",
                   "function_call": {"name": "weather", "arguments": '{"city": "a"}'}},
                  {"role": "function", "name": "weather", "content": "sun"}, {"role": "assistant", "content": "sunny"}],
     "functions": [TOOL["function"]], "weight": 2},
    {"messages": [{"role": "user", "content": "why?"},
                  {"role": "assistant", "reasoning_content": "think of it", "content": "because", "loss_weight": 0.3}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
                  {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
                  {"role": "assistant", "content": "no", "train": False}, {"role": "user", "content": "d"},
                  {"role": "assistant", "content": "e"}]},
    {"conversations": [{"from": "human", "value": "春天来了"}, {"from": "gpt", "value": "花都开了"},
                       {"from": "human", "value": "the hill"}, {"from": "gpt", "value": "the moon"}],
     "system": "简短回答", "tools": json.dumps([TOOL], ensure_ascii=False)},
    {"prompt": "where is the moon", "completion": "over the hill", "sample_weight": 0.7},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}],
     "completion": [{"role": "assistant", "content": "d"}], "source": "x"},
    {"instruction": "Translate .", "input": "the fox", "output": "狐狸", "history": [["hi", "你好"], ["bye", "再见"]]},
    {"text": "the red fox sees a blue bird . 春天来了 , 花都开了 。", "weight": 1.5, "id": "t1"},
]  # fmt: skip

Path = tuple[Any, ...]
PLAIN = {"id", "source", "tool_call_id", "type", "timestamp"}
"""Keys whose value says nothing to a model, or nothing but what kind of thing stands beside it."""

EXTRA = ("timestamp", "note", "url", "lang", "score")


def nodes(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything inside a record, with the keys and numbers that lead to it."""
    if path:
        yield path, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from nodes(one, (*path, key))


def at(record: Any, path: Path) -> Any:
    for key in path:
        record = record[key]
    return record


Change = Callable[[np.random.Generator, Any, Any], Any]
"""(random, what holds the value, its key) -> changes it in place; raises Unfit where that makes no sense."""


class Unfit(Exception):
    """A mutation that does not apply to this place."""


def _need(condition: bool) -> None:
    if not condition:
        raise Unfit


def _drop(random, holder, key) -> None:
    del holder[key]


def _rename(random, holder, key) -> None:
    _need(isinstance(holder, dict))
    holder[f"{key}_x"] = holder.pop(key)


def _set(make: Callable[[np.random.Generator, Any], Any]) -> Change:
    def change(random, holder, key) -> None:
        holder[key] = make(random, holder[key])

    return change


def _other_type(random, value) -> Any:
    others = [7, 2.5, True, "seven", ["seven"], {"seven": 7}]
    return others[int(random.integers(len(others)))]


def _longer(random, value) -> Any:
    _need(isinstance(value, str) and value.strip() != "")
    return value + " fox"


def _swap(random, holder, key) -> None:
    _need(isinstance(holder, list) and len(holder) > 1)
    other = (key + 1) % len(holder)
    _need(holder[key] != holder[other])
    holder[key], holder[other] = holder[other], holder[key]


def _repeat(random, holder, key) -> None:
    _need(isinstance(holder, list))
    holder.insert(key, copy.deepcopy(holder[key]))


def _add(random, holder, key) -> None:
    _need(isinstance(holder[key], dict) or isinstance(holder, dict))
    inside = holder[key] if isinstance(holder[key], dict) else holder
    inside[str(random.choice(EXTRA))] = "extra"


def _number(random, value) -> Any:
    _need(isinstance(value, int | float) and not isinstance(value, bool))
    numbers = [-1, 1e300, float("nan"), float("inf"), 10**400, -0.5, value + 0.25]
    return numbers[int(random.integers(len(numbers)))]


def _role(random, value) -> Any:
    roles = ("user", "assistant", "system", "tool", "human", "gpt", "narrator", "")
    _need(value in ("user", "assistant", "system", "tool", "function", "human", "gpt"))
    return str(random.choice(roles))


def _surrogate(random, value) -> Any:
    _need(isinstance(value, str) and value != "")
    return value[:1] + "\ud83d" + value[1:]


def _deep(random, value) -> Any:
    for _ in range(60):
        value = [value]
    return value


CHANGES: dict[str, Change] = {
    "removed": _drop,
    "renamed": _rename,
    "null": _set(lambda random, value: None),
    "other type": _set(_other_type),
    "in a list": _set(lambda random, value: [value]),
    "in an object": _set(lambda random, value: {"value": value}),
    "nested 60 deep": _set(_deep),
    "emptied": _set(lambda random, value: type(value)() if isinstance(value, str | list | dict) else 0),
    "longer": _set(_longer),
    "swapped": _swap,
    "repeated": _repeat,
    "a field added": _add,
    "an absurd number": _set(_number),
    "another role": _set(_role),
    "half a character": _set(_surrogate),
}
"""What is done to one place of a record."""

BYTES: dict[str, Callable[[np.random.Generator, bytes], bytes]] = {
    "truncated": lambda random, line: line[: int(random.integers(1, len(line)))],
    "in GB18030": lambda random, line: line.decode().encode("gb18030"),
    "in UTF-16": lambda random, line: line.decode().encode("utf-16-le").replace(b"\n", b"-"),
    "a byte flipped": lambda random, line: _flipped(line, int(random.integers(len(line)))),
    "a key twice": lambda random, line: b'{"text": "a", "text": "b", ' + line[1:],
    "nested 100,000 deep": lambda random, line: b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of 10,000 digits": lambda random, line: b'{"text": "a", "weight": ' + b"9" * 10_000 + b"}",
    "a comma too many": lambda random, line: line[:-1] + b",}",
    "a NUL": lambda random, line: line[:9] + b"\0" + line[9:],
}  # fmt: skip
"""What is done to a record's line."""


def _flipped(line: bytes, place: int) -> bytes:
    """A line with one byte of it changed to what ends no line."""
    changed = line[place] ^ 0x40
    return line[:place] + bytes([changed if changed not in b"\r\n" else 0x7F]) + line[place + 1 :]


def mutated(random: np.random.Generator) -> tuple[str, Path, dict[str, Any], bytes]:
    """A record of the corpus and its damaged line: what was done, where, the record before, the line."""
    original = CORPUS[int(random.integers(len(CORPUS)))]
    line = json.dumps(original, ensure_ascii=False).encode()
    if random.random() < 0.15:
        name = str(random.choice(list(BYTES)))
        return name, (), original, BYTES[name](random, line)
    while True:
        record = copy.deepcopy(original)
        places = [path for path, _ in nodes(record)]
        path = places[int(random.integers(len(places)))]
        name = str(random.choice(list(CHANGES)))
        try:
            CHANGES[name](random, at(record, path[:-1]), path[-1])
        except Unfit:
            continue
        if record != original:
            return name, path, original, json.dumps(record).encode()
