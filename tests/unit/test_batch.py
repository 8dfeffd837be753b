"""The flat batch: labels shifted within documents, positions that restart, filler."""

import numpy as np
import tiny
import torch

from dsft.data.batch import collate
from dsft.types import IGNORE_INDEX, Example


def example(ids, supervised) -> Example:
    return tiny.example(np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool))


def test_a_batch_can_be_read():
    _ = IGNORE_INDEX
    first = example([11, 12, 13, 14], [0, 0, 1, 1])
    second = example([21, 22, 23], [0, 1, 0])
    batch = collate([first, second])
    assert batch.tensors["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22, 23]]
    assert batch.tensors["labels"].tolist() == [[_, 13, 14, _, 22, _, _]]
    assert batch.tensors["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.lengths == [4, 3]
    assert (batch.weight, batch.examples, batch.tokens) == (3, 2, 7)
    assert {tensor.dtype for tensor in batch.tensors.values()} == {torch.int64}


def test_no_document_predicts_the_first_token_of_the_next():
    everything = [example([i, i + 1, i + 2], [1, 1, 1]) for i in (10, 20, 30)]
    labels = collate(everything).tensors["labels"][0]
    assert labels[[2, 5, 8]].tolist() == [IGNORE_INDEX] * 3
    assert labels[[0, 1, 3, 4, 6, 7]].tolist() == [11, 12, 21, 22, 31, 32]


def test_a_batch_is_its_documents_one_after_the_other():
    examples = tiny.examples(9)
    whole, parts = collate(examples), [collate([e]) for e in examples]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(whole.tensors[name], torch.cat([part.tensors[name] for part in parts], dim=1))
    assert whole.weight == sum(int(e.columns["supervised"].sum()) for e in examples)


def test_the_filler_batch_has_a_token_to_compute_and_nothing_to_count():
    filler = collate([])
    assert {tensor.shape for tensor in filler.tensors.values()} == {(1, 1)}
    assert filler.tensors["labels"].tolist() == [[IGNORE_INDEX]]
    assert filler.lengths == [1]
    assert (filler.weight, filler.examples, filler.tokens) == (0, 0, 0)


def test_a_batch_keeps_its_counts_when_it_moves():
    batch = collate(tiny.examples(3))
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert (moved.lengths, moved.weight, moved.examples) == (batch.lengths, batch.weight, batch.examples)
