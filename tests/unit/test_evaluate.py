"""Samples that fail, seen from one rank."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import cases
import pytest
import tiny
import torch

from dsft import evaluate


class World:
    """Two ranks; what the other says is given. None: it says nothing."""

    rank, size, device = 1, 2, torch.device("cpu")

    def __init__(self, other: str | None):
        self.other, self.patience = other, []

    def exchange(self, message, seconds=None):
        self.patience.append(seconds)
        if self.other is None:
            raise TimeoutError("a rank said nothing for 4 s")
        return [self.other, message]


def answers(world, stage, generate):
    model = tiny.llama().eval()
    before = model.generation_config
    model.generate = generate

    @contextmanager
    def inference():
        with torch.no_grad():
            yield SimpleNamespace(model=model)

    data = cases._prompts([[5, 6, 7]])
    evaluator = evaluate.Evaluator(data, cases.sampling(1, 4), world, tiny.METRICS, None, 96)
    try:
        return evaluator.answers(SimpleNamespace(stage=stage, inference=inference))
    finally:
        assert model.generation_config is before


def broken(**_):
    raise KeyError("no such token")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sample_that_fails_everywhere_is_a_problem_and_no_exception(stage):
    world = World("KeyError: 'no such token'")
    assert answers(world, stage, broken) == ([], ["record 1: rank 0: KeyError: 'no such token'"])
    assert world.patience == [evaluate.PATIENCE if stage == 3 else None]


def test_below_zero_3_one_rank_may_fail_alone():
    assert answers(World(""), 2, broken) == ([], ["record 1: rank 1: KeyError: 'no such token'"])


def test_under_zero_3_a_rank_that_fails_alone_ends_the_run_with_its_own_exception():
    with pytest.raises(KeyError, match="no such token"):
        answers(World(None), 3, broken)


def test_a_prompt_that_fills_the_model_is_counted():
    data = cases._prompts([[5] * 400])
    evaluator = evaluate.Evaluator(data, cases.sampling(1, 4), World(""), tiny.METRICS, None, 96)
    engine = SimpleNamespace(stage=2, inference=lambda: _inside(SimpleNamespace(model=tiny.llama())))
    assert evaluator.answers(engine) == ([], ["record 1: rank 1: ValueError: the prompt alone fills the model"])


@contextmanager
def _inside(module):
    yield module
