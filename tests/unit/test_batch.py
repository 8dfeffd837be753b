"""The flat batch: labels shifted within documents, positions that restart, filler."""

import numpy as np
import tiny
import torch

from dsft.data.batch import collate
from dsft.types import IGNORE_INDEX, Example


def example(ids, supervised) -> Example:
    return Example(np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool))


def test_a_batch_can_be_read():
    _ = IGNORE_INDEX
    first = example([11, 12, 13, 14], [0, 0, 1, 1])
    second = example([21, 22, 23], [0, 1, 0])
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 23]]
    assert batch.labels.tolist() == [[_, 13, 14, _, 22, _, _]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.lengths == [4, 3]
    assert (batch.supervised, batch.examples, batch.tokens) == (3, 2, 7)
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_no_document_predicts_the_first_token_of_the_next():
    everything = [example([i, i + 1, i + 2], [1, 1, 1]) for i in (10, 20, 30)]
    labels = collate(everything).labels[0]
    assert labels[[2, 5, 8]].tolist() == [IGNORE_INDEX] * 3
    assert labels[[0, 1, 3, 4, 6, 7]].tolist() == [11, 12, 21, 22, 31, 32]


def test_a_batch_is_its_documents_one_after_the_other():
    examples = tiny.examples(9)
    whole, parts = collate(examples), [collate([e]) for e in examples]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts], dim=1))
    assert whole.supervised == sum(int(e.supervised.sum()) for e in examples)


def test_the_filler_batch_has_a_token_to_compute_and_nothing_to_count():
    filler = collate([])
    assert filler.input_ids.shape == filler.labels.shape == filler.position_ids.shape == (1, 1)
    assert filler.labels.tolist() == [[IGNORE_INDEX]]
    assert filler.lengths == [1]
    assert (filler.supervised, filler.examples, filler.tokens) == (0, 0, 0)


def test_a_batch_keeps_its_counts_when_it_moves():
    batch = collate(tiny.examples(3))
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.labels.device.type == moved.position_ids.device.type == "meta"
    assert (moved.lengths, moved.supervised, moved.examples) == (batch.lengths, batch.supervised, batch.examples)
