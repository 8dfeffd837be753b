"""Random states: the same seed gives the same numbers, and a restored state goes on where it was saved."""

import random

import numpy as np
import pytest
import torch

from dsft.runtime.seeds import random_state, restore_random_state, seed_everything


@pytest.fixture(autouse=True)
def leave_no_trace():
    before = random_state()
    yield
    restore_random_state(before)
    torch.use_deterministic_algorithms(False)


def draw() -> tuple:
    return random.random(), float(np.random.rand()), float(np.random.randn()), *torch.rand(3).tolist()


def test_a_seed_sets_every_generator():
    seed_everything(7)
    first = draw()
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert all(a != b for a, b in zip(draw(), first))


def test_a_seed_may_be_larger_than_numpy_takes():
    seed_everything(2**32 + 5)
    first = np.random.rand()
    np.random.seed(5)
    assert np.random.rand() == first


def test_a_restored_state_goes_on_with_the_same_numbers(tmp_path):
    """Through a file, as in a checkpoint; half of a pair of normal numbers already drawn."""
    seed_everything(3)
    random.gauss(0, 1), np.random.randn()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw(), random.gauss(0, 1), torch.nn.functional.dropout(torch.ones(50)).tolist()
    seed_everything(4)
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=False))
    assert (draw(), random.gauss(0, 1), torch.nn.functional.dropout(torch.ones(50)).tolist()) == expected


def test_saving_a_state_draws_nothing():
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    random_state()
    assert draw() == expected


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_kernels_are_asked_for_only_when_wanted(wanted):
    seed_everything(0, deterministic=wanted)
    assert torch.are_deterministic_algorithms_enabled() is wanted
