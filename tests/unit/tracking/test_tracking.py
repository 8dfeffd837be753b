"""Sinks: metrics.jsonl, progress, W&B, and the tracker that owns them."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import struct
import subprocess
import sys
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest
import tiny
from tqdm import tqdm

from dsft.config.schema import TrackingConfig
from dsft.errors import UserError
from dsft.tracking import MetricsFile, NullTracker, Progress, Tracker, WandbSink


@pytest.fixture
def metrics(tmp_path):
    return MetricsFile(tmp_path / "metrics.jsonl", tiny.METRICS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# metrics.jsonl


def test_a_row_is_one_line_with_step_first(metrics):
    metrics.write({"train/loss": 2.5, "step": 1})
    metrics.write({"step": np.int64(2), "train/loss": np.float32(0.5), "eval/examples": np.int32(7)})
    assert metrics.path.read_text(encoding="utf-8") == (
        '{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": 0.5, "eval/examples": 7}\n'
    )


def test_floats_keep_every_bit(metrics):
    loss = 0.1 + 0.2
    metrics.write({"step": 1, "train/loss": loss})
    assert metrics.rows() == [{"step": 1, "train/loss": loss}]


def test_nonfinite_numbers_are_strict_json_and_come_back(metrics):
    metrics.write({"step": 1, "train/loss": math.nan, "eval/perplexity": math.inf, "eval/loss": -math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(metrics.path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert line["train/loss"] is None and line["train/loss/nonfinite"] == "nan"
    row = metrics.rows()[0]
    assert math.isnan(row["train/loss"]) and row["eval/perplexity"] == math.inf and row["eval/loss"] == -math.inf
    assert row.keys() == {"step", "train/loss", "eval/perplexity", "eval/loss"}


@pytest.mark.parametrize(
    "row", [{"step": 1, "train/los": 1.0}, {"step": 1, "loss/nonfinite": 1.0}, {"train/loss": 1.0}]
)
def test_undeclared_names_and_missing_steps_are_refused(metrics, row):
    with pytest.raises(ValueError, match="does not declare|no step"):
        metrics.write(row)
    assert not metrics.path.exists()


def test_rewind_keeps_the_checkpoint_step_and_drops_what_came_after(metrics):
    for step in range(5):
        metrics.write({"step": step, "train/loss": 1.0})
    metrics.write({"step": 4, "eval/loss": 1.0})
    before = metrics.path.read_bytes().splitlines(keepends=True)
    assert metrics.rewind(3) == 2
    assert metrics.path.read_bytes() == b"".join(before[:4])
    assert metrics.rewind(3) == 0
    assert metrics.rewind(-1) == 4
    assert metrics.rows() == []


def test_rewind_without_a_file_makes_none(metrics):
    assert metrics.rewind(10) == 0
    assert not metrics.path.exists()


@pytest.mark.parametrize("torn", [b'{"step": 3, "train/lo', b'{"step": 3, "x": "\xe4\xbd', b"\0\0\0\0", b"17"])
def test_a_torn_last_line_goes_and_the_next_row_stands_alone(metrics, torn):
    metrics.write({"step": 2, "train/loss": 1.0})
    with open(metrics.path, "ab") as file:
        file.write(torn)
    assert metrics.rows() == [{"step": 2, "train/loss": 1.0}]
    assert metrics.rewind(9) == 1
    metrics.write({"step": 3, "train/loss": 0.5})
    assert [row["step"] for row in metrics.rows()] == [2, 3]


def test_a_last_line_without_newline_is_kept_and_ended(metrics):
    metrics.path.write_bytes(b'{"step": 1, "train/loss": 1.0}')
    assert metrics.rewind(1) == 0
    assert metrics.path.read_bytes() == b'{"step": 1, "train/loss": 1.0}\n'


def test_a_broken_line_in_the_middle_is_named(metrics):
    metrics.path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        metrics.rewind(3)


def test_sigkill_loses_no_row(metrics):
    script = (
        "import os, signal, sys\n"
        "from dsft.tracking.jsonl import MetricsFile\n"
        "metrics = MetricsFile(sys.argv[1], ['train/loss'])\n"
        "for step in range(20): metrics.write({'step': step, 'train/loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, metrics.path], check=False, env=environment, timeout=60)
    assert done.returncode == -9
    assert [row["step"] for row in metrics.rows()] == list(range(20))


# progress


def test_plain_lines_are_whole_spaced_and_end_with_the_last():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(tiny.METRICS, 100, stream=stream, clock=clock)
    progress.update({"step": 0, "eval/loss": 2.0, "eval/perplexity": 7.389, "eval/token_accuracy": 0.5})
    for step in range(1, 101):
        clock.now += 0.1
        row = {"step": step, "train/loss": 1.5, "time/tokens_per_second": 1234.5, "train/lr": 1e-4}
        progress.update(row | {"train/skipped_steps": step // 100})
    progress.close()
    lines = stream.getvalue().splitlines(keepends=True)
    assert lines[0] == "evaluation at step 0: loss 2.0000, perplexity 7.389, token accuracy 50.00%\n"
    assert lines[1] == "step 1/100, loss 1.5000, 1,234 tokens/s, lr 1.00e-04, ETA 00:09\n"
    assert lines[-1] == "step 100/100, loss 1.5000, 1,234 tokens/s, lr 1.00e-04, 1 skipped, ETA 00:00\n"
    assert 5 <= len(lines) <= 7
    assert all(line.endswith("\n") and "\r" not in line for line in lines)


def test_a_run_that_stops_early_still_shows_its_last_step():
    stream = io.StringIO()
    progress = Progress(tiny.METRICS, 100, initial=40, stream=stream, clock=Clock())
    for step in (41, 42, 43):
        progress.update({"step": step, "train/loss": 1.0})
    progress.close()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == ["step 41/100", "step 43/100"]


def test_work_inside_a_step_is_counted_in_plain_lines():
    stream, clock = io.StringIO(), Clock()
    with Progress(tiny.METRICS, 1, stream=stream, clock=clock).bar("evaluate", 10) as advance:
        for _ in range(10):
            clock.now += 0.5
            advance(1)
    assert stream.getvalue().splitlines() == ["evaluate: 1/10", "evaluate: 5/10", "evaluate: 9/10", "evaluate: 10/10"]


def test_a_terminal_gets_a_bar_and_notes_on_lines_of_their_own(monkeypatch):
    # a bar that another test's mistake cut short would push this one down a line
    monkeypatch.setattr(tqdm, "_instances", WeakSet(), raising=False)
    stream = Terminal()
    progress = Progress(tiny.METRICS, 10, stream=stream)
    progress.update({"step": 0, "eval/loss": 2.0})
    progress.update({"step": 4, "train/loss": 1.25, "time/tokens_per_second": 99.0})
    progress.note("注意")
    with progress.bar("evaluate", 3) as advance:
        advance(3)
    progress.close()
    shown = stream.getvalue()
    assert "4/10" in shown and "loss 1.2500, 99 tokens/s" in shown and "evaluate:   0%" in shown
    assert "\r注意\n" in shown
    assert shown.rstrip(" \r").endswith("\n")


def test_disabled_progress_still_passes_messages_on():
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(tiny.METRICS, 10, enabled=False, stream=stream)
        progress.update({"step": 1, "train/loss": 1.0})
        with progress.bar("evaluate", 3) as advance:
            advance(3)
        progress.note("going on from step 20")
        progress.close()
        assert stream.getvalue() == "going on from step 20\n"


# W&B


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    """W&B as on a machine that has never seen it, its files kept in the test's directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_home"))
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


def offline_records(run_dir, run_id):
    """What W&B has on disk for a run.

    The file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB, in them fragments of records, each with a
    header of 7 bytes (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for path in run_dir.glob(f"wandb/offline-run-*-{run_id}/*.wandb"):
        content, place, record = path.read_bytes(), 7, b""
        while place < len(content):
            if (left := -place % 32768) and left < 7:
                place += left
                continue
            _, length, kind = struct.unpack_from("<IHB", content, place)
            record += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                yield Record.FromString(record)
                record = b""


def test_without_a_key_wandb_records_offline_and_goes_on_under_the_same_id(no_credentials, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys, "stdin", Terminal())
    notes: list[str] = []
    sink = WandbSink(
        TrackingConfig(project="试"), tmp_path, "run", {"optim": {"lr": 0.5}}, None, tiny.METRICS, notes.append
    )
    sink.log({"step": 1, "train/loss": 2.5, "eval/perplexity": math.inf})
    sink.samples(1, [{"step": 1, "prompt": "你好", "reference": "r", "answer": "a"}])
    sink.audit({"records": {"kept": 3}})
    sink.finish()
    (tmp_path / "later").mkdir()  # W&B names its directories by the second, and this is the same one
    again = WandbSink(
        TrackingConfig(project="试"), tmp_path / "later", "run", {}, sink.run_id, tiny.METRICS, notes.append
    )
    again.log({"step": 7, "train/loss": 1.5})
    again.finish()

    assert again.run_id == sink.run_id
    assert len(notes) == 2 and all("wandb sync" in note for note in notes)
    records = [r for place in (tmp_path, tmp_path / "later") for r in offline_records(place, sink.run_id)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.project) for run in runs} == {(sink.run_id, "试")}
    assert [json.loads(i.value_json) for i in runs[0].config.update if i.key == "optim"] == [{"lr": 0.5}]
    history = {}
    for record in records:
        for item in record.history.item:
            history[record.history.step.num, item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    assert history[1, "train/loss"] == 2.5 and history[7, "train/loss"] == 1.5
    table = next((tmp_path / "wandb").glob("*/files/media/table/samples*.json"))
    assert json.loads(table.read_text(encoding="utf-8"))["data"] == [[1, "你好", "r", "a"]]
    assert any("kept" in item.value_json for record in records for item in record.summary.update)


def broken_wandb(fails: str):
    """A stand-in for the `wandb` module that raises in one place."""

    def call(name):
        def act(*args, **kwargs):
            if name == fails:
                raise ConnectionError(f"{name} is down\nand more")

        return act

    run = SimpleNamespace(
        id="abc", url="http://x", dir="/x/files", offline=True, disabled=False,
        define_metric=call("define_metric"), log=call("log"), finish=call("finish"),
        summary=SimpleNamespace(update=call("audit")),
    )  # fmt: skip
    return SimpleNamespace(
        Settings=lambda **kwargs: None,
        Table=lambda **kwargs: call("table")(),
        setup=lambda *args: SimpleNamespace(settings=SimpleNamespace(mode="offline")),
        init=lambda **kwargs: call("init")() or run,
    )


@pytest.mark.parametrize("fails", ["import", "init", "log", "table", "audit", "finish"])
def test_a_wandb_that_fails_warns_once_and_the_run_goes_on(monkeypatch, tmp_path, fails):
    monkeypatch.setitem(sys.modules, "wandb", None if fails == "import" else broken_wandb(fails))
    stream = io.StringIO()
    progress = Progress(tiny.METRICS, 2, enabled=False, stream=stream)
    sink = WandbSink(TrackingConfig(), tmp_path, "run", {}, "abc", tiny.METRICS, progress.note)
    tracker = Tracker(tmp_path, tiny.METRICS, progress, sink)
    for step in (1, 2):
        tracker.write({"step": step, "train/loss": 1.0})
        tracker.samples(step, [{"prompt": "p", "reference": "r", "answer": "a"}])
    tracker.audit({"kept": 1})
    tracker.finish()
    tracker.finish()
    warnings = [line for line in stream.getvalue().splitlines() if line.startswith("warning: W&B")]
    assert len(warnings) == 1
    assert ("ModuleNotFoundError" if fails == "import" else f"ConnectionError: {fails} is down") in warnings[0]
    assert len(MetricsFile(tmp_path / "metrics.jsonl").rows()) == 2
    assert tracker.run_id == "abc"


# tracker


def test_metrics_are_on_disk_before_anyone_sees_them(tmp_path):
    seen = []

    def count(row):
        seen.append(len(MetricsFile(tmp_path / "metrics.jsonl").rows()))

    tracker = Tracker(tmp_path, tiny.METRICS, SimpleNamespace(update=count), SimpleNamespace(log=count))
    tracker.write({"step": 1, "train/loss": 1.0})
    assert seen == [1, 1]


def test_samples_survive_a_resume_and_replay_nothing_twice(tmp_path):
    def tracker():
        return Tracker(tmp_path, tiny.METRICS, Progress(tiny.METRICS, 10, enabled=False))

    first = tracker()
    for step in (0, 4, 8):
        first.write({"step": step, "eval/loss": 1.0})
        first.samples(step, [{"prompt": "问", "reference": "r", "answer": f"a{step}"}])
    second = tracker()
    assert second.rewind(4) == 1
    second.samples(4, [{"prompt": "问", "reference": "r", "answer": "again"}])
    samples = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert [(sample["step"], sample["answer"]) for sample in samples] == [(0, "a0"), (4, "again")]
    tracker().rewind(-1)
    assert json.loads((tmp_path / "samples.json").read_text(encoding="utf-8")) == []


def test_the_null_tracker_answers_to_every_call_of_the_real_one():
    def signatures(tracker):
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(tracker, inspect.isfunction)
            if not name.startswith("_")
        }

    assert signatures(NullTracker) == signatures(Tracker)
    null = NullTracker()
    null.write({"no such": "check"})
    with null.bar("evaluate", 3) as advance:
        advance(3)
    assert null.rewind(3) == 0 and null.run_id is None
