"""The page and the screen that a run ends with."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import tiny
from rich.console import Console

from dsft.tracking.curves import LIMIT, curves, series
from dsft.tracking.jsonl import MetricsFile
from dsft.tracking.report import summary, write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


def evaluation(step, loss, accuracy):
    return {
        "step": step,
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss),
        "eval/token_accuracy": accuracy,
        "eval/examples": 1234,
        "time/eval_seconds": 2.0,
    }


def training(step):
    return {
        "step": step,
        "train/loss": 2.0 / step,
        "train/lr": 1e-4,
        "train/grad_norm": 1.0,
        "train/tokens": 1000 * step,
        "train/skipped_steps": 1,
        "time/step_seconds": 1.5,
        "time/step_seconds_min": 1.4,
        "time/step_seconds_max": 1.9,
        "time/tokens_per_second": 1000.0,
        "memory/peak_bytes": 2**31,
    }


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A small whole run, its texts full of characters that HTML and rich would take for their own."""
    tmp_path = tmp_path_factory.mktemp("run")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", tiny.METRICS)
    for row in (evaluation(0, 2.0, 0.4), *map(training, range(1, 41)), evaluation(40, 1.0, 0.65)):
        metrics.write(row)
    files = {
        "config.yaml": "name: 演示 <run>\nmodel: {path: some/model}\ndata: {source: pydoc, train: null}\n",
        "environment.json": json.dumps({"world_size": 2, "started": "2026-01-02 03:04", "hosts": ["a", "b"]}),
        "audit.json": json.dumps(
            {"records": {"read": 4012}, "share": 0.25, "example": [["<user> 问 & ", False], ["答<b>", True]]}
        ),
        "samples.json": json.dumps(
            [
                {"step": step, "prompt": "你好 [red]<script>x</script>", "reference": "参考", "answer": answer}
                for step, answer in ((40, "later [/bold] 好"), (0, "earlier"), (20, "in the middle"))
            ]
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def html(run_dir):
    path = write_report(run_dir, tiny.METRICS)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Checks that every element is closed in order, and collects tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_needs_nothing_but_itself(html):
    page = Balance(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in references)
    assert "http" not in html and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_references_inside_the_figures_find_their_target_once(html):
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_the_report_says_what_the_run_did(html):
    text = " ".join(" ".join(Balance(html).words).split())
    for shown in (
        "演示 <run>", "some/model", "pydoc", "2026-01-02 03:04", "1 min 00 s training + 4.0 s evaluation", "40,000",
        "2.00 GiB per rank", "2.0000 → 1.0000", "40.00% → 65.00%", "+25.0 points", "-50.0%", "1,234", "4,012",
        "你好 [red]<script>x</script>", "参考", "before (step 0) earlier", "after (step 40) later [/bold] 好",
    ):  # fmt: skip
        assert shown in text, shown
    assert "in the middle" not in text
    assert "&lt;user&gt; 问 &amp; <mark>答&lt;b&gt;</mark>" in html
    assert html.count("<svg") == 5


@pytest.mark.parametrize("missing", ["metrics.jsonl", "audit.json", "config.yaml", "environment.json", "samples.json"])
def test_any_file_may_be_missing(run_dir, tmp_path, missing):
    for path in run_dir.glob("*.[jy]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n', encoding="utf-8")
    (tmp_path / missing).unlink()
    Balance(write_report(tmp_path, tiny.METRICS).read_text(encoding="utf-8"))
    Console(file=io.StringIO()).print(summary(tmp_path, tiny.METRICS))


def test_an_empty_run_directory_has_a_report_named_after_it(tmp_path):
    html = write_report(tmp_path, tiny.METRICS).read_text(encoding="utf-8")
    assert f"<h1>{tmp_path.name}</h1>" in html and "No metrics were recorded" in html


def test_nonfinite_numbers_leave_a_gap_and_are_named(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", tiny.METRICS)
    metrics.write({"step": 0, "eval/loss": 800.0, "eval/perplexity": math.inf, "eval/token_accuracy": 0.0})
    metrics.write({"step": 1, "train/loss": math.nan})
    metrics.write({"step": 1, "eval/loss": math.nan, "eval/perplexity": math.nan, "eval/token_accuracy": 0.0})
    html = write_report(tmp_path, tiny.METRICS).read_text(encoding="utf-8")
    assert "inf →" in html and "nan" in html and html.count("<svg") == 1


def test_one_point_is_enough_for_a_figure():
    titles = [title for title, _ in curves([training(1)], tiny.METRICS)]
    assert titles[0] == "Loss, nats per supervised token" and len(titles) == 5


def test_a_long_run_stays_small_and_keeps_its_spikes():
    rows = [training(step) for step in range(1, 10_001)]
    rows[7_003]["train/grad_norm"] = 50.0
    figures = dict(curves(rows, tiny.METRICS))
    assert sum(map(len, figures.values())) < 150 * LIMIT
    assert re.search(r">50<", figures["Gradient norm, 2-norm before clipping"])


def test_series_skips_what_cannot_be_drawn():
    rows = [{"step": 1, "train/loss": math.inf}, {"step": 2, "train/loss": 1.5}, {"step": 2, "eval/loss": 1.0}]
    assert series(rows, "train/loss") == ([2], [1.5])


def test_the_screen_shows_before_and_after_side_by_side(run_dir, capsys):
    Console(width=100).print(summary(run_dir, tiny.METRICS))
    shown = capsys.readouterr().out
    assert re.search(r"Loss .* 2\.0000 .* 1\.0000 .* -50\.0%", shown)
    assert re.search(r"before \(step 0\) .* earlier", shown)
    assert re.search(r"after \(step 40\) .* later \[/bold\] 好", shown)
    assert "你好 [red]<script>x</script>" in shown
