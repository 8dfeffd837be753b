"""Texts written in ragged batches, held to transformers' own `generate` on single prompts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from transformers import GenerationConfig

from dsft.errors import UserError
from dsft.tasks.generate import END, LENGTH, STRING, Decoding, Draw, Writer

CPU = torch.device("cpu")
STOPS = [7]


def prompts(count: int = 9, vocabulary: int = 100) -> dict[int, list[int]]:
    draw = np.random.default_rng(0)
    return {n: draw.integers(10, vocabulary, draw.integers(1, 14)).tolist() for n in range(count)}


def model(family: str = "llama", **changes):
    made = tiny.causal(family, "eager" if family in ("gemma2", "mamba", "bloom") else "sdpa", **changes).eval()
    made.generation_config = GenerationConfig()
    return made


def written(made, decoding: Decoding, given: dict[int, list[int]] | None = None, rows: int | None = None, **more):
    writer = Writer(made, CPU, tiny.TOKENIZER, STOPS, decoding, rows=rows, **more)
    with torch.no_grad():
        return dict(writer.write(given or prompts()))


def alone(made, ids: list[int], decoding: Decoding, **more) -> str:
    """What transformers writes for one prompt."""
    given = torch.tensor([ids])
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, do_sample=False, num_beams=decoding.beams, pad_token_id=0,
        eos_token_id=STOPS, repetition_penalty=decoding.repetition_penalty, **more,
    )  # fmt: skip
    with torch.no_grad():
        found = made.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
    return tiny.TOKENIZER.decode(found[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma2", "mamba", "bloom"])
@pytest.mark.parametrize("beams", [1, 3])
def test_ragged_batches_are_single_prompts(family, beams):
    """With positions learnt, turned and none, and with a state that padding would spoil."""
    made, decoding = model(family), Decoding(max_new_tokens=8, beams=beams)
    found = written(made, decoding)
    for number, ids in prompts().items():
        assert found[number][0].text == alone(made, ids, decoding), number


@pytest.mark.parametrize("beams", [1, 2])
def test_a_penalty_is_that_of_single_prompts(beams):
    made, decoding = model(), Decoding(max_new_tokens=8, repetition_penalty=3.0, beams=beams)
    assert written(made, decoding) != written(made, Decoding(max_new_tokens=8, beams=beams))
    for number, ids in prompts().items():
        assert written(made, decoding)[number][0].text == alone(made, ids, decoding), number


def test_what_is_drawn_depends_on_record_and_answer_alone():
    made, decoding = model(), Decoding(max_new_tokens=8, temperature=1.5, top_p=0.9, answers=3, seed=5)
    first = written(made, decoding)
    assert len({text.text for texts in first.values() for text in texts}) > 20
    given = prompts()
    for rows in (1, 4, 64):
        assert written(made, decoding, rows=rows) == first
    part = {number: given[number] for number in (7, 2)}
    assert written(made, decoding, part) == {number: first[number] for number in part}
    assert written(made, Decoding(max_new_tokens=8, temperature=1.5, top_p=0.9, answers=3, seed=6)) != first


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])
    for settings, kept in (({}, 5), ({"top_k": 2}, 2), ({"top_p": 0.8}, 2), ({"min_p": 0.3}, 2)):
        temperature = 2.0 if not settings else 1.0
        draw = Draw(Decoding(temperature=temperature, **settings), [(record, 0) for record in range(20_000)])
        found = Counter(draw(torch.zeros(20_000, 1, dtype=torch.long), scores.expand(20_000, -1)).argmax(-1).tolist())
        expected = (scores[0, :kept] / temperature).softmax(-1)
        assert max(found) < kept
        for token, chance in enumerate(expected.tolist()):
            assert found[token] / 20_000 == pytest.approx(chance, abs=0.012), (settings, token)


def test_why_a_text_ends():
    made = model()
    ids = prompts()[0]
    with torch.no_grad():
        given = torch.tensor([ids])
        whole = made.generate(given, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, len(ids) :
        ]
    text = tiny.TOKENIZER.decode(whole, skip_special_tokens=True)
    (found,) = written(made, Decoding(max_new_tokens=6), {3: ids})[3]
    assert (found.text, found.stopped, found.tokens) == (text, LENGTH, 6)
    third = int(whole[2])
    writer = Writer(made, CPU, tiny.TOKENIZER, [third], Decoding(max_new_tokens=6))
    with torch.no_grad():
        (found,) = dict(writer.write({3: ids, 4: prompts()[1]}))[3]
    first = whole.tolist().index(third) + 1
    assert (found.stopped, found.tokens) == (END, first)
    piece = text[len(text) // 2 : len(text) // 2 + 2]
    (found,) = written(made, Decoding(max_new_tokens=6, stop=(piece,)), {3: ids, 4: prompts()[1]})[3]
    assert (found.stopped, found.text) == (STRING, text[: text.index(piece)]) and found.tokens <= 6


def test_a_prompt_that_fills_the_model_and_one_that_nearly_does():
    made = model(max_position_embeddings=32)
    given = {0: [11] * 40, 1: [12] * 32, 2: [13] * 30, 3: [14] * 5}
    found = written(made, Decoding(max_new_tokens=8), given)
    assert found[0] == found[1] == "the prompt alone fills the model"
    assert found[2][0].tokens <= 2 and found[3][0].tokens <= 8


def test_a_failing_prompt_takes_no_other_with_it():
    for others in (prompts(), {0: [11], 1: [12, 13, 14]}):  # in a batch, and where padding is tried first
        found = written(model(), Decoding(max_new_tokens=4), others | {20: [10_000, 11]})
        assert "IndexError" in found[20] and all(isinstance(found[number], list) for number in others)


def test_an_encoder_decoder_writes_in_batches_too():
    made = tiny.two_sided("t5").eval()
    made.generation_config = GenerationConfig()
    given, decoding = prompts(), Decoding(max_new_tokens=8)
    found = written(made, decoding, begin=[made.config.decoder_start_token_id])
    for number, ids in given.items():
        expected = made.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=STOPS, pad_token_id=0,
            decoder_start_token_id=made.config.decoder_start_token_id,
        )  # fmt: skip
        assert found[number][0].text == tiny.TOKENIZER.decode(expected[0, 1:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is a whole number, at least 1"),
        ({"beams": 2, "temperature": 1.0}, "beams=2 beside temperature"),
        ({"temperature": -1.0}, "temperature=-1 is 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan is 0 or more"),
        ({"top_p": 0.9}, "top_p does nothing with temperature=0"),
        ({"answers": 3}, "answers does nothing with temperature=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0 is above 0"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p=2 is from 0 to 1"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0 is above 0"),
        ({"stop": ("",)}, "stop: a string"),
    ],
)
def test_what_is_no_way_to_write_is_refused(settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Decoding(**settings)
