"""Weights of records and messages: what each token counts, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
import tiny

from dsft.config.schema import DataConfig, TaskConfig, TrainOn
from dsft.data.sources import BadRecord, Raw
from dsft.tasks import TASKS, encode
from dsft.tasks.task import Context
from dsft.types import Dropped

TOKENIZER = tiny.tokenizer()


def user(content, **others):
    return {"role": "user", "content": content, **others}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


def made(fields, tokenizer=TOKENIZER, task="causal_lm", **data):
    """Examples of a row and what is noted of it."""
    raw = Raw(fields, "f.jsonl:1")
    parts = encode(raw, TASKS[task], Context(tokenizer, DataConfig(**data), TaskConfig(name=task)))
    return parts, raw.notes


def counted(fields, **data) -> list[tuple[str, float]]:
    """Runs of tokens that count the same, as text, with what each counts; those that count nothing are left out."""
    (example,), _ = made(fields, **data)
    weights = example.columns["weights"]
    assert example.weight == pytest.approx(weights.astype(np.float64).sum(), abs=0)
    bounds = [0, *(np.flatnonzero(np.diff(weights)) + 1), len(weights)]
    runs = [(TOKENIZER.decode(example.ids[a:b]), float(weights[a])) for a, b in pairwise(bounds)]
    return [run for run in runs if run[1]]


CHAT = [user("the fox"), assistant("the owl"), user("a bird"), assistant("the moon")]


@pytest.mark.parametrize("name", ["weight", "loss_weight", "train", "loss", "trainable"])
def test_a_message_counts_what_it_says(name):
    turns = [CHAT[0], CHAT[1] | {name: 0}, CHAT[2], CHAT[3] | {name: 0.25}]
    assert counted({"messages": turns}) == [("the moon<|im_end|>", 0.25)]
    assert counted({"messages": [*CHAT[:3], CHAT[3] | {name: True}]}) == counted({"messages": CHAT})
    assert counted({"messages": [CHAT[0], CHAT[1] | {name: None}, *CHAT[2:]]}) == counted({"messages": CHAT})


@pytest.mark.parametrize("name", ["weight", "loss_weight", "sample_weight", "example_weight"])
def test_a_record_multiplies_what_its_messages_say(name):
    turns = [*CHAT[:3], CHAT[3] | {"weight": 0.5}]
    assert counted({"messages": turns, name: 3}) == [("the owl<|im_end|>", 3), ("the moon<|im_end|>", 1.5)]
    assert counted({"prompt": "the fox", "completion": "the owl", name: 0.5}) == [("the owl<|im_end|>", 0.5)]
    assert counted({"text": "the fox sees", name: 0.5}) == [(" fox sees<|im_end|>", 0.5)]


def test_a_weight_on_a_user_s_turn_needs_to_be_asked_for():
    turns = [user("the fox", weight=0.5), assistant("the owl"), user("a bird"), assistant("the moon", weight=0)]
    assert counted({"messages": turns}, train_on=TrainOn.weights) == [
        ("the fox<|im_end|>", 0.5),
        ("the owl<|im_end|>", 1),
    ]
    parts, notes = made({"messages": turns})
    assert [part.weight for part in parts] == [sum(c for _, c in [("the", 1), ("owl", 1), ("end", 1)])]
    assert any("data.train_on=weights" in note for note in notes)
    assert not made({"messages": [user("the fox", weight=0), *CHAT[1:]]})[1]


def test_of_all_tokens_those_of_a_message_count_what_it_says():
    turns = [user("the fox", weight=0.5), *CHAT[1:]]
    (example,), _ = made({"messages": turns}, train_on=TrainOn.all)
    text = [TOKENIZER.decode(example.ids[example.columns["weights"] == w]) for w in (0.5, 0)]
    assert text == ["the fox<|im_end|>", TOKENIZER.decode(example.ids[:1])]


def test_turns_of_a_prompt_are_read_and_not_learnt():
    fields = {"prompt": CHAT[:3], "completion": [CHAT[3]]}
    assert counted(fields) == [("the moon<|im_end|>", 1)]
    assert counted(fields | {"system": "be brief"}) == [("the moon<|im_end|>", 1)]
    carried = {"prompt": [CHAT[0], CHAT[1] | {"weight": 0.5}, CHAT[2]], "completion": "the moon"}
    assert counted(carried, train_on=TrainOn.weights) == [("the owl<|im_end|>", 0.5), ("the moon<|im_end|>", 1)]


def test_a_record_without_any_weight_is_dropped_and_counted():
    untrained = [CHAT[0], CHAT[1] | {"train": False}]
    for fields in ({"messages": CHAT, "weight": 0}, {"messages": untrained}, {"text": "a", "weight": 0}):
        parts, _ = made(fields)
        assert isinstance(parts, Dropped) and parts.reason == "no supervised tokens"
    parts, _ = made({"text": "a", "weight": 0}, tiny.ENCODER_TOKENIZER, "masked_lm")
    assert isinstance(parts, Dropped)


def test_a_masked_text_counts_what_its_record_says():
    (plain,), _ = made({"text": "the red fox sees a blue bird"}, tiny.ENCODER_TOKENIZER, "masked_lm")
    (half,), _ = made({"text": "the red fox sees a blue bird", "weight": 0.5}, tiny.ENCODER_TOKENIZER, "masked_lm")
    assert half.weight == plain.weight / 2


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), 1e40, 1e-40, "1", "true", [1], {}])
def test_what_is_no_weight_is_a_bad_record(value):
    with pytest.raises(BadRecord, match=r"f\.jsonl:1: field `messages\[1\]\.weight` is a weight"):
        made({"messages": [CHAT[0], CHAT[1] | {"weight": value}]})
    with pytest.raises(BadRecord, match=r"field `sample_weight` is a weight"):
        made({"text": "a", "sample_weight": value})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"messages": [CHAT[0], CHAT[1] | {"weight": 1, "train": False}]},
            r"`messages\[1\]` carries different weights",
        ),
        ({"messages": CHAT, "weight": 1, "sample_weight": 2}, "the record carries different weights"),
        ({"messages": CHAT, "loss": 2.31}, "field `loss` is 2.31: as a weight it would be true or false"),
        ({"messages": [CHAT[0], CHAT[1] | {"mask": True}]}, r"`messages\[1\]\.mask` is no weight that is known"),
        ({"messages": [CHAT[0], CHAT[1] | {"train_detail": []}]}, r"`messages\[1\]\.train_detail` is no weight"),
    ],
)
def test_what_may_mean_something_else_is_refused_by_name(fields, problem):
    with pytest.raises(BadRecord, match=problem):
        made(fields)
    assert counted(fields, ignore_fields=["loss", "mask", "train", "train_detail", "weight"])


def test_equal_weights_under_two_names_are_one():
    turns = [CHAT[0], CHAT[1] | {"weight": 0.5, "loss_weight": 0.5}]
    assert counted({"messages": turns}) == [("the owl<|im_end|>", 0.5)]


def test_false_on_a_record_leaves_it_out():
    assert isinstance(made({"messages": CHAT, "train": False})[0], Dropped)
    assert counted({"messages": CHAT, "train": True}) == counted({"messages": CHAT})
