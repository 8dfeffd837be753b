"""Golden masks: what is learnt of a conversation, readable as text."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsft.config.schema import DataConfig, OnRewrittenHistory, TrainOn
from dsft.data.sources import BadRecord
from dsft.errors import UserError
from dsft.tasks.causal_lm import weighed
from dsft.tasks.conversation import Conversation
from dsft.tasks.render import ONLY_LAST, SPLIT, render
from dsft.types import Example

SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # writes the thoughts of the last turn only, as reasoning models do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = [
    "What is it? It is a very small model. Hello there, how are you?\n\nThe answer is yes, 你好 你好 世界 床前明月光"
] * 9


def make_tokenizer(template, trim_offsets=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [AddedToken(special, special=True) for special in SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [SYSTEM, user("Hello"), assistant("Hi there."), user("你好?"), assistant("你好，世界𠮷")]


def rendered(conversation, tokenizer, **data) -> list[Example]:
    """Examples of a conversation, untruncated."""
    return [weighed(rendering.columns) for rendering in render(conversation, tokenizer, DataConfig(**data))]


def runs(example, tokenizer) -> list[str]:
    """The supervised text, one string per run of supervised tokens."""
    weights = example.columns["weights"]
    assert (example.ids.dtype, weights.dtype, weights[0]) == (np.int32, np.float32, 0)
    starts = np.flatnonzero(np.diff((weights > 0).astype(int), prepend=0, append=0))
    return [tokenizer.decode(example.ids[a:b].tolist()) for a, b in zip(starts[::2], starts[1::2], strict=True)]


def learnt(messages, template, train_on=TrainOn.assistant, tools=None, data=None, **kwargs):
    """What is supervised of a conversation that makes one example."""
    tokenizer = make_tokenizer(template, **kwargs)
    conversation = Conversation(messages=messages, tools=tools, origin="f.jsonl:1")
    (example,) = rendered(conversation, tokenizer, train_on=train_on, **(data or {}))
    return runs(example, tokenizer)


@pytest.mark.parametrize(
    ("template", "golden"),
    [
        (CHATML, ["Hi there.<|im_end|>", "你好，世界𠮷<|im_end|>"]),
        (MARKED, ["Hi there.<|im_end|>", "你好，世界𠮷<|im_end|>"]),
        (LLAMA3, ["Hi there.<|eot_id|>", "你好，世界𠮷<|eot_id|>"]),
        (BARE, [" Hi there.\n\n", " 你好，世界𠮷\n\n"]),  # no end token, so the blank line is how a turn ends
    ],
)
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_assistant_turns_and_their_end_tokens_are_learnt(template, golden, trim_offsets):
    assert [run.lstrip(" ") for run in learnt(TWO_TURNS, template, trim_offsets=trim_offsets)] == [
        run.lstrip(" ") for run in golden
    ]


def test_a_template_without_a_generation_prompt():
    assert learnt(TWO_TURNS[1:], LLAMA2) == [" Hi there. </s>", " 你好，世界𠮷 </s>"]


def test_a_word_that_shares_its_token_with_the_prompt_is_learnt():
    # " yes" is one token, whose space the prompt wrote
    for trim_offsets in (True, False):
        assert learnt([user("a"), assistant("yes")], BARE, trim_offsets=trim_offsets)[0].strip() == "yes"


def test_last_assistant():
    for template in (CHATML, MARKED):
        assert learnt(TWO_TURNS, template, TrainOn.last_assistant) == ["你好，世界𠮷<|im_end|>"]
        ends_with_user = [*TWO_TURNS, user("more")]
        assert learnt(ends_with_user, template, TrainOn.last_assistant) == ["你好，世界𠮷<|im_end|>"]


def test_all_is_everything_but_the_first_token():
    tokenizer = make_tokenizer(CHATML)
    (example,) = rendered(Conversation(messages=TWO_TURNS), tokenizer, train_on=TrainOn.all)
    assert example.columns["weights"].tolist() == [0] + [1] * (len(example.ids) - 1)


@pytest.mark.parametrize("template", [CHATML, MARKED, LLAMA3, LLAMA2, TOOLS])
def test_ids_are_those_of_transformers(template):
    tokenizer = make_tokenizer(template)
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)
    (example,) = rendered(Conversation(messages=TWO_TURNS), tokenizer)
    assert example.ids.tolist() == expected


def test_the_mask_is_that_of_transformers_where_the_template_has_marks():
    tokenizer = make_tokenizer(MARKED)
    encoded = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = rendered(Conversation(messages=TWO_TURNS), tokenizer)
    assert example.columns["weights"].astype(int).tolist() == encoded["assistant_masks"]


@pytest.mark.parametrize(
    "marks",
    [
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n",
        "{%- generation -%}{{ m.content }}<|im_end|>\n{% endgeneration %}",
        "{% generation %}{{ m.content[:2] }}{% endgeneration %}"
        "{% generation %}{{ m.content[2:] }}{% endgeneration %}<|im_end|>\n",
    ],
)
@pytest.mark.parametrize("train_on", [TrainOn.assistant, TrainOn.last_assistant])
def test_the_end_token_is_learnt_wherever_the_marks_end(marks, train_on):
    template = MARKED.replace("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n", marks)
    assert template != MARKED
    assert learnt(TWO_TURNS, template, train_on) == learnt(TWO_TURNS, CHATML, train_on)


def test_the_start_of_the_next_turn_is_no_end_token():
    template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert learnt([user("a"), assistant("b"), user("c"), assistant("d")], template) == ["b", "d"]


def test_special_and_blank_text_inside_an_answer():
    assert learnt([user("a"), assistant("  b  \n\n c \n")], CHATML) == ["  b  \n\n c \n<|im_end|>"]
    assert learnt([user("a"), assistant(" \tb")], MARKED) == [" \tb<|im_end|>"]


def test_tool_calls_are_learnt_and_their_results_are_not():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    turns = [user("北京?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "晴"}, assistant("晴天。")]
    assert learnt(turns, TOOLS, tools=tools) == [
        f"<call>{json.dumps(call['function'], ensure_ascii=False)}</call><|im_end|>",
        "晴天。<|im_end|>",
    ]


THOUGHTS = [user("a"), assistant("<think>hm</think>yes"), user("b"), assistant("<think>so</think>no")]


def test_a_template_that_rewrites_history_gives_an_example_of_each_beginning():
    tokenizer = make_tokenizer(FORGETFUL)
    conversation = Conversation(messages=THOUGHTS, origin="f.jsonl:1")
    first, second = rendered(conversation, tokenizer)
    assert runs(first, tokenizer) == ["<think>hm</think>yes<|im_end|>"]
    assert runs(second, tokenizer) == ["<think>so</think>no<|im_end|>"]
    for example, turns in ((first, 2), (second, 4)):
        expected = tokenizer.apply_chat_template(THOUGHTS[:turns], tokenize=False)
        assert tokenizer.decode(example.ids.tolist()) == expected
    assert conversation.notes == {SPLIT}


def test_only_what_stands_as_it_was_written_is_learnt_where_that_is_wanted():
    conversation = Conversation(messages=[*THOUGHTS, user("c"), assistant("well")], origin="f.jsonl:1")
    tokenizer = make_tokenizer(FORGETFUL)
    (example,) = rendered(conversation, tokenizer, on_rewritten_history=OnRewrittenHistory.last)
    assert runs(example, tokenizer) == ["well<|im_end|>"]
    assert conversation.notes == {ONLY_LAST}
    assert learnt(THOUGHTS, FORGETFUL, TrainOn.last_assistant) == ["<think>so</think>no<|im_end|>"]


def test_rewritten_history_is_refused_with_both_sides_where_that_is_wanted():
    with pytest.raises(BadRecord) as error:
        learnt(THOUGHTS, FORGETFUL, data={"on_rewritten_history": OnRewrittenHistory.error})
    message = str(error.value)
    assert message.startswith("f.jsonl:1: the chat template writes a conversation differently when it goes on")
    assert "up to turn 2: '>user\\na<|im_end|>\\n<|im_start|>assistant\\n<think>hm</think>yes" in message
    assert "up to turn 4: '>user\\na<|im_end|>\\n<|im_start|>assistant\\nyes<|im_end|>" in message
    assert "Choose data.on_rewritten_history=split or last" in message


def test_a_prompt_that_opens_reasoning_is_closed_where_the_template_does_not():
    template = FORGETFUL.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    assert learnt([user("a"), assistant("b")], template) == ["</think>b<|im_end|>"]
    assert learnt([user("a"), assistant("<think>so</think>b")], template) == ["so</think>b<|im_end|>"]


def test_a_prompt_that_the_turn_does_not_follow_is_refused():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<answer>{% endif %}")
    with pytest.raises(BadRecord, match=r"prompt for turn 2: .*<answer>"):
        learnt([user("a"), assistant("b")], template)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for m in messages %}\n{{ m.content }", r"is no valid Jinja template: line 2"),
        ("{{ nothing.at.all }}", "fails on every conversation: 'nothing' is undefined"),
        ("{{ raise_exception('never') }}", "fails on every conversation: never"),
        ("{{ messages + 1 }}", "fails on every conversation: can only concatenate list"),
        ("{{ 1 / 0 }}", "fails on every conversation: division by zero"),
        ("{% for m in message %}{{ m.content }}{% endfor %}", "renders nothing"),
        (CHATML.replace("m.content", "m.contents"), "leaves out what the assistant says"),
        ("version https://git-lfs.github.com/spec/v1", "leaves out what the assistant says"),
    ],
)
def test_a_template_that_is_broken_as_such_is_blamed_before_the_record(template, fault):
    with pytest.raises(UserError, match=rf"^the chat template \(model\.chat_template=FILE, .*{fault}") as caught:
        learnt([user("a"), assistant("b c")], template)
    assert not isinstance(caught.value, BadRecord)


def test_a_template_that_wants_a_system_turn_is_not_broken():
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    with pytest.raises(BadRecord, match="refuses the conversation: no system turn"):
        learnt([user("a"), assistant("b")], template)


def test_a_conversation_that_the_template_refuses_is_a_bad_record():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    with pytest.raises(BadRecord, match=r"f.jsonl:1: the chat template refuses the conversation: no system turns"):
        learnt(TWO_TURNS, template)


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(UserError, match=r"model\.chat_template=FILE"):
        learnt(TWO_TURNS, None)


def test_text_is_learnt_whole_with_the_end_of_sequence():
    tokenizer = make_tokenizer(None)
    (example,) = rendered(Conversation(text="床前明月光"), tokenizer)
    assert tokenizer.decode(example.ids.tolist()) == "床前明月光</s>"
    assert example.columns["weights"].tolist() == [0] + [1] * (len(example.ids) - 1)


def test_text_gets_the_beginning_that_the_tokenizer_adds_and_one_end():
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    )
    (example,) = rendered(Conversation(text="Hello"), tokenizer, train_on=TrainOn.all)
    assert tokenizer.decode(example.ids.tolist()) == "<s>Hello</s>"
    assert example.columns["weights"].tolist() == [0] + [1] * (len(example.ids) - 1)
