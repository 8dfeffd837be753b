"""Saving, a fresh engine, and going on: bit for bit as though nothing had happened."""

from __future__ import annotations

import cases
import pairwise
import pytest
import tiny
import torch

from dsft import checkpoint

STAGES = ("zero0", "zero1", "zero2", "zero3")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(("stage", "method", "precision"), pairwise.cases(STAGES, ("full", "lora"), tuple(DTYPES)))
def test_bit_for_bit_and_whole(pools, model_dir, tmp_path, stage, method, precision):
    """Two ranks, packing, accumulation 3, in the middle of an epoch; LoRA with dropout, so random states matter.

    `checkpoint.weights` needs neither ranks nor an engine; trained weights come out whole (DeepSpeed#7436).
    """
    lora = {"dropout": 0.1} if method == "lora" else None
    results = pools(2).run(
        cases.save,
        model_dir=model_dir,
        run_dir=str(tmp_path),
        stage=stage,
        method=method,
        lora=lora,
        precision=precision,
    )
    for result in results:
        (rows, expected), (rows_again, found) = result["straight"], result["resumed"]
        assert rows_again == rows
        for name, value in expected.items():
            assert value.numel() > 0
            assert torch.equal(found[name], value), name
    path = checkpoint.checkpoints(tmp_path)[0]
    assert checkpoint.damage(path) is None
    stored, saved, dtype = checkpoint.weights(path), results[0]["saved"], DTYPES[precision]
    trained = [name for name in saved if method == "full" or "lora_" in name]
    assert trained
    for name in trained:
        assert torch.equal(stored[name].to(dtype), saved[name].to(dtype)), name


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_one_rank_that_cannot_write_is_every_ranks_error(pools, model_dir, tmp_path, stage, rank):
    """Nobody is left waiting in a barrier of DeepSpeed's, and what was begun is cleared away."""
    for message in pools(2).run(
        cases.save_error, seconds=60, model_dir=model_dir, run_dir=str(tmp_path), stage=stage, failing_rank=rank
    ):
        assert f"rank {rank}: cannot write the checkpoint" in message and "no space is left" in message
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_another_number_of_ranks_is_refused(pools, model_dir, tmp_path):
    pools(2).run(cases.save, model_dir=model_dir, run_dir=str(tmp_path), stage="zero2", steps=1)
    path = str(checkpoint.checkpoints(tmp_path)[0])
    (message,) = pools(1).run(cases.load_error, model_dir=model_dir, path=path, stage="zero2")
    assert "ranks 2" in message and "this run has 1" in message
