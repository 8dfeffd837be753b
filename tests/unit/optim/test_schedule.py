"""Learning-rate schedules against their closed forms and against transformers."""

import json
import math
import warnings

import pytest
import torch
import transformers

from dsft.config.schema import ScheduleConfig, ScheduleName, Unit
from dsft.errors import UserError
from dsft.optim import Schedule, apply

CONSTANT, LINEAR, COSINE = ScheduleName.constant, ScheduleName.linear, ScheduleName.cosine
STEP, EXPONENTIAL, PLATEAU = ScheduleName.step, ScheduleName.exponential, ScheduleName.plateau

EVERY_SCHEDULE = [
    ScheduleConfig(name=CONSTANT, warmup_steps=3),
    ScheduleConfig(name=LINEAR, warmup_steps=3, min_lr_ratio=0.1),
    ScheduleConfig(name=COSINE, warmup_steps=3, min_lr_ratio=0.1),
    ScheduleConfig(name=COSINE, warmup_steps=3, restarts=2),
    ScheduleConfig(name=STEP, warmup_steps=3, step_size=2, gamma=0.7),
    ScheduleConfig(name=STEP, warmup_steps=3, step_size=4, gamma=0.7, unit=Unit.steps),
    ScheduleConfig(name=EXPONENTIAL, warmup_steps=3, gamma=0.7),
    ScheduleConfig(name=EXPONENTIAL, warmup_steps=3, gamma=0.7, unit=Unit.steps),
    ScheduleConfig(name=PLATEAU, warmup_steps=3, gamma=0.5, patience=1, min_lr_ratio=0.1),
]


def named(config: ScheduleConfig) -> str:
    return f"{config.name.value}-{config.unit.value}-{config.restarts}"


def multipliers(schedule: Schedule, steps: int, steps_per_epoch: int = 10**9) -> list[float]:
    values = []
    for number in range(1, steps + 1):
        values.append(schedule.multiplier)
        schedule.step(applied=True, epochs=number // steps_per_epoch)
    return values


def test_constant_rises_and_stays():
    schedule = Schedule(ScheduleConfig(name=CONSTANT, warmup_steps=4), total_steps=6)
    assert multipliers(schedule, 8) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1], rel=1e-12)


def test_linear_falls_to_its_floor_and_stays():
    schedule = Schedule(ScheduleConfig(name=LINEAR, min_lr_ratio=0.2), total_steps=4)
    assert multipliers(schedule, 6) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2], rel=1e-12)


def test_cosine_falls_to_its_floor_and_stays():
    schedule = Schedule(ScheduleConfig(name=COSINE, min_lr_ratio=0.2), total_steps=4)
    slope = 0.4 * math.cos(math.pi / 4)
    assert multipliers(schedule, 6) == pytest.approx([1, 0.6 + slope, 0.6, 0.6 - slope, 0.2, 0.2], rel=1e-12)


def test_cosine_restarts_split_the_run_evenly():
    schedule = Schedule(ScheduleConfig(name=COSINE, restarts=2), total_steps=6)
    assert multipliers(schedule, 8) == pytest.approx([1, 0.5, 1, 0.5, 1, 0.5, 0, 0], abs=1e-15)


def test_step_decays_every_so_many_steps_after_warm_up():
    config = ScheduleConfig(name=STEP, unit=Unit.steps, step_size=2, gamma=0.5, warmup_steps=1)
    schedule = Schedule(config, total_steps=7)
    assert multipliers(schedule, 7) == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_step_decays_at_the_ends_of_epochs():
    config = ScheduleConfig(name=STEP, unit=Unit.epochs, step_size=2, gamma=0.5, warmup_steps=1)
    schedule = Schedule(config, total_steps=10)
    assert multipliers(schedule, 10, 2) == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_exponential_decays_every_step_after_warm_up():
    config = ScheduleConfig(name=EXPONENTIAL, unit=Unit.steps, gamma=0.5, warmup_steps=2)
    schedule = Schedule(config, total_steps=6)
    assert multipliers(schedule, 6) == [0.5, 1, 1, 0.5, 0.25, 0.125]


def test_exponential_decays_at_the_ends_of_epochs_outside_warm_up():
    config = ScheduleConfig(name=EXPONENTIAL, unit=Unit.epochs, gamma=0.5, warmup_steps=4)
    schedule = Schedule(config, total_steps=9)
    assert multipliers(schedule, 9, 3) == [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", [STEP, EXPONENTIAL])
def test_decays_in_epochs_follow_the_data_where_epochs_differ_and_steps_are_skipped(name):
    """Packing makes epochs of 4, 3 and 5 steps; the last step of the second and all of the third are skipped."""
    schedule = Schedule(ScheduleConfig(name=name, unit=Unit.epochs, gamma=0.5), total_steps=16)
    seen, number = [], 0
    for epoch, steps in enumerate([4, 3, 5, 4]):
        for place in range(1, steps + 1):
            seen.append(schedule.multiplier)
            number += 1
            schedule.step(applied=not (number == 7 or epoch == 2), epochs=epoch + (place == steps))
            resumed = Schedule(ScheduleConfig(name=name, unit=Unit.epochs, gamma=0.5), total_steps=16)
            resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
            assert resumed.multiplier == schedule.multiplier
    assert seen == [1] * 4 + [0.5] * 3 + [0.25] * 5 + [0.125] * 4


def test_plateau_decays_when_patience_is_over_and_stops_at_its_floor():
    config = ScheduleConfig(name=PLATEAU, gamma=0.5, patience=1, min_lr_ratio=0.3)
    schedule = Schedule(config, total_steps=100)
    seen = []
    for loss in [3.0, 2.0, 2.1, 2.0, 1.999, 2.5, 2.5, 2.5, 2.5]:
        schedule.evaluated({"eval/loss": loss})
        schedule.step(applied=True, epochs=0)
        seen.append(schedule.multiplier)
    #      first  better  bad  bad: decay  better  bad  bad: floor  bad  bad
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3]


@pytest.mark.parametrize(("metric", "rises_are_good"), [("eval/loss", False), ("eval/token_accuracy", True)])
def test_plateau_knows_which_way_a_metric_improves(metric, rises_are_good):
    config = ScheduleConfig(name=PLATEAU, gamma=0.5, patience=0, metric=metric)
    schedule = Schedule(config, 10, "higher" if rises_are_good else "lower")
    for value in [0.1, 0.2, 0.3]:
        schedule.evaluated({metric: value})
    assert schedule.multiplier == (1 if rises_are_good else 0.25)


def test_plateau_does_not_judge_warm_up():
    schedule = Schedule(ScheduleConfig(name=PLATEAU, gamma=0.5, patience=0, warmup_steps=2), 10)
    for loss in [1.0, 2.0]:
        schedule.evaluated({"eval/loss": loss})
        schedule.step(applied=True, epochs=0)
    assert schedule.multiplier == 1


def test_plateau_names_the_metrics_there_are():
    schedule = Schedule(ScheduleConfig(name=PLATEAU, metric="eval/los"), 10)
    with pytest.raises(UserError, match=r"schedule\.metric=eval/los.*eval/loss"):
        schedule.evaluated({"eval/loss": 1.0})


@pytest.mark.parametrize("name", [LINEAR, COSINE])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_rounding_does_not_build_up_over_a_long_run(name, floor):
    total, warmup = 20_000, 500
    schedule = Schedule(ScheduleConfig(name=name, warmup_steps=warmup, min_lr_ratio=floor), total)
    for k, value in enumerate(multipliers(schedule, total)):
        done = (k - warmup) / (total - warmup)
        fall = 1 - done if name is LINEAR else (1 + math.cos(math.pi * done)) / 2
        expected = (k + 1) / warmup if k < warmup else floor + (1 - floor) * fall
        assert math.isclose(value, expected, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            ScheduleConfig(name=CONSTANT, warmup_steps=5),
            lambda o: transformers.get_constant_schedule_with_warmup(o, num_warmup_steps=5),
        ),
        (
            ScheduleConfig(name=LINEAR, warmup_steps=5),
            lambda o: transformers.get_linear_schedule_with_warmup(o, 5, num_training_steps=33),
        ),
        (
            ScheduleConfig(name=COSINE, warmup_ratio=0.15),
            lambda o: transformers.get_cosine_schedule_with_warmup(o, 5, num_training_steps=33),
        ),
        (
            ScheduleConfig(name=COSINE, warmup_steps=5, restarts=2),
            lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 5, 33, num_cycles=3),
        ),
    ],
    ids=["constant", "linear", "cosine", "restarts"],
)
def test_agrees_with_transformers_but_for_a_warm_up_one_step_ahead(config, reference):
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
    scheduler = reference(optimizer)
    theirs = []
    for _ in range(34):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = multipliers(Schedule(config, 33), 34)
    assert ours[:5] == pytest.approx(theirs[1:6], rel=1e-9)
    assert ours[5:] == pytest.approx(theirs[5:], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("config", EVERY_SCHEDULE, ids=named)
def test_goes_on_bit_for_bit_from_every_step(config):
    total, steps_per_epoch = 20, 3
    straight = Schedule(config, total)
    states, values = [], []
    for k in range(total + 2):
        states.append(json.dumps(straight.state_dict(), allow_nan=False))
        values.append(straight.multiplier)
        straight.step(applied=True, epochs=(k + 1) // steps_per_epoch)
        straight.evaluated({"eval/loss": 1 / (1 + k % 4)})
    assert len(set(values)) >= 3
    for start, state in enumerate(states):
        resumed = Schedule(config, total)
        resumed.load_state_dict(json.loads(state))
        for k in range(start, total + 2):
            assert resumed.multiplier == values[k]
            resumed.step(applied=True, epochs=(k + 1) // steps_per_epoch)
            resumed.evaluated({"eval/loss": 1 / (1 + k % 4)})


def test_a_longer_run_resumes_on_its_own_curve():
    config = ScheduleConfig(name=LINEAR)
    first, longer = Schedule(config, 10), Schedule(config, 20)
    multipliers(first, 5)
    longer.load_state_dict(first.state_dict())
    assert longer.multiplier == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize("config", EVERY_SCHEDULE, ids=named)
def test_a_warm_up_longer_than_the_run_only_rises(config):
    config = ScheduleConfig(**{**vars(config), "warmup_steps": 8})
    schedule = Schedule(config, total_steps=4)
    assert multipliers(schedule, 4) == pytest.approx([0.125, 0.25, 0.375, 0.5], rel=1e-12)


@pytest.mark.parametrize("config", EVERY_SCHEDULE, ids=named)
def test_torch_finds_nothing_to_warn_of(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = Schedule(config, 20)
        multipliers(schedule, 20, 3)
        schedule.evaluated({"eval/loss": 1.0})


def test_apply_keeps_the_ratios_of_layer_wise_rates():
    groups = [{"lr": 0.0, "initial_lr": 0.4}, {"lr": 0.0, "initial_lr": 0.1}]
    apply(groups, 0.5)
    assert [group["lr"] for group in groups] == [0.2, 0.05]
