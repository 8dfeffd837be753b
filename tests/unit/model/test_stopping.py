"""Where answers end: in samples, and in the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from dsft.errors import UserError
from dsft.model.load import resolve
from dsft.model.stopping import find_stopping
from dsft.tasks.template import turn_end

END = tiny.SPECIALS.index("<|im_end|>")
TEXT = tiny.SPECIALS.index("<|endoftext|>")


def with_template(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (tiny.CHATML, END),
        (tiny.CHATML.replace("<|im_end|>\n", " \n<|im_end|><|endoftext|>\n"), END),  # several tokens: the first
        ("{% for m in messages %}{{ m['content'] }}\n### End\n{% endfor %}", None),  # ends in words
        ("{% for m in messages %}{{ m['content'] }}\n### End\n{% endfor %}<|endoftext|>", TEXT),
        ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", None),  # the answer is not found
        ("{{ raise_exception('a system message is needed') }}", None),
        ({"default": tiny.CHATML, "tool_use": "{{ tools }}"}, END),
        (None, None),
    ],
)
def test_the_turns_end_is_the_first_special_token_after_the_answer(template, expected):
    assert turn_end(with_template(template)) == expected


def test_an_end_that_is_added_but_not_called_special_counts():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<end>", "\n\n"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n\n<end>{% endfor %}"
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<end>")


@pytest.fixture
def base(tmp_path) -> Path:
    """A base model: it ends texts with <|endoftext|>, which its template never writes."""
    return tiny.save(tmp_path / "base", eos_token_id=TEXT)


def own(base: Path, **settings) -> bytes:
    content = json.dumps(settings, indent=7).encode()
    (base / "generation_config.json").write_bytes(content)
    return content


@pytest.mark.parametrize("eos", [END, [TEXT, END]])
def test_what_ends_there_already_is_kept_byte_for_byte(base, eos):
    content = own(base, eos_token_id=eos, temperature=0.6, stop_strings=["\n"], unknown={"x": 1})
    stopping = find_stopping(resolve(str(base)), tiny.tokenizer(), END)
    assert stopping.generation_config == content and stopping.note is None
    assert END in stopping.tokens


@pytest.mark.parametrize("eos", [TEXT, [TEXT]])
def test_the_turns_end_is_added_and_said(base, eos):
    own(base, eos_token_id=eos, temperature=0.6)
    stopping = find_stopping(resolve(str(base)), tiny.tokenizer(), END)
    assert json.loads(stopping.generation_config) == {"eos_token_id": [TEXT, END], "temperature": 0.6}
    assert stopping.tokens == [TEXT, END]
    assert "ends a turn with '<|im_end|>' (2)" in stopping.note and "eos_token_id [0, 2]" in stopping.note


def test_without_a_generation_config_the_models_own_end_stays_beside_it(base):
    (base / "generation_config.json").unlink()
    stopping = find_stopping(resolve(str(base)), tiny.tokenizer(), END)
    assert json.loads(stopping.generation_config)["eos_token_id"] == [TEXT, END]
    assert find_stopping(resolve(str(base)), tiny.tokenizer(), None).generation_config is None


def test_without_a_turns_end_nothing_is_added(base):
    content = own(base, eos_token_id=TEXT)
    stopping = find_stopping(resolve(str(base)), tiny.tokenizer(), None)
    assert stopping.generation_config == content and stopping.note is None
    assert stopping.tokens == [TEXT, END]  # the tokenizer's own end token ends samples too


def test_a_generation_config_that_is_no_json_is_named(base):
    (base / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is no JSON"):
        find_stopping(resolve(str(base)), tiny.tokenizer(), END)
