"""Declarations that act: forming, reducing, comparing and showing numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch

from dsft.metrics import Ledger, Metric, Reduction, Row, Tally, comparable, declare, form
from dsft.tasks import TASKS, metrics_table

ROOT = Path(__file__).parents[3]
NOW = {"grad_norm": 0.5, "lr": 1e-3, "epoch": 0.5, "tokens": 9, "weight_so_far": 8.0, "skipped_steps": 1}
CPU = torch.device("cpu")


def tally(**sums) -> Tally:
    return Tally({name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()})


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("SUM", 9.0), ("MEAN", 3.0), ("MIN", 1.0), ("MAX", 6.0), ("SAME", 2.0)],
)
def test_a_reduction_acts(reduction, expected):
    assert Reduction[reduction]([2.0, 1.0, 6.0]) == expected


def test_a_quotient_is_formed_once_from_sums_over_ranks():
    """Not a mean of the ranks' means, which would be 2.5 here."""
    ranks = {
        "loss": [1.0, 12.0],
        "weight": [1.0, 3.0],
        "correct": [1.0, 0.0],
        "examples": [2, 1],
        "eval_seconds": [1, 4],
    }
    row = form(tiny.METRICS, Row.EVALUATION, ranks)
    assert row == {
        "eval/loss": 3.25,
        "eval/perplexity": math.exp(3.25),
        "eval/token_accuracy": 0.25,
        "eval/examples": 3,
        "eval/supervised_tokens": 4,
        "time/eval_seconds": 4,
    }
    assert all(type(row[name]) is int for name in ("eval/examples", "eval/supervised_tokens"))


def test_perplexity_beyond_a_float_is_infinite():
    ranks = {"loss": [800.0], "weight": [1.0], "correct": [0.0], "examples": [1], "eval_seconds": [1.0]}
    assert form(tiny.METRICS, Row.EVALUATION, ranks)["eval/perplexity"] == math.inf


def test_a_number_that_does_not_exist_is_left_out():
    """Pseudo-perplexity of no tokens; the other numbers stand."""
    task = TASKS["masked_lm"]
    ranks = {name: [1.0] for name in ("loss", "weight", "correct", "examples", "eval_seconds")}
    metrics = declare(task.metrics, task.target)
    without = form(metrics, Row.EVALUATION, ranks | {"pseudo_loss": [0.0], "pseudo_tokens": [0.0]})
    row = form(metrics, Row.EVALUATION, ranks | {"pseudo_loss": [4.0], "pseudo_tokens": [2.0]})
    assert without == {name: value for name, value in row.items() if name != "eval/pseudo_perplexity"}
    assert row["eval/pseudo_perplexity"] == math.exp(2)


def test_a_metric_whose_quantity_nothing_gives_is_named():
    with pytest.raises(ValueError, match="eval/token_accuracy is formed from correct"):
        form(tiny.METRICS, Row.EVALUATION, {"loss": [1.0], "weight": [1.0]})


def test_a_task_of_its_own_needs_no_other_room():
    """Its metrics, what its weights count, and its training loss come out under its own names."""
    loss = Metric("nats per label", "Loss", "{:.3f}", ("loss", "weight"), lambda a, b: a / b, better="lower")
    hits = Metric("labels", "Hits", "{:.0f}", ("hits",), better="higher")
    metrics = declare({"loss": loss, "hits": hits}, "labels")
    assert {"train/labels", "eval/labels", "eval/hits", "train/loss"} <= metrics.keys()
    assert "eval/token_accuracy" not in metrics and "train/supervised_tokens" not in metrics
    assert comparable(metrics) == ["eval/loss", "eval/hits"]
    ledger = Ledger(metrics)
    ledger.add(tally(loss=3.0, weight=2.0, hits=1.0), 0.5, 0.25, 7)
    row = ledger.row(lambda mine: [mine], NOW | {"peak_bytes": 1})
    assert row["train/loss"] == 1.5 and row["train/labels"] == 8 and "train/hits" not in row


def test_a_row_is_of_all_ranks_and_begins_the_next_interval():
    ledger = Ledger(tiny.METRICS)
    for _ in range(2):
        ledger.add(tally(loss=2.0, weight=1.0, correct=1.0), 1.0, 0.5, 10)
    calls = []

    def gather(mine):
        calls.append(mine)
        # loss, weight, correct, seconds, own seconds, tokens, steps
        return [mine, [8.0, 2.0, 0.0, 4.0, 3.0, *mine[5:]]]

    row = ledger.row(gather, NOW | {"peak_bytes": 5})
    assert len(calls) == 1
    assert row["train/loss"] == 3.0
    assert [row[f"time/step_seconds{end}"] for end in ("_min", "", "_max")] == [1.0, 1.5, 2.0]
    assert [row[f"time/own_seconds{end}"] for end in ("_min", "", "_max")] == [0.5, 1.0, 1.5]
    assert row["time/tokens_per_second"] == 5.0
    assert {name: row[f"train/{name}"] for name in ("grad_norm", "lr", "epoch")} == {
        name: NOW[name] for name in ("grad_norm", "lr", "epoch")
    }
    assert all(type(row[f"train/{name}"]) is int for name in ("tokens", "supervised_tokens", "skipped_steps"))
    assert "train/loss_scale" not in row
    assert ledger == Ledger(tiny.METRICS)


def test_a_sum_with_the_name_of_a_quantity_is_refused():
    ledger = Ledger(tiny.METRICS)
    ledger.add(tally(loss=1.0, weight=1.0, correct=0.0, tokens=1.0), 1.0, 1.0, 1)
    with pytest.raises(ValueError, match="sums tokens have names"):
        ledger.row(lambda mine: [mine], NOW)


def test_a_ledger_with_a_nan_survives_a_checkpoint():
    """Of a skipped step; JSON has no NaN."""
    ledger = Ledger(tiny.METRICS)
    ledger.add(tally(loss=math.nan, weight=1 / 3), 0.5, 0.25, 7)
    state = json.loads(json.dumps(ledger.state_dict(), allow_nan=False))
    again = Ledger(tiny.METRICS)
    again.load_state_dict(state, CPU)
    assert again.state_dict() == ledger.state_dict()
    sums = again.tally.read()
    assert math.isnan(sums["loss"]) and sums["weight"] == 1 / 3
    assert (again.seconds, again.own_seconds, again.tokens, again.steps) == (0.5, 0.25, 7, 1)


def test_a_metric_knows_which_way_is_up():
    assert tiny.METRICS["eval/loss"].gain(1.0, over=1.5) == 0.5
    assert tiny.METRICS["eval/token_accuracy"].gain(0.5, over=0.25) == 0.25
    with pytest.raises(ValueError, match="Examples"):
        tiny.METRICS["eval/examples"].gain(1, over=2)


def test_the_table_of_metrics_is_that_of_the_declarations():
    text = (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")
    made = metrics_table.table.with_table(text, metrics_table.MARK, metrics_table.markdown_table)
    assert made == text, "run `make table`"
    assert not [name for name in tiny.METRICS if f"| `{name}` |" not in text]
