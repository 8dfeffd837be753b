"""A tokenizer against its chat template and the model's config."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from tokenizers import AddedToken

from dsft.config.schema import DataConfig, TaskConfig
from dsft.data.sources import Raw
from dsft.errors import UserError
from dsft.tasks import TASKS, encode
from dsft.tasks.collate import Collator
from dsft.tasks.task import Context, View
from dsft.tasks.tokenizer_check import check

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
ZEPHYR = (  # <|user|> and its like are no tokens of the real model either
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL_V1 = (  # [INST] is plain text
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CONFIG = tiny.llama_config(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def tokenizer(template, *added, bos=None, eos="</s>"):
    made = tiny.byte_tokenizer(template)
    made.add_special_tokens({"eos_token": eos} | ({"bos_token": bos} if bos else {}))
    made.add_tokens([AddedToken(token, special=True) for token in added])
    return made


def test_what_goes_together_is_passed():
    assert check(tiny.TOKENIZER, tiny.llama_config(), True) == []
    assert check(tokenizer(MISTRAL_V1, bos="<s>"), CONFIG, True) == []
    thinking = tiny.CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert check(tokenizer(thinking), CONFIG, True) == []
    llama = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
    template = (TEMPLATES / "llama31.jinja").read_text(encoding="utf-8")
    assert check(tokenizer(template, *llama, bos="<|begin_of_text|>"), CONFIG, True) == []


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (tiny.CHATML.replace("im_", "i_m_"), "<|i_m_end|>"),
        ((TEMPLATES / "llama31.jinja").read_text(encoding="utf-8"), "<|eot_id|>"),
        ((TEMPLATES / "gemma.jinja").read_text(encoding="utf-8"), "<end_of_turn>"),
    ],
)
def test_an_end_of_turn_in_pieces_is_refused_and_mended_by_new_tokens(template, end):
    with pytest.raises(UserError, match="learn no token to stop at") as caught:
        check(tokenizer(template, bos="<s>"), CONFIG, True)
    assert f"turn with {end}, which" in str(caught.value) and "data.new_tokens=FILE" in str(caught.value)
    assert not any("cuts into" in line for line in check(tokenizer(template, bos="<s>"), CONFIG, False))
    (warning,) = check(tokenizer(template, end, bos="<s>"), CONFIG, True)
    assert "cuts into pieces" in warning and end not in warning


def test_markers_in_pieces_that_end_no_turn_are_a_warning():
    (warning,) = check(tokenizer(ZEPHYR), CONFIG, True)
    assert warning.startswith("the chat template writes <|assistant|>, <|system|>, <|user|>, which the tokenizer cuts")
    assert check(tokenizer(ZEPHYR, "<|assistant|>", "<|system|>", "<|user|>"), CONFIG, True) == []


def test_a_beginning_that_is_written_twice_is_refused():
    with pytest.raises(UserError, match="writes <s>, which begins a sequence, twice"):
        check(tokenizer("{{ bos_token }}" + MISTRAL_V1, bos="<s>"), CONFIG, True)


def test_ids_of_config_and_tokenizer():
    agree = tiny.llama_config(eos_token_id=[7, tiny.TOKENIZER.eos_token_id])
    assert check(tiny.TOKENIZER, agree, True) == []
    warnings = check(tiny.TOKENIZER, tiny.llama_config(eos_token_id=[7], bos_token_id=9, pad_token_id=5), False)
    assert [line.split("=")[0].split()[-1] for line in warnings] == ["bos_token_id", "eos_token_id", "pad_token_id"]
    assert "'<|im_end|>', 2: the tokenizer's is used" in warnings[1]


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
@pytest.mark.parametrize("padded", [False, True])
def test_the_end_is_learnt_where_padding_is_the_same_token_or_none(pad, padded):
    """The label of each answer's last token is the end token; what is filled in has no label and is not seen."""
    tokens = tiny.tokenizer()
    tokens.pad_token = pad
    context = Context(tokens, DataConfig(max_length=64), TaskConfig(name="causal_lm"))
    examples = []
    for number, answer in enumerate(("在山上 。", "the owl", "a b c d")):
        (example,) = encode(Raw({"prompt": "where", "completion": answer}, "x"), TASKS["causal_lm"], context)
        example.number = number
        examples.append(example)
    batch = Collator(TASKS["causal_lm"], context, padded).train(examples, (0, 0))
    targets = batch.tensors["target_ids"].tolist()
    assert targets.count(tokens.eos_token_id) == 3
    own = [TASKS["causal_lm"].inputs(example, View(), context)["labels"] for example in examples]
    assert sorted(targets) == sorted(label for labels in own for label in labels.tolist() if label >= 0)
    if padded:
        lengths = np.asarray(batch.tensors["attention_mask"].sum(1)).tolist()
        assert lengths == [len(example.ids) for example in examples] and len(set(lengths)) > 1
