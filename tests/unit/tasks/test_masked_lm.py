"""Masked language modelling: what is hidden, by whom it is drawn, and what it is compared with."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from dsft.config.schema import DataConfig, EvalConfig, OnOverflow, TaskConfig
from dsft.errors import UserError
from dsft.model import attention
from dsft.tasks import masked_lm
from dsft.tasks.conversation import Conversation
from dsft.tasks.task import Context, View
from dsft.types import IGNORE_INDEX, Dropped, Example

TOKENS = tiny.ENCODER_TOKENIZER
SPECIAL = set(TOKENS.all_special_ids)


def context(
    max_length: int = 48, on_overflow: OnOverflow = OnOverflow.split, pseudo: int | None = 0, **task
) -> Context:
    data = DataConfig(max_length=max_length, on_overflow=on_overflow)
    return Context(TOKENS, data, TaskConfig(**task), EvalConfig(pseudo_perplexity=pseudo))


def encoded(text: str, **settings) -> list[Example]:
    parts = masked_lm.encode(Conversation(text=text, origin="f:1"), context(**settings))
    return [replace(part, number=number) for number, part in enumerate(parts)]


LONG = " ".join(tiny.texts(1, seed=5, longest=400) * 8)


def test_a_long_text_is_read_whole_window_by_window():
    parts = encoded(LONG)
    assert len(parts) > 3
    inner = np.concatenate([part.ids[1:-1] for part in parts])
    assert inner.tolist() == TOKENS(LONG)["input_ids"][1:-1]
    assert {(int(part.ids[0]), int(part.ids[-1])) for part in parts} == {(TOKENS.cls_token_id, TOKENS.sep_token_id)}
    assert max(part.tokens for part in parts) == 48
    assert len(encoded(LONG, on_overflow=OnOverflow.truncate)) == 1


@pytest.mark.parametrize("share", [0.15, 0.4, 1.0])
def test_so_many_tokens_are_hidden_as_the_example_weighs(share):
    for example in encoded(LONG, mask_share=share):
        made = masked_lm.inputs(example, View(epoch=3), context(mask_share=share))
        at = made["labels"] != IGNORE_INDEX
        maskable = ~np.isin(example.ids, list(SPECIAL))
        assert at.sum() == example.weight == max(1, round(share * maskable.sum()))
        assert not (at & ~maskable).any()
        assert (made["labels"][at] == example.ids[at]).all()
        assert (made["input_ids"][~at] == example.ids[~at]).all()
        assert (made["target_weights"][at] == 1).all()


def test_eighty_ten_ten_and_every_place_alike():
    kinds, places = Counter(), Counter()
    (example,) = encoded(" ".join(tiny.WORDS[:20]), max_length=200)
    for epoch in range(4000):
        made = masked_lm.inputs(example, View(epoch), context())
        for place in np.flatnonzero(made["labels"] != IGNORE_INDEX):
            places[int(place)] += 1
            now = int(made["input_ids"][place])
            kinds["mask" if now == TOKENS.mask_token_id else "same" if now == example.ids[place] else "other"] += 1
            assert now == TOKENS.mask_token_id or now not in SPECIAL
    total = kinds.total()
    # the same token comes up by chance among the others once in some 300
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.012)
    assert kinds["other"] / total == pytest.approx(0.1, abs=0.01)
    assert len(places) == example.tokens - 2
    expected = total / len(places)
    assert max(abs(count - expected) for count in places.values()) < 5 * expected**0.5


def test_what_is_hidden_depends_on_seed_epoch_and_example_alone():
    example = encoded(LONG)[0]

    def hidden(example=example, epoch=0, seed=0):
        chosen = context()
        chosen = replace(chosen, train=replace(chosen.train, seed=seed))
        return masked_lm.inputs(example, View(epoch), chosen)["input_ids"].tolist()

    assert hidden() == hidden()
    others = [hidden(epoch=1), hidden(epoch=-1), hidden(seed=1), hidden(replace(example, number=7))]
    assert len({tuple(ids) for ids in [hidden(), *others]}) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the red fox", ["the", "red", "fox"]),
        ("我来到北京清华大学", ["我", "来到", "北京", "清华大学"]),
        ("iPhone15 很好用!", ["iPhone15", "很", "好", "用", "!"]),
    ],
)
def test_whole_words_are_hidden_whole(text, words):
    pytest.importorskip("rjieba")
    (example,) = encoded(text, whole_words=True, mask_share=0.34)
    numbers = example.columns["words"][1:-1]
    found = [TOKENS.decode(example.ids[1:-1][numbers == n]).strip() for n in dict.fromkeys(numbers.tolist())]
    assert "".join(found) == "".join(words)
    if text.isascii() or text.startswith("我"):
        assert found == words
    for epoch in range(30):
        made = masked_lm.inputs(example, View(epoch), context(whole_words=True, mask_share=0.34))
        at = (made["labels"] != IGNORE_INDEX)[1:-1]
        for number in set(numbers.tolist()):
            assert len(set(at[numbers == number].tolist())) == 1, "a word is hidden in part"
        assert made["target_weights"][1:-1][at].sum() == pytest.approx(example.weight)


def test_what_has_no_mask_token_or_no_text_is_refused_or_counted():
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        masked_lm.encode(Conversation(text="a"), replace(context(), tokenizer=tiny.TOKENIZER))
    assert masked_lm.encode(Conversation(text="[SEP][SEP]"), context()) == Dropped(masked_lm.NO_TEXT)
    with pytest.raises(UserError, match=r"data\.max_length=2 leaves no room beside 2 special tokens"):
        encoded("a b c", max_length=2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "distilbert", "electra"])
def test_pseudo_perplexity_hides_one_token_at_a_time(family, padded):
    """Against transformers alone, one text and one hidden token after the other (arXiv:1910.14659)."""
    model = tiny.masked(family, "eager" if padded else attention.NAME)
    plain = tiny.masked(family, "eager")
    examples = [replace(part, number=n) for n, text in enumerate(tiny.texts(3)) for part in encoded(text)]
    collator = replace(tiny.collator("masked_lm", padded), context=context(pseudo=2))
    views = [masked_lm.views(example, number, collator.context) for number, example in enumerate(examples)]
    assert views == [len(examples[0].ids) - 1, len(examples[1].ids) - 1, 1]
    documents = [(e, n) for e, count in zip(examples, views, strict=True) for n in range(count)]
    batch = collator.evaluate([e for e, _ in documents], [n for _, n in documents])
    module = tiny.task(model, name="masked_lm", padded=padded).eval()
    with torch.no_grad():
        _, tally = module(batch)
        expected, count = 0.0, 0
        for example in examples[:2]:
            for place in range(1, len(example.ids) - 1):
                ids = torch.from_numpy(example.ids.astype(np.int64))[None]
                target, ids[0, place] = ids[0, place].clone(), TOKENS.mask_token_id
                expected += float(F.cross_entropy(plain(input_ids=ids).logits[0, place], target))
                count += 1
    assert float(tally.sums["pseudo_tokens"]) == count
    assert float(tally.sums["pseudo_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(tally.sums["weight"]) == sum(example.weight for example in examples)
    assert batch.examples == len(examples)
    assert module.chunked, "the loss comes from within the head, without logits of all positions"


def test_a_sample_shows_what_was_hidden_and_what_was_guessed():
    model = tiny.masked("bert", "eager")
    (example,) = encoded(tiny.texts(1)[0])
    made = masked_lm.sample(masked_lm.Sampling(model, torch.device("cpu"), [], 8), example, context())
    assert made["prompt"].count("[MASK]") == example.weight
    assert made["reference"].strip() == tiny.texts(1)[0].strip()
    assert "[MASK]" not in made["answer"]
