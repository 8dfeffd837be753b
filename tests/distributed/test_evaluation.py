"""Evaluation gives the same numbers for any batch size and number of ranks, and the right ones."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

EXAMPLES = 23


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def expected(model_dir):
    """A loop over single examples with transformers alone."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    nll = correct = tokens = 0.0
    for example in tiny.examples(EXAMPLES):
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        targets = torch.where(torch.from_numpy(example.supervised[1:]), ids[0, 1:], -100)
        nll += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        correct += int((logits.argmax(-1) == targets)[targets != -100].sum())
        tokens += int((targets != -100).sum())
    return {"eval/loss": nll / tokens, "eval/token_accuracy": correct / tokens, "eval/supervised_tokens": tokens}


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 64, None])
@pytest.mark.parametrize("ranks", [1, 2])
def test_any_batch_size_and_world(pools, model_dir, expected, ranks, micro_batch_size, stage):
    """23 examples over 2 ranks are ragged; none is counted twice or left out (transformers#39241, trl#7010)."""
    rows = pools(ranks).run(
        cases.evaluate, model_dir=model_dir, micro_batch_size=micro_batch_size, stage=stage, examples=EXAMPLES
    )
    for found in rows:
        assert found["eval/examples"] == EXAMPLES
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6), name


def test_fewer_examples_than_ranks(pools, model_dir):
    """A rank with nothing to evaluate still takes part, or ZeRO-3 would hang (DeepSpeed#5394)."""
    for found in pools(2).run(cases.evaluate, model_dir=model_dir, micro_batch_size=1, stage="zero3", examples=1):
        assert found["eval/examples"] == 1


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_answers_are_those_of_transformers(pools, model_dir, stage):
    """Greedy answers under ZeRO-3 equal a plain generate (LLaMA-Factory#5629)."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts = [[5, 6, 7, 8], [300, 4, 9]]
    plain = [
        model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, len(p) :].tolist() for p in prompts
    ]
    for found in pools(2).run(cases.generate, model_dir=model_dir, prompts=prompts, stage=stage):
        assert found == plain
