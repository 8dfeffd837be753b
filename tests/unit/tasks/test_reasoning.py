"""Reasoning in fields and between tags: taken apart, found again, closed."""

import pytest

from dsft.tasks import reasoning


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("yes", ("", "", "", "yes")),
        ("<think>\nhm\n</think>\n\nyes", ("<think>\n", "hm", "\n</think>\n\n", "yes")),
        ("<think>hm</think>yes", ("<think>", "hm", "</think>", "yes")),
        ("hm\n</think>\nyes", ("", "hm", "\n</think>\n", "yes")),
        ("<think>\n\n</think>\n\n好", ("<think>\n\n", "", "</think>\n\n", "好")),
        ("[THINK]嗯[/THINK]好", ("[THINK]", "嗯", "[/THINK]", "好")),
        ("◁think▷嗯◁/think▷好", ("◁think▷", "嗯", "◁/think▷", "好")),
    ],
)
def test_content_is_taken_apart_without_loss(content, parts):
    assert reasoning.apart(content) == parts
    assert "".join(parts) == content


def test_a_tag_that_is_not_closed_is_an_error():
    with pytest.raises(ValueError, match="opens <think> and does not close it"):
        reasoning.apart(" <think> hm")
    assert reasoning.apart("what does <think> mean?").answer == "what does <think> mean?"


def test_fields_are_taken_out_of_the_message():
    message = {"role": "assistant", "thinking": "hm", "reasoning": None, "content": "yes"}
    assert reasoning.take(message, "m") == "hm"
    assert message == {"role": "assistant", "content": "yes"}
    with pytest.raises(ValueError, match=r"`m\.reasoning` is text, but this is list"):
        reasoning.take({"reasoning": ["a"]}, "m")
    with pytest.raises(ValueError, match="different reasoning in reasoning_content, thinking"):
        reasoning.take({"reasoning_content": "a", "thinking": "b"}, "m")
    assert reasoning.take({"reasoning_content": "a", "thinking": "a"}, "m") == "a"


@pytest.mark.parametrize(
    ("text", "thought", "found"),
    [
        ("<think>\nhm\n</think>\n\nyes", "hm", "<think>\nhm\n</think>\n\n"),
        ("hm</think>yes", "hm", "hm</think>"),
        ("first [THINK]hm[/THINK] yes", "hm", "[THINK]hm[/THINK] "),
        ("<|channel|>analysis<|message|>hm<|end|>yes", "hm", "hm"),
    ],
)
def test_it_is_found_with_its_tags(text, thought, found):
    begin, end = reasoning.place(text, thought)
    assert text[begin:end] == found
    assert reasoning.place(text, "nowhere") is None


def test_what_a_prompt_opens_is_closed_in_its_own_manner():
    assert reasoning.opener("user\nassistant\n<think>\n") == "<think>\n"
    assert reasoning.opener("<think>\nhm") == ""
    assert reasoning.close("<think>\n") == "\n</think>\n\n"
    assert reasoning.close("[THINK]") == "[/THINK]"
    assert reasoning.without_empty("<think>\n\n</think>\n\nyes") == reasoning.without_empty("</think>yes") == "yes"
