"""Long texts in chunks: which tokens each has, what it counts, and how their outputs become one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from dsft.config.schema import ChunkConfig, ChunkPool, DataConfig
from dsft.data.sources import Raw
from dsft.errors import UserError
from dsft.tasks import TASKS, encode, texts

LONG = {"text": " ".join(tiny.texts(1, seed=3, longest=200)), "label": "red"}


def chunked(row=LONG, tokens=None, data=None, **chunk):
    context = tiny.collator("classify", tokens=tokens, chunk=ChunkConfig(**chunk)).context
    context = replace(context, data=data or DataConfig(max_length=64))
    return encode(Raw(row, "rows:1"), TASKS["classify"], context)


@pytest.mark.parametrize("stride", [None, 5, 30])
def test_a_long_text_is_read_in_overlapping_chunks(stride):
    whole = tiny.ENCODER_TOKENIZER(LONG["text"])["input_ids"]
    examples = chunked(LONG | {"weight": 2.0}, length=32, stride=stride)
    step, body = min(stride or 15, 30), whole[1:-1]
    assert len(examples) == 1 + -(-(len(body) - 30) // step) > 2
    for number, example in enumerate(examples):
        begin = min(number * step, len(body) - 30)
        assert example.ids.tolist() == [whole[0], *body[begin : begin + 30], whole[-1]]
        assert example.weight == pytest.approx(2.0 / len(examples)) and not example.truncated
    assert [example.labels for example in examples] == [("red",)] + [()] * (len(examples) - 1)
    (short,) = chunked({"text": "the fox", "label": "red"}, length=32)
    assert short.weight == 1


def test_of_a_pair_the_longer_text_is_cut_beside_the_other():
    row = {"text": "the owl", "text_pair": LONG["text"], "label": "red"}
    frame = tiny.ENCODER_TOKENIZER("the owl")["input_ids"]
    for example in chunked(row, length=32):
        assert example.ids.tolist()[: len(frame)] == frame and len(example.ids) == 32
        assert example.columns["token_types"].tolist() == [0] * len(frame) + [1] * (32 - len(frame))
    with pytest.raises(ValueError, match="beside one of its texts task.chunk.length=4 has no room"):
        chunked(row, length=4)


def test_the_first_chunk_alone():
    every, (first,) = chunked(length=32), chunked(length=32, pool=ChunkPool.first)
    assert first.ids.tolist() == every[0].ids.tolist() and first.weight == 1


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("pool", ["mean", "max", "vote"])
def test_chunks_are_pooled_as_they_are_by_hand(pool, several):
    random = np.random.default_rng(0)
    sizes = [3, 1, 4, 2, 1]
    data = [
        tiny.example(np.zeros(1, np.int32), np.ones(1), record=10 + n)
        for n, size in enumerate(sizes)
        for _ in range(size)
    ]
    logits = random.normal(size=(len(data), 3)).astype(np.float32)
    counts = np.concatenate([np.full(size, 1 / size) for size in sizes])
    context = tiny.collator("classify", chunk=ChunkConfig(length=8, pool=ChunkPool[pool])).context
    found = texts.by_record({"logits": logits, "counts": counts}, context, data, several)
    assert found["counts"] == pytest.approx(1.0)
    for row, part in zip(found["logits"], np.split(logits.astype(float), np.cumsum(sizes)[:-1]), strict=True):
        if pool != "vote":
            assert row == pytest.approx(part.mean(0) if pool == "mean" else part.max(0), abs=1e-6)
            continue
        chances = torch.from_numpy(part).sigmoid() if several else torch.from_numpy(part).softmax(-1)
        votes = chances > 0.5 if several else F.one_hot(chances.argmax(-1), 3)
        expected = (votes.sum(0) + chances.mean(0)) / (len(part) + 1)
        share = torch.from_numpy(row).sigmoid() if several else torch.from_numpy(row).exp()
        torch.testing.assert_close(share, expected.double())


def test_chunks_do_not_vote_for_numbers():
    context = tiny.collator("regress", chunk=ChunkConfig(length=8, pool=ChunkPool.vote)).context
    with pytest.raises(UserError, match=r"task\.chunk\.pool=vote: chunks vote for labels"):
        encode(Raw({"text": "a", "score": 1}, "rows:1"), TASKS["regress"], context)
