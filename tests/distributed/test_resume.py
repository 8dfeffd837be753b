"""Saving, a fresh engine, and going on: bit for bit as though nothing had happened."""

from __future__ import annotations

import cases
import pytest
import tiny
import torch

from dsft import checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_bit_for_bit(pools, model_dir, tmp_path, stage, method):
    """Two ranks, packing, accumulation 3, in the middle of an epoch; LoRA with dropout, so random states matter."""
    lora = {"dropout": 0.1} if method == "lora" else None
    for result in pools(2).run(
        cases.save, model_dir=model_dir, run_dir=str(tmp_path), stage=stage, method=method, lora=lora
    ):
        (rows, expected), (rows_again, found) = result["straight"], result["resumed"]
        assert rows_again == rows
        for name, value in expected.items():
            assert value.numel() > 0
            assert torch.equal(found[name], value), name
    assert checkpoint.damage(checkpoint.checkpoints(tmp_path)[0]) is None


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_whole_weights_come_out_of_a_checkpoint(pools, model_dir, tmp_path, stage):
    """`checkpoint.weights` needs neither ranks nor an engine; all weights have their full shape (DeepSpeed#7436)."""
    run = pools(2).run(cases.save, model_dir=model_dir, run_dir=str(tmp_path), stage=stage, steps=1)
    stored = checkpoint.weights(checkpoint.checkpoints(tmp_path)[0])
    shapes = {name: tuple(value.shape) for name, value in run[0]["straight"][1].items()}
    assert {name: tuple(stored[name].shape) for name in shapes} == shapes


def test_another_number_of_ranks_is_refused(pools, model_dir, tmp_path):
    pools(2).run(cases.save, model_dir=model_dir, run_dir=str(tmp_path), stage="zero2", steps=1)
    path = str(checkpoint.checkpoints(tmp_path)[0])
    (message,) = pools(1).run(cases.load_error, model_dir=model_dir, path=path, stage="zero2")
    assert "ranks 2" in message and "this run has 1" in message
