"""What the composition root itself decides."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from dsft import assemble
from dsft.commands import train
from dsft.config.schema import Config
from dsft.engine import _ExactNorms
from dsft.model.vocabulary import Vocabulary
from dsft.types import Example


def plan(examples, words: Vocabulary):
    model = SimpleNamespace(words=words, config=SimpleNamespace(vocab_size=104))
    return SimpleNamespace(train_set=examples, model=model, collator=SimpleNamespace(padded=False))


def example(ids, target: int) -> Example:
    supervised = np.zeros(len(ids), bool)
    supervised[target:] = True
    return tiny.example(np.array(ids, np.int32), supervised)


def test_the_probe_shows_a_new_token_where_the_data_hold_one():
    """Else the export's check would not see whether its input row was written."""
    plain, new = example(range(90), 70), example([*range(60), 103, *range(30)], 2)
    words = Vocabulary(first=100, pieces=((1, 2),) * 4, texts=("a", "b", "c", "d"))
    assert 70 in assemble.probe(plan([plain, new], Vocabulary(100))).tensors["input_ids"]
    assert 103 in assemble.probe(plan([plain, new], words)).tensors["input_ids"]
    assert 70 in assemble.probe(plan([plain, plain], words)).tensors["input_ids"]


@pytest.mark.parametrize("function", [torch.norm, torch.linalg.vector_norm, torch.linalg.norm, torch.Tensor.norm])
def test_norms_are_exact_with_any_arguments(function):
    x = torch.full((3_000_000,), 0.1)
    right = float(x.double().square().sum().sqrt())
    with _ExactNorms():
        found = [function(x), function(x, 2), function(x, dtype=torch.float32), function(x.view(1, -1), dim=-1)]
    assert [f.dtype for f in found] == [torch.float32] * 4
    assert [float(f) for f in found] == pytest.approx([right] * 4, rel=1e-7)


class Data(list):
    entry = SimpleNamespace(columns={"ids": SimpleNamespace(data=np.zeros(0, np.int32))})


@pytest.mark.parametrize(("origin", "expected"), [("run", "abc"), ("other", None)])
def test_a_run_from_anothers_checkpoint_is_a_run_of_its_own_to_wandb(origin, expected, tmp_path, monkeypatch):
    """Under the other's id, W&B would mix the two and drop all rows up to the other's last step."""
    asked = []
    monkeypatch.setattr(train, "WandbSink", lambda *arguments: asked.append(arguments[4]))
    monkeypatch.setattr(train.audits, "show", lambda *_: None)
    for name in ("_environment", "_describe_run", "_headline"):
        monkeypatch.setattr(train, name, lambda *_: {})
    config = Config()
    config.tracking.wandb = True
    the_loop = SimpleNamespace(
        tracker=SimpleNamespace(rewind=lambda step: 0, attach=lambda sink: None, note=lambda message: None),
        world=SimpleNamespace(from_main=lambda make: make()),
        run_dir=tmp_path / "run",
        engine=None,
        counters=SimpleNamespace(best=1.0, best_step=5),
    )
    the_loop.run_dir.mkdir()
    plan = SimpleNamespace(
        audit={},
        ds={},
        why=None,
        metrics={},
        planner=SimpleNamespace(describe=lambda micro_batch_size: {}),
        sizes=SimpleNamespace(micro_batch_size=1),
        train_set=Data([None]),
        model=SimpleNamespace(
            words=Vocabulary(0),
            tokenizer=None,
            stopping=SimpleNamespace(note=None),
            source=SimpleNamespace(head=None),
        ),
    )
    checkpoint = tmp_path / origin / "checkpoints/step-000010"
    train._begin(config, plan, the_loop, checkpoint, {"step": 10, "wandb_id": "abc"})
    assert asked == [expected]
    assert the_loop.counters.best == (1.0 if origin == "run" else None)
