"""From global step to every rank's micro-batches: the same examples however the step is split."""

from itertools import islice

import numpy as np
import pytest
import tiny

from dsft.config.schema import Packing
from dsft.data.loader import Loader, Step, evaluation_batches
from dsft.data.pack import Planner
from dsft.errors import UserError
from dsft.types import Example

GLOBAL_BATCH = 12
SPLITS = [
    (ranks, accumulation) for ranks in (1, 2, 3, 4) for accumulation in (1, 2, 3) if 12 % (ranks * accumulation) == 0
]


def data(count: int = 62) -> list[Example]:
    """Examples whose every token is the example's number, so that a batch tells what it holds."""
    random = np.random.default_rng(0)
    made = []
    for number in range(count):
        length = int(random.integers(2, 33))
        supervised = random.random(length) < 0.5
        supervised[0], supervised[-1] = False, True
        made.append(tiny.example(np.full(length, number, dtype=np.int32), supervised))
    return made


PACKINGS = [packing for packing in Packing if packing is not Packing.auto]
DATA = data()
LENGTHS = np.array([len(e.ids) for e in DATA])
SUPERVISED = np.array([e.columns["weights"].sum() for e in DATA])


def loader(rank=0, ranks=1, accumulation=1, packing=Packing.bfd, global_batch=GLOBAL_BATCH) -> Loader:
    planner = Planner(LENGTHS, packing, 40, 16, seed=3, global_batch_size=global_batch)
    micro = global_batch // ranks // accumulation
    return Loader(DATA, LENGTHS, SUPERVISED, planner, rank, ranks, micro, accumulation, tiny.collate)


def examples_of(step: Step) -> list[int]:
    """Numbers of the examples in a rank's micro-batches."""
    documents = [d for b in step.batches if b.examples for d in b.tensors["input_ids"][0].split(b.lengths)]
    assert all(len(set(document.tolist())) == 1 for document in documents)
    return [int(document[0]) for document in documents]


def global_steps(ranks: int, accumulation: int, packing: Packing, count: int) -> list[list[Step]]:
    """The first steps, each as the list of what every rank got."""
    loaders = [loader(rank, ranks, accumulation, packing) for rank in range(ranks)]
    return list(islice(zip(*loaders), count))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("ranks", "accumulation"), SPLITS)
def test_a_global_step_holds_the_same_examples_for_any_ranks_and_accumulation(ranks, accumulation, packing):
    expected = [sorted(examples_of(step)) for (step,) in global_steps(1, 1, packing, 15)]
    steps = global_steps(ranks, accumulation, packing, 15)
    assert [sorted(i for step in shares for i in examples_of(step)) for shares in steps] == expected


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("ranks", "accumulation"), SPLITS)
def test_an_epoch_holds_every_example_once_and_its_counts_are_true(ranks, accumulation, packing):
    per_epoch = loader(packing=packing)._planner.steps(0)
    steps = global_steps(ranks, accumulation, packing, per_epoch)
    seen = [i for shares in steps for step in shares for i in examples_of(step)]
    assert sorted(seen) == list(range(len(DATA)))
    for shares in steps:
        assert all(len(step.batches) == accumulation for step in shares)
        # every rank knows the whole step's counts without asking the others
        assert {step.weight for step in shares} == {sum(b.weight for s in shares for b in s.batches)}
        assert {step.tokens for step in shares} == {sum(b.tokens for s in shares for b in s.batches)}


def test_the_ragged_last_step_counts_all_its_tokens_and_fillers_weigh_nothing():
    steps = global_steps(4, 3, Packing.none, 6)
    last = steps[5]  # 62 examples: five steps of 12, and 2 left for 12 micro-batches
    batches = [b for step in last for b in step.batches]
    real = [b for b in batches if b.examples]
    assert (len(batches), len(real)) == (12, 2)
    assert sum(b.tokens for b in batches) == sum(LENGTHS[i] for step in last for i in examples_of(step))
    assert all((b.weight, b.tokens) == (0, 0) for b in batches if not b.examples)
    assert last[0].weight == sum(b.weight for b in real)
    assert [step.epoch for step in last] == [0] * 4


def test_the_next_epoch_follows_with_another_order():
    source = iter(loader(packing=Packing.none))
    epochs = [[examples_of(next(source)) for _ in range(6)] for _ in range(2)]
    assert sorted(sum(epochs[0], [])) == sorted(sum(epochs[1], [])) == list(range(62))
    assert epochs[0] != epochs[1]
    assert next(source).epoch == 2


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("done", [0, 1, 4, 5, 6, 9])
def test_a_cursor_goes_on_in_the_middle_of_any_epoch_as_if_nothing_had_happened(packing, done):
    """accelerate#4071: a resumed sampler began the epoch again. verl#7401: at its end, nothing was trained any more."""
    straight = loader(1, 2, 2, packing)
    source = iter(straight)
    for _ in range(done):
        next(source)
    state, progress = straight.state_dict(), straight.progress()
    rest = [(s.epoch, examples_of(s)) for s in islice(source, 14)]
    resumed = loader(1, 2, 2, packing)
    resumed.load_state_dict(state)
    assert resumed.progress() == progress
    assert [(s.epoch, examples_of(s)) for s in islice(resumed, 14)] == rest


def test_a_cursor_goes_on_with_other_ranks_and_the_same_global_batch():
    straight = loader()
    source = iter(straight)
    for _ in range(4):
        next(source)
    state = straight.state_dict()
    expected = [sorted(examples_of(step)) for step in islice(source, 8)]
    wider = [loader(rank, 3, 2) for rank in range(3)]
    for one in wider:
        one.load_state_dict(state)
    assert [sorted(i for s in shares for i in examples_of(s)) for shares in islice(zip(*wider), 8)] == expected


def test_a_cursor_stands_behind_the_step_that_was_handed_out():
    one = loader(packing=Packing.none)
    source = iter(one)
    assert one.state_dict()["step_in_epoch"] == 0
    next(source)
    assert one.state_dict()["step_in_epoch"] == 1
    assert one.progress() == pytest.approx(1 / 6)
    list(islice(source, 5))
    assert one.progress() == 1.0
    assert (one.state_dict()["epoch"], one.state_dict()["step_in_epoch"]) == (1, 0), "an epoch's end is no middle"


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("batch.global_batch_size", 8),
        ("data.packing", "none"),
        ("data.pack_window", 99),
        ("data.max_length", 64),
        ("train.seed", 4),
    ],
)
def test_a_cursor_of_another_plan_is_refused_within_an_epoch_only(knob, value):
    """Going on by another plan would repeat some examples and leave out others, in silence."""
    plan = loader().state_dict()["plan"] | {knob: value}
    with pytest.raises(UserError, match=rf"planned with {knob}={value}.* set {knob}={value}"):
        loader().load_state_dict({"epoch": 0, "step_in_epoch": 2, "plan": plan})
    between = loader()
    between.load_state_dict({"epoch": 1, "step_in_epoch": 0, "plan": plan})
    assert next(iter(between)).epoch == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 64, None])
def test_evaluation_sees_every_example_once_and_all_ranks_take_as_many_passes(ranks, micro_batch_size):
    """OpenRLHF drops the tail of the evaluation set; trl#7010 counts some of it twice."""
    shares = [evaluation_batches(LENGTHS, rank, ranks, micro_batch_size, 96) for rank in range(ranks)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(DATA)))
    assert len({len(share) for share in shares}) == 1
    for batch in (batch for share in shares for batch in share):
        if micro_batch_size is None:
            assert LENGTHS[batch].sum() <= 96
        else:
            assert len(batch) <= micro_batch_size


def test_an_example_above_the_budget_is_evaluated_alone():
    assert evaluation_batches(np.array([3, 500, 4]), 0, 1, None, 8) == [[1], [2, 0]]
