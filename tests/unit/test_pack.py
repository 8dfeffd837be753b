"""Which examples share a row and a step: a function of lengths, seed and epoch alone."""

import itertools

import numpy as np
import pytest

from dsft.config.schema import Packing
from dsft.data.pack import Planner, best_fit_decreasing, plan_epoch, share

LENGTHS = np.random.default_rng(0).integers(3, 41, 107)
CAPACITY, WINDOW = 48, 20


def plan(packing=Packing.bfd, seed=0, epoch=0, window=WINDOW):
    return plan_epoch(LENGTHS, packing, CAPACITY, window, seed, epoch)


def planner(packing: Packing, global_batch_size: int, lengths=LENGTHS) -> Planner:
    return Planner(lengths, packing, CAPACITY, WINDOW, 0, global_batch_size)


def slow_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, word for word: every bin is looked at for every item."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [capacity - sum(lengths[i] for i in bin_) for bin_ in bins]
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            bins[min(fitting, key=lambda number: rooms[number])].append(item)
        else:
            bins.append([item])
    return bins


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying every assignment."""
    for count in range(1, len(lengths) + 1):
        for places in itertools.product(range(count), repeat=len(lengths)):
            if np.bincount(places, weights=lengths, minlength=count).max() <= capacity:
                return count
    raise AssertionError


def test_best_fit_decreasing_can_be_read():
    # 7 first; 5 opens a second bin; 3 fits the first exactly, the next 3 the second; 2 fills that one
    assert best_fit_decreasing([3, 5, 2, 7, 3], capacity=10) == [[3, 0], [1, 4, 2]]


def test_best_fit_decreasing_is_its_definition_on_many_small_cases():
    random = np.random.default_rng(1)
    for _ in range(300):
        lengths = random.integers(1, 12, random.integers(0, 14)).tolist()
        assert best_fit_decreasing(lengths, 11) == slow_best_fit_decreasing(lengths, 11)


def test_best_fit_decreasing_is_near_the_fewest_rows_possible():
    random = np.random.default_rng(2)
    for _ in range(20):
        lengths = random.integers(1, 11, 5).tolist()
        # the bound of Johnson (1974), 11/9 of the fewest, plus less than one bin
        assert len(best_fit_decreasing(lengths, 10)) <= 11 / 9 * fewest_bins(lengths, 10) + 1


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_example_stands_in_exactly_one_row_of_an_epoch(packing, epoch):
    made = plan(packing, epoch=epoch)
    rows = [made.row(number) for number in range(made.rows)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(LENGTHS)))
    assert all(len(row) for row in rows)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_no_row_is_longer_than_the_capacity(epoch):
    made = plan(epoch=epoch)
    filled = [LENGTHS[made.row(number)].sum() for number in range(made.rows)]
    assert max(filled) <= CAPACITY
    assert np.mean(filled) > 0.8 * CAPACITY


def test_an_example_as_long_as_a_row_gets_one_to_itself():
    made = plan_epoch(np.array([48, 1, 48, 47]), Packing.bfd, CAPACITY, WINDOW, 0, 0)
    assert sorted(sorted(made.row(number).tolist()) for number in range(made.rows)) == [[0], [1, 3], [2]]


def test_without_packing_a_row_is_an_example():
    made = plan(Packing.none)
    assert [made.row(number).tolist() for number in range(3)] == [[i] for i in made.examples[:3]]
    assert made.rows == len(LENGTHS)


@pytest.mark.parametrize("packing", Packing)
def test_order_depends_on_seed_and_epoch_alone(packing):
    np.random.seed(11)
    first = plan(packing, seed=3, epoch=2)
    np.random.seed(12)
    again = plan(packing, seed=3, epoch=2)
    assert first.examples.tolist() == again.examples.tolist()
    assert first.starts.tolist() == again.starts.tolist()


@pytest.mark.parametrize("packing", Packing)
def test_every_epoch_and_every_seed_has_an_order_of_its_own(packing):
    """ms-swift#10050: past epoch 0, everything saw epoch 0's order again."""
    orders = {tuple(plan(packing, seed=seed, epoch=epoch).examples) for seed in range(3) for epoch in range(4)}
    assert len(orders) == 12


def test_long_examples_do_not_all_come_first():
    made = plan()
    first_window = LENGTHS[made.examples[:WINDOW]]
    assert first_window.tolist() != sorted(first_window.tolist(), reverse=True)


def test_examples_are_packed_only_within_their_window():
    made = plan(Packing.bfd, window=WINDOW)
    shuffled = plan(Packing.none).examples
    windows = {int(example): place // WINDOW for place, example in enumerate(shuffled)}
    for number in range(made.rows):
        assert len({windows[int(i)] for i in made.row(number)}) == 1


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("size", [1, 4, 7, 107, 500])
def test_steps_per_epoch_and_their_total_are_what_the_epochs_hold(packing, size):
    """axolotl#3152: the number of steps with packing was a guess."""
    made = planner(packing, size)
    counted = 0
    for epoch in range(3):
        rows = [made.step_rows(epoch, step) for step in range(made.steps(epoch))]
        sizes = [len(step) for step in rows]
        assert sizes[:-1] == [size] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= size
        seen = np.concatenate([row for step in rows for row in step])
        assert sorted(seen.tolist()) == list(range(len(LENGTHS)))
        counted += len(rows)
        assert made.total_steps(epoch + 1, None) == counted


def test_total_steps_by_hand():
    made = planner(Packing.none, 4, lengths=np.full(10, 5))  # 10 rows: steps of 4, 4 and 2
    assert made.steps(0) == 3
    assert made.total_steps(epochs=1, max_steps=None) == 3
    assert made.total_steps(epochs=4, max_steps=None) == 12
    assert made.total_steps(epochs=4, max_steps=5) == 5
    assert made.total_steps(epochs=1, max_steps=5) == 3
    assert made.total_steps(epochs=None, max_steps=7) == 7


def test_epochs_may_differ_in_length_and_both_are_counted():
    steps = [planner(Packing.bfd, 1).steps(epoch) for epoch in range(6)]
    assert len(set(steps)) > 1, "the case does not show what it is for"
    assert planner(Packing.bfd, 1).total_steps(6, None) == sum(steps)


def test_the_audit_counts_rows_and_how_full_they_are():
    told = planner(Packing.none, 4, lengths=np.array([12, 24, 36])).describe()
    assert told == {
        "packing": "none",
        "examples": 3,
        "rows": 3,
        "steps_per_epoch": 1,
        "examples_per_row": 1.0,
        "row_fill": 72 / (3 * CAPACITY),
    }


def test_share_can_be_read():
    # 9 -> bin 0, 8 -> bin 1, 2 -> bin 1 (8 < 9), 1 -> bin 0
    assert share([1, 9, 2, 8], bins=2, capacity=2) == [[0, 1], [2, 3]]
    assert share([5], bins=3, capacity=2) == [[0], [], []]


def test_shares_hold_every_row_once_and_never_too_many():
    random = np.random.default_rng(3)
    for _ in range(200):
        bins, capacity = random.integers(1, 7, 2).tolist()
        loads = random.integers(1, 100, random.integers(1, bins * capacity + 1)).tolist()
        shares = share(loads, bins, capacity)
        assert len(shares) == bins
        assert sorted(row for rows in shares for row in rows) == list(range(len(loads)))
        assert max(map(len, shares)) <= capacity


def test_shares_are_balanced():
    random = np.random.default_rng(4)
    for _ in range(50):
        loads = random.integers(1, 100, 32).tolist()
        weights = [sum(loads[row] for row in rows) for rows in share(loads, bins=4, capacity=32)]
        # the lightest bin took the last row of the heaviest one's time: they differ by one row at most
        assert max(weights) - min(weights) <= max(loads)
    even = share([10] * 12, bins=4, capacity=3)
    assert [len(rows) for rows in even] == [3, 3, 3, 3]
