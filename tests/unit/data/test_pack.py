"""Which examples share a row and a step: a function of lengths, seed and epoch alone."""

import itertools

import numpy as np
import pytest

from dsft.config.schema import Packing
from dsft.data.pack import Planner, best_fit_decreasing, plan_epoch, share, share_alike

LENGTHS = np.random.default_rng(0).integers(3, 41, 107)
CAPACITY, WINDOW, STEP = 48, 20, 4
PACKINGS = [packing for packing in Packing if packing is not Packing.auto]


def plan(packing=Packing.bfd, seed=0, epoch=0, window=WINDOW):
    return plan_epoch(LENGTHS, packing, CAPACITY, window, seed, epoch, STEP)


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


@pytest.mark.parametrize("packing", PACKINGS)
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
    made = plan_epoch(np.array([48, 1, 48, 47]), Packing.bfd, CAPACITY, WINDOW, 0, 0, STEP)
    assert sorted(sorted(made.row(number).tolist()) for number in range(made.rows)) == [[0], [1, 3], [2]]


def test_without_packing_a_row_is_an_example():
    made = plan(Packing.none)
    assert [made.row(number).tolist() for number in range(3)] == [[i] for i in made.examples[:3]]
    assert made.rows == len(LENGTHS)


@pytest.mark.parametrize("packing", PACKINGS)
def test_order_depends_on_seed_and_epoch_alone(packing):
    np.random.seed(11)
    first = plan(packing, seed=3, epoch=2)
    np.random.seed(12)
    again = plan(packing, seed=3, epoch=2)
    assert first.examples.tolist() == again.examples.tolist()
    assert first.starts.tolist() == again.starts.tolist()


@pytest.mark.parametrize("packing", PACKINGS)
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


@pytest.mark.parametrize("packing", PACKINGS)
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
    told = planner(Packing.none, 4, lengths=np.array([12, 24, 36])).describe(4)
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


def steps_of(made: Planner, epoch: int = 0) -> list[list[int]]:
    """Lengths of the rows of each step of an epoch of padded rows."""
    return [[int(made._lengths[row[0]]) for row in made.step_rows(epoch, step)] for step in range(made.steps(epoch))]


def test_a_step_of_padded_rows_holds_examples_of_like_length():
    made, plain = planner(Packing.padded, STEP), planner(Packing.none, STEP)
    spread = [np.mean([max(step) - min(step) for step in steps_of(one)[:-1]]) for one in (made, plain)]
    assert spread[0] < spread[1] / 2
    steps = [np.mean(step) for step in steps_of(made)]
    assert steps != sorted(steps) and steps != sorted(steps, reverse=True), "steps go from short to long"


def test_padded_rows_stay_within_their_window_of_whole_steps():
    shuffled = plan(Packing.none).examples
    made = plan_epoch(LENGTHS, Packing.padded, CAPACITY, 23, 0, 0, STEP).examples
    for begin in range(0, 107, 20):  # 23 examples are 5 steps of 4
        end = min(begin + 20, 104)
        assert sorted(made[begin:end]) == sorted(shuffled[begin:end])
        for step in range(begin, end, STEP):
            # a step is a run of the window's sorted lengths
            chosen, rest = LENGTHS[made[step : step + STEP]], set(made[begin:end]) - set(made[step : step + STEP])
            assert not [i for i in rest if chosen.min() < LENGTHS[i] < chosen.max()]
    assert made[104:].tolist() == shuffled[104:].tolist(), "the small last step is of no special length"


def test_fewer_examples_than_a_step_are_one_step():
    made = planner(Packing.padded, 500)
    assert made.steps(0) == 1
    assert sorted(row.item() for row in made.step_rows(0, 0)) == list(range(107))


def test_padded_shares_can_be_read():
    # sorted: 1 2 | 3 4 || 5 6 | 7 8: rank 0 takes the shortest first and the longest after
    loads = [8, 1, 7, 2, 6, 3, 5, 4]
    bins = share_alike(loads, ranks=2, accumulation=2)
    assert [[loads[row] for row in rows] for rows in bins] == [[1, 2], [3, 4], [8, 7], [6, 5]]
    assert share_alike([5, 3], ranks=2, accumulation=2) == [[1], [0], [], []]


def test_padded_shares_hold_every_row_once_never_too_many_and_pad_the_least():
    random = np.random.default_rng(5)
    for _ in range(200):
        ranks, accumulation, capacity = random.integers(1, 5, 3).tolist()
        bins = ranks * accumulation
        loads = random.integers(1, 100, random.integers(1, bins * capacity + 1)).tolist()
        shares = share_alike(loads, ranks, accumulation)
        assert len(shares) == bins
        assert sorted(row for rows in shares for row in rows) == list(range(len(loads)))
        assert max(map(len, shares)) <= capacity and max(map(len, shares)) - min(map(len, shares)) <= 1
        spans = sorted((min(loads[r] for r in rows), max(loads[r] for r in rows)) for rows in shares if rows)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_ranks_with_padded_rows_finish_together():
    random = np.random.default_rng(6)
    for _ in range(50):
        loads = random.integers(1, 100, 64).tolist()
        shares = share_alike(loads, ranks=4, accumulation=4)
        costs = [len(rows) * max(loads[row] for row in rows) for rows in shares]
        totals = [sum(costs[rank::4]) for rank in range(4)]
        assert max(totals) < 1.15 * min(totals)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_audit_counts_padding(micro):
    made = planner(Packing.padded, STEP)
    positions = 0
    for step in steps_of(made):
        for bin_ in share_alike(step, 1, STEP // micro):
            positions += len(bin_) * max((step[row] for row in bin_), default=0)
    told = made.describe(micro)
    assert told["padding"] == pytest.approx(1 - LENGTHS.sum() / positions)
    assert (told["padding"] == 0) == (micro == 1)
    assert "row_fill" not in told and told["examples_per_row"] == 1
