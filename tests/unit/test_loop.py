"""When things happen, with a scripted engine in place of a real one: the loop's own decisions and nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny
import torch

from dsft import checkpoint, loop
from dsft.config.schema import ScheduleConfig, ScheduleName, TrainConfig
from dsft.data.loader import Step
from dsft.errors import UserError
from dsft.metrics import Tally
from dsft.optim import Schedule


class Engine:
    """Takes steps that are applied as `applied` says."""

    grad_norm, loss_scale = 1.0, None

    def __init__(self, applied):
        self._applied = iter(applied)
        self.multipliers = []

    def forward_seconds(self):
        return 0.001

    def train_step(self, batches, supervised, multiplier):
        self.multipliers.append(multiplier)
        sums = {"loss": 2.0 * supervised, "correct": 1.0, "weight": float(supervised)}
        return Tally({k: torch.tensor(v, dtype=torch.float64) for k, v in sums.items()}), next(self._applied, True)


class World:
    rank, size, is_main, device = 0, 1, True, torch.device("cpu")

    def gather(self, values):
        return [values]

    def gather_objects(self, value):
        return [value]


class Loader:
    steps = 0

    def ahead(self, count, device):
        for _ in range(count):
            self.steps += 1
            yield Step(batches=[], tokens=10, weight=4, epoch=0)

    @property
    def epochs(self):
        return self.steps // 10

    def progress(self):
        return self.steps / 10

    def state_dict(self):
        return {"epoch": 0, "step_in_epoch": self.steps, "global_batch_size": 1}


class Evaluator:
    """Finds the losses it is given, the first of them before step 0."""

    problems: ClassVar[list[str]] = []
    about: ClassVar[dict] = {}

    def __init__(self, losses):
        self.losses = iter(losses)

    def metrics(self, engine, bar):
        return {"eval/loss": next(self.losses)}

    def answers(self, engine):
        return [], self.problems


class Tracker:
    def __init__(self):
        self.rows, self.notes = [], []

    def write(self, row):
        self.rows.append(row)

    def note(self, message):
        self.notes.append(message)

    def bar(self, *_): ...

    def samples(self, *_): ...

    def about(self, *_): ...


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A loop whose checkpoints are only written down."""
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda run_dir, step, *rest: saved.append(step) or run_dir)
    monkeypatch.setattr(checkpoint, "retain", lambda *_: None)

    def build(losses=None, applied=(), total=12, schedule=None, stop=None, **train):
        made = loop.Loop(
            engine=Engine(applied),
            loader=Loader(),
            evaluator=Evaluator(losses) if losses else None,
            metrics=tiny.METRICS,
            schedule=Schedule(schedule or ScheduleConfig(name=ScheduleName.constant), total),
            tracker=Tracker(),
            world=World(),
            stop=SimpleNamespace(received=stop),
            train=TrainConfig(**({"eval_every": 4, "save_every": 5} | train)),
            total_steps=total,
            peak_lr=1.0,
            run_dir=tmp_path,
            save_frozen=True,
            extra_state=dict,
        )
        made.saved = saved
        return made

    return build


def evaluated(made):
    return [row["step"] for row in made.tracker.rows if "eval/loss" in row]


def logged(made):
    return [row["step"] for row in made.tracker.rows if "train/loss" in row]


def test_evaluates_before_along_the_way_and_at_the_end(make):
    made = make(losses=[9] * 9, total=10)
    assert made.run() is None
    assert evaluated(made) == [0, 4, 8, 10]


def test_saves_where_due_at_every_best_and_at_the_end(make):
    made = make(losses=[9, 5, 6, 4], total=12)
    made.run()
    assert made.saved == [4, 5, 10, 12]
    assert (made.counters.best, made.counters.best_step) == (4, 12)


def test_rows_hold_declared_metrics_and_the_last_step_is_always_logged(make):
    made = make(total=7, log_every=3)
    made.run()
    assert logged(made) == [3, 6, 7]
    assert all(name in tiny.METRICS for row in made.tracker.rows for name in row if name != "step")
    assert made.tracker.rows[-1]["train/tokens"] == 70
    assert made.tracker.rows[-1]["train/loss"] == 2.0


def test_early_stop_counts_from_the_last_real_improvement(make):
    """Three evaluations that gain less than the least change, together or apart, end the run."""
    made = make(losses=[9, 5, 4.95, 4.92, 4.91, 1], total=100, early_stopping_patience=3, early_stopping_min_delta=0.1)
    made.run()
    assert made.counters.step == 16
    assert made.counters.best_step == 16
    assert any("early stop" in note for note in made.tracker.notes)


def test_slow_but_steady_improvement_is_improvement(make):
    made = make(losses=[9, 5, 4.95, 4.85, 4.8], total=16, early_stopping_patience=2, early_stopping_min_delta=0.1)
    made.run()
    assert made.counters.finished == "steps"


def test_skipped_steps_do_not_move_the_schedule(make):
    schedule = ScheduleConfig(name=ScheduleName.linear, warmup_steps=4)
    made = make(applied=[True, False, False, True], total=8, schedule=schedule)
    made.run()
    assert made.engine.multipliers[:5] == [0.25, 0.5, 0.5, 0.5, 0.75]
    assert made.counters.skipped_steps == 2


def test_endless_skipping_stops_with_a_diagnosis(make):
    made = make(applied=[True] + [False] * 9, max_skipped_steps=3)
    with pytest.raises(UserError, match=r"3 steps in a row were skipped, the last one step 4 .*optim\.lr"):
        made.run()
    assert logged(made)[-1] == 4


def test_a_stop_request_saves_and_leaves(make):
    made = make(stop="SIGTERM")
    assert made.run() == "SIGTERM"
    assert made.saved == [1]
    assert made.counters.finished is None


def test_a_best_metric_that_evaluations_do_not_give_is_refused_before_the_first_step(make):
    made = make(losses=[9] * 9, best_metric="eval/perplexity")
    with pytest.raises(UserError, match=r"train\.best_metric=eval/perplexity.* one of eval/loss\."):
        made.run()
    assert made.counters.step == 0


def test_no_validation_set_means_no_evaluation(make):
    made = make(total=5)
    made.run()
    assert evaluated(made) == [] and made.counters.best is None


def test_samples_that_cannot_be_had_are_counted_and_do_not_end_a_run(make):
    made = make(losses=[9] * 9, total=4)
    made.evaluator.problems = ["rank 1: RuntimeError: out of memory", "another"]
    assert made.run() is None
    warnings = [note for note in made.tracker.notes if note.startswith("warning: 2 of 2 samples")]
    assert len(warnings) == 2  # before the first step and at the end
    assert "rank 1: RuntimeError: out of memory" in warnings[0]


def test_an_evaluation_that_is_not_finite_is_never_the_best(make):
    nan, inf = math.nan, math.inf
    made = make(losses=[9, nan, inf, 5, nan], total=16)
    made.run()
    assert (made.counters.best, made.counters.best_step, made.counters.patience_best) == (5, 12, 5)
    made = make(losses=[9] + [nan] * 9, total=40, early_stopping_patience=2)
    made.run()
    assert made.counters.finished == "early stop" and made.counters.best is None
    assert any("the best is not known" in note for note in made.tracker.notes)
