"""Content that is not text is refused by name, and what only looks like it is not."""

import pytest
from tiny import conversation

from dsft.data.sources import BadRecord

USER, ASSISTANT = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}


def chat(content):
    return {"messages": [{"role": "user", "content": content}, ASSISTANT]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "field `images`"),
        ({"messages": [USER, ASSISTANT], "image": {"bytes": "00"}}, "field `image`"),
        ({"text": "a", "audio": "a.wav"}, "field `audio`"),
        ({"instruction": "a", "output": "b", "videos": ["a"]}, "field `videos`"),
        ({"messages": [USER | {"images": ["a"]}, ASSISTANT]}, r"field `messages\[0\]\.images`"),
        (
            chat([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]),
            r"content\[1\]` is a part .* image_url",
        ),
        (chat([{"type": "input_audio"}]), r"content\[0\]` is a part that is not text: input_audio"),
        (chat("<image>\nWhat is this?"), r"`messages\[0\]\.content` holds <image>"),
        (chat("<|vision_start|><|image_pad|><|vision_end|>这是什么?"), r"holds <\|vision_start\|>"),
        (chat("[IMG] what?"), r"holds \[IMG\]"),
        ({"prompt": "<audio> what?", "completion": "b"}, "field `prompt` holds <audio>"),
        ({"instruction": "<video>", "output": "b"}, "holds <video>"),
    ],
)
def test_it_is_refused_by_name(fields, named):
    with pytest.raises(BadRecord, match=named):
        conversation(fields, "f.jsonl:1")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT], "images": [], "image": None, "video": ""},
        chat("How does <video src='a'></video> work?"),
        chat("<audio>\n<source src='a.ogg'>\n</audio>"),
        chat("an <img> and an image"),
        chat([{"type": "text", "text": "你"}, {"type": "input_text", "text": "好"}]),
    ],
)
def test_what_is_text_is_not(fields):
    assert conversation(fields, "f.jsonl:1").messages
