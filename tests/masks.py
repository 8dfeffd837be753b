"""What is to be learnt of a conversation, found by a second method that shares no code with dsft.

For each turn of the assistant transformers itself renders the prompt for it and the conversation up to it. What the
second adds to the first, up to the token that ends the turn, is what the model has to write. Tokens are laid over that
by their bytes, which a byte-level vocabulary tells, and not by the offsets that a tokenizer gives.

The templates in `templates/` are written after the properties of real families.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]
TEMPLATES = Path(__file__).parent / "templates"
SPECIALS = (
    "<|begin_of_text|> <|end_of_text|> <|eom_id|> <|constrain|> <｜begin▁of▁sentence｜> <｜▁pad▁｜> "
    "<|im_start|> <|im_end|> <|endoftext|> <s> </s> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> "
    "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> <|start_header_id|> "
    "<|end_header_id|> <|eot_id|> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
    "[TOOL_RESULTS] [/TOOL_RESULTS] <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|system|> "
    "<|observation|> <|end|> [gMASK] <sop> <|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> "
    "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_end|> "
    "<|tool_call_argument_begin|> ]~!b[ ]~b] [e~[ <|start|> <|message|> <|channel|> <|return|> <|call|> "
).split()
WORDS = (
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key> <arg_value> "
    "</arg_value> <minimax:tool_call> </minimax:tool_call>"
).split()
"""Tokens that are added, but not special."""

FIRST = {
    "deepseek_v3": "<｜begin▁of▁sentence｜>",
    "deepseek_r1": "<｜begin▁of▁sentence｜>",
    "deepseek_v31": "<｜begin▁of▁sentence｜>",
    "llama31": "<|begin_of_text|>",
}
"""Families whose text begins with a token of their own."""


def _letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary -> the byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


LETTERS = _letters()


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level, with merges across all boundaries, and the template of a family."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(one, special=True, normalized=False) for one in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answers = ["\n" + turn["content"] + "\n" for turns in CONVERSATIONS.values() for turn in turns if turn["content"]]
    backend.train_from_iterator(answers * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=FIRST.get(name, "<s>"), eos_token="</s>")
    made.add_tokens([AddedToken(one, special=False, normalized=False) for one in WORDS])
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return made


def token_bytes(tokens: PreTrainedTokenizerFast, ids: np.ndarray) -> list[bytes]:
    """What each token stands for."""
    added = tokens.added_tokens_decoder
    return [
        added[int(one)].content.encode()
        if int(one) in added
        else bytes(LETTERS[letter] for letter in tokens.convert_ids_to_tokens(int(one)))
        for one in ids
    ]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **others: Any) -> Message:
    return {"role": "assistant", "content": content, **others}


def call(number: int, city: str) -> dict[str, Any]:
    arguments = {"city": city, "days": number}
    return {"id": f"call_{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def result(number: int, content: str) -> Message:
    return {"role": "tool", "tool_call_id": f"call_{number}", "name": "weather", "content": content}


SYSTEM = {"role": "system", "content": "Be brief. 简短。"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS: dict[str, list[Message]] = {
    "single turn": [user("where is the moon?"), assistant("over the hill.")],
    "many turns": [user("春天"), assistant("花都开了。"), user("and then?"), assistant("夏天来了。"), user("then?"),
                   assistant("秋")],
    "system": [SYSTEM, user("月亮在哪里?"), assistant("在山上。"), user("why?"), assistant("It is late.")],
    "tools": [user("北京?"), assistant(None, tool_calls=[call(1, "北京")]), result(1, "晴"), assistant("晴天。")],
    "parallel calls": [user("both?"), assistant(None, tool_calls=[call(1, "北京"), call(2, "Paris")]), result(1, "晴"),
                       result(2, "rain"), assistant("sun and rain")],
    "reasoning": [user("1+1?"), assistant("2", reasoning_content="one and one"), user("2+2?"),
                  assistant("四", reasoning_content="二加二")],
    "reasoning in one turn": [user("hi"), assistant("hello"), user("2+2?"),
                              assistant("4", reasoning_content="two, two")],
    "think tags": [user("why?"), assistant("<think>\nhm, 想\n</think>\n\nbecause"), user("so?"), assistant("yes.")],
    "merged tokens": [user("a"), assistant(" yes and no"), user("b"), assistant("!? well"), user("c"),
                      assistant("…好")],
    "weights": [user("a"), assistant("not this", weight=0), user("b"), assistant("half of it", weight=0.5), user("c"),
                assistant("all of it")],
}  # fmt: skip


def thought(message: Message) -> str | None:
    """The reasoning of a turn, in its field or between tags."""
    content = message["content"] or ""
    if "</think>" in content:
        return content.partition("</think>")[0].partition("<think>")[2]
    return message.get("reasoning_content")


@dataclass(frozen=True)
class Family:
    """What somebody knows of a family who has read its documentation.

    Attributes:
        end: Tokens that end a turn; none where the turn just ends.
        hand: Messages as its template wants them.
        options: Variables with which a turn's prompt is made, by whether the turn has reasoning.
        write: (prompt, the template's text, reasoning) -> the right text, where the template's own is not.
        refused: Kind of conversation -> what the refusal names.
    """

    end: tuple[str, ...] = ("<|im_end|>",)
    hand: Callable[[list[Message]], list[Message]] = lambda messages: messages
    options: Callable[[bool], dict[str, Any]] = lambda thinks: {}
    write: Callable[[str, str, str | None], str] | None = None
    refused: dict[str, str] = field(default_factory=dict)


def _calls(change: Callable[[dict[str, Any], int], dict[str, Any]]) -> Callable[[list[Message]], list[Message]]:
    def hand(messages: list[Message]) -> list[Message]:
        ids: dict[str, str] = {}
        made = []
        for message in messages:
            calls = [change(one, len(ids) + n) for n, one in enumerate(message.get("tool_calls", []))]
            ids |= {old["id"]: new["id"] for old, new in zip(message.get("tool_calls", []), calls)}
            answers = {"tool_call_id": ids[message["tool_call_id"]]} if "tool_call_id" in message else {}
            made.append(message | ({"tool_calls": calls} if calls else {}) | answers)
        return made

    return hand


def _as_text(one: dict[str, Any], number: int) -> dict[str, Any]:
    arguments = json.dumps(one["function"]["arguments"], ensure_ascii=False)
    return one | {"function": one["function"] | {"arguments": arguments}}


def _r1(prompt: str, text: str, reasoning: str | None) -> str:
    header, opened, _ = prompt.rpartition("<think>\n")
    if not opened:
        return text
    rest = text[len(header) :]
    if reasoning and "想" in reasoning:  # between tags of its own, with the line breaks that stand there
        return prompt + "hm, 想\n</think>\n\n" + rest.lstrip("\n")
    return prompt + (f"{reasoning}\n</think>\n\n" if reasoning else "\n</think>\n\n") + rest


def _v31(prompt: str, text: str, reasoning: str | None) -> str:
    if not reasoning:
        return text
    tail = text[len(prompt) - len("<think>") + len("</think>") :]
    if "想" in reasoning:
        return prompt + "hm, 想\n</think>\n\n" + tail.lstrip("\n")
    return f"{prompt}{reasoning}</think>{tail}"


def _minimax(prompt: str, text: str, reasoning: str | None) -> str:
    if reasoning:
        return text
    return prompt + "\n</think>\n\n" + text[len(prompt) - len("<think>\n") :].lstrip("\n")


TOOLLESS = {"tools": "`tools.name`", "parallel calls": "`tools.name`"}
THOUGHTLESS = dict.fromkeys(("reasoning", "reasoning in one turn"), "reasoning_content`")
DEEPSEEK = ("<｜end▁of▁sentence｜>",)

FAMILIES: dict[str, Family] = {
    "chatml": Family(refused=TOOLLESS | THOUGHTLESS),
    "chatml_marks": Family(refused=TOOLLESS | THOUGHTLESS),
    "qwen3": Family(),
    "qwen3_thinking": Family(),
    "qwen3_coder": Family(refused=THOUGHTLESS),
    "deepseek_v3": Family(DEEPSEEK, _calls(_as_text), refused=THOUGHTLESS),
    "deepseek_r1": Family(DEEPSEEK, _calls(_as_text), write=_r1),
    "deepseek_v31": Family(DEEPSEEK, options=lambda thinks: {"thinking": thinks}, write=_v31, refused=TOOLLESS),
    "nemotron3": Family(options=lambda thinks: {"enable_thinking": thinks}, refused=TOOLLESS),
    "llama31": Family(("<|eot_id|>",), refused=THOUGHTLESS | {"parallel calls": "only supports single tool-calls"}),
    "mistral": Family(("</s>",), _calls(lambda one, number: one | {"id": f"{number:09d}"}), refused=THOUGHTLESS),
    "gemma": Family(("<end_of_turn>",), refused=TOOLLESS | THOUGHTLESS | {"system": "System role not supported"}),
    "phi3": Family(("<|end|>",), refused=TOOLLESS | THOUGHTLESS),
    "glm45": Family(()),
    "kimi_k2": Family(
        hand=_calls(lambda one, number: one | {"id": f"functions.{one['function']['name']}:{number}"}),
        refused=THOUGHTLESS,
    ),
    "minimax_m2": Family(("[e~[",), write=_minimax),
    "harmony": Family(
        ("<|return|>", "<|call|>"),
        lambda messages: [
            {("thinking" if key == "reasoning_content" else key): value for key, value in message.items()}
            for message in messages
        ],
        refused={"parallel calls": "one tool call at a time"},
    ),
}


@dataclass(frozen=True)
class Turn:
    """A turn as it has to be learnt.

    Attributes:
        text: The conversation up to its end, as bytes.
        begin: Where in it the assistant begins to write.
        weight: What its tokens count.
    """

    text: bytes
    begin: int
    weight: float


def turns(name: str, kind: str, tokens: PreTrainedTokenizerFast) -> list[Turn]:
    """What the assistant writes in a conversation, by the second method."""
    family, given = FAMILIES[name], CONVERSATIONS[kind]
    messages = family.hand(given)
    tools = TOOLS if kind in ("tools", "parallel calls") else None
    made = []
    for number, message in enumerate(given):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        reasoning = thought(message)
        # below `apply_chat_template`, which takes out a content that is null: some families test for it
        known = {"tools": tools, "chat_template": tokens.chat_template, **tokens.special_tokens_map}
        options = known | family.options(reasoning is not None)
        prompt = render_jinja_template([messages[:number]], add_generation_prompt=True, **options)[0][0]
        text = render_jinja_template([messages[: number + 1]], **options)[0][0]
        if family.write:
            text = family.write(prompt, text, reasoning)
        assert text.startswith(prompt), (name, kind, prompt, text)
        ends = [text.rindex(end) + len(end) for end in family.end if end in text[len(prompt) :]]
        text = text[: max(ends, default=len(text))]
        made.append(Turn(text.encode(), len(prompt.encode()), message.get("weight", 1.0)))
    return made


def faults(
    found: list[tuple[np.ndarray, np.ndarray]], expected: list[Turn], tokens: PreTrainedTokenizerFast
) -> list[str]:
    """How examples (ids and weights) differ from what has to be learnt; nothing if they do not."""
    wrong = []
    learnt = [0] * len(expected)
    for ids, weights in found:
        pieces = token_bytes(tokens, ids)
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = ends - [len(piece) for piece in pieces]
        whole, right = b"".join(pieces), np.zeros(len(ids))
        for number, turn in enumerate(expected):
            if whole.startswith(turn.text):
                inside = (starts < len(turn.text)) & (ends > turn.begin)
                if (np.asarray(weights)[inside] == np.float32(turn.weight)).all():
                    learnt[number] += 1
                    right[inside] = turn.weight
        if not np.array_equal(right.astype(np.float32), np.asarray(weights)):
            wrong.append(f"in {whole.decode()!r} other tokens count")
    wrong += [f"turn {number} is learnt {times} times" for number, times in enumerate(learnt) if times != 1]
    return wrong
