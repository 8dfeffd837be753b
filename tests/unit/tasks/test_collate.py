"""Batches of both layouts: targets within documents, positions that restart, padding, filler."""

import numpy as np
import pytest
import tiny
import torch
from tiny import collate

from dsft.types import Example


def example(ids, supervised) -> Example:
    return tiny.example(np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool))


def test_a_batch_can_be_read():
    first = example([11, 12, 13, 14], [0, 0, 1, 1])
    second = example([21, 22, 23], [0, 1, 0])
    batch = collate([first, second])
    assert batch.tensors["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22, 23]]
    assert batch.tensors["target_at"].tolist() == [1, 2, 4]
    assert batch.tensors["target_ids"].tolist() == [13, 14, 22]
    assert batch.tensors["weight"].tolist() == 3
    assert batch.tensors["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.lengths == [4, 3]
    assert (batch.weight, batch.examples, batch.tokens) == (3, 2, 7)
    assert batch.tensors["lengths"].tolist() == [4, 3]
    assert batch.tensors["documents"].tolist() == [0, 4, 7]


def test_no_document_predicts_the_first_token_of_the_next():
    everything = [example([i, i + 1, i + 2], [1, 1, 1]) for i in (10, 20, 30)]
    batch = collate(everything)
    assert batch.tensors["target_at"].tolist() == [0, 1, 3, 4, 6, 7]
    assert batch.tensors["target_ids"].tolist() == [11, 12, 21, 22, 31, 32]


def test_a_batch_is_its_documents_one_after_the_other():
    examples = tiny.examples(9)
    whole, parts = collate(examples), [collate([e]) for e in examples]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(whole.tensors[name], torch.cat([part.tensors[name] for part in parts], dim=1))
    assert whole.weight == sum(int(e.columns["weights"].sum()) for e in examples)


def test_the_filler_batch_has_a_token_to_compute_and_nothing_to_count():
    filler = collate([])
    assert filler.tensors["input_ids"].shape == (1, 1)
    assert [filler.tensors[f"target_{name}"].tolist() for name in ("at", "ids", "weights")] == [[0]] * 3
    assert filler.lengths == [1]
    assert (filler.weight, filler.examples, filler.tokens) == (0, 0, 0)


def test_a_batch_keeps_its_counts_when_it_moves():
    batch = collate(tiny.examples(3))
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert (moved.lengths, moved.weight, moved.examples) == (batch.lengths, batch.weight, batch.examples)


@pytest.mark.parametrize("padded", [False, True])
def test_both_layouts_hold_the_same_documents_and_targets(padded):
    """A document's tokens, and the token that is to be predicted at each place, whatever the layout."""
    examples = tiny.examples(5)
    batch = collate(examples, padded=padded)
    ids, lengths = batch.tensors["input_ids"], batch.lengths
    rows = ids[0].split(lengths) if not padded else [row[:n] for row, n in zip(ids, lengths, strict=True)]
    begins = np.arange(5) * ids.shape[1] if padded else np.concatenate([[0], np.cumsum(lengths)[:-1]])
    found = dict(zip(batch.tensors["target_at"].tolist(), batch.tensors["target_ids"].tolist(), strict=True))
    expected = {}
    for example, row, begin in zip(examples, rows, begins, strict=True):
        assert row.tolist() == example.ids.tolist()
        for place in np.flatnonzero(example.columns["weights"]):
            expected[int(begin + place - 1)] = int(example.ids[place])
    assert found == expected
    if padded:
        assert batch.tensors["attention_mask"].sum(1).tolist() == lengths
        assert (ids[batch.tensors["attention_mask"] == 0] == tiny.TOKENIZER.pad_token_id).all()
