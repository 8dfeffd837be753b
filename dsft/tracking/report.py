"""A run on one page, and on one screen: what went in, how it went, what came out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsft.metrics import Metric, Reduction, Row
from dsft.runtime.files import write_text
from dsft.tracking.curves import curves
from dsft.tracking.jsonl import MetricsFile

Metrics = Mapping[str, Metric]


def write_report(run_dir: Path, metrics: Metrics) -> Path:
    """Write `run_dir/report.html`: one file that needs no other, no network and no script.

    Drawn from `metrics.jsonl`, `audit.json`, `config.yaml`, `environment.json`, `samples.json` and `evaluation.json`;
    what is missing is left out.

    Args:
        run_dir: The run's directory.
        metrics: All that the run declares, by name.

    Returns:
        Path of the report.

    Raises:
        UserError: `metrics.jsonl` holds a line that is no row.
    """
    run_dir = Path(run_dir)
    rows = MetricsFile(run_dir / "metrics.jsonl").rows()
    config_text = _text(run_dir / "config.yaml")
    audit = _json(run_dir / "audit.json") or {}
    environment = _json(run_dir / "environment.json") or {}
    config = yaml.safe_load(config_text or "") or {}
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        files("dsft.tracking").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    html = page.render(
        name=config.get("name", run_dir.resolve().name),
        facts=_facts(rows, metrics, config, environment, run_dir),
        evaluation=_evaluation(rows, metrics),
        span=_span(rows, metrics),
        figures=[(title, Markup(svg)) for title, svg in curves(rows, metrics)],
        samples=_samples(run_dir),
        about=_about(_json(run_dir / "evaluation.json") or {}),
        audit=_flat({key: value for key, value in audit.items() if key != "example"}),
        example=audit.get("example") or [],
        environment=_flat(environment),
        config=config_text,
    )
    write_text(run_dir / "report.html", html)
    return run_dir / "report.html"


def summary(run_dir: Path, metrics: Metrics) -> Group:
    """What a run changed, for `rich.console.Console.print`: evaluation and one answer, before and after."""
    run_dir = Path(run_dir)
    rows = MetricsFile(run_dir / "metrics.jsonl").rows()
    parts: list[Any] = []
    span, evaluation = _span(rows, metrics), _evaluation(rows, metrics)
    if span and evaluation:
        first, last = span
        table = Table("evaluation", f"before (step {first})", f"after (step {last})", "change", title_justify="left")
        for line in evaluation:
            table.add_row(line["label"], line["before"], line["after"], line["change"])
        parts.append(table)
    for sample in _samples(run_dir)[:1]:
        table = Table(show_header=False, show_lines=True)
        for label in ("prompt", "reference"):
            table.add_row(label, Text(sample[label]))
        for answer in sample["answers"]:
            table.add_row(answer["when"], Text(answer["text"]))
        parts.append(table)
    return Group(*parts)


def _of(metrics: Metrics, kind: Row) -> dict[str, Metric]:
    """The metrics of a kind of row that a person wants to see first."""
    return {name: metric for name, metric in metrics.items() if metric.row is kind and metric.headline}


def _span(rows: list[dict], metrics: Metrics) -> tuple[int, int] | None:
    """Steps of the first and the last evaluation."""
    steps = [row["step"] for row in rows if row.keys() & _of(metrics, Row.EVALUATION).keys()]
    return (steps[0], steps[-1]) if steps else None


def _evaluation(rows: list[dict], metrics: Metrics) -> list[dict[str, Any]]:
    """A line for each metric of evaluation and test: label, before, after, change, and whether it got better."""
    lines = []
    for name, metric in {**_of(metrics, Row.EVALUATION), **_of(metrics, Row.TEST)}.items():
        values = [row[name] for row in rows if name in row]
        if values:
            before, after = values[0], values[-1]
            lines.append(
                {
                    "label": metric.label,
                    "before": metric.shown(before) if metric.row is Row.EVALUATION else "",
                    "after": metric.shown(after),
                    "change": _change(metric, before, after) if len(values) > 1 else "",
                    "better": metric.better is not None and metric.gain(after, before) > 0,
                }
            )
    return lines


def _change(metric: Metric, before: float, after: float) -> str:
    if metric.better is None or not (math.isfinite(before) and math.isfinite(after) and before):
        return ""
    if metric.shown(1.0).endswith("%"):
        return f"{100 * (after - before):+.1f} points"
    return f"{(after - before) / before:+.1%}"


def _facts(rows: list[dict], metrics: Metrics, config: dict, environment: dict, run_dir: Path) -> list[tuple[str, str]]:
    """Label and value of what a person wants to know first about a run."""
    data, model = config.get("data") or {}, config.get("model") or {}
    facts = {
        "Model": model.get("path"),
        "Data": data.get("train") or data.get("source"),
        "Tuning": (config.get("tuning") or {}).get("method"),
        "Date": environment.get("started") or _modified(run_dir / "metrics.jsonl"),
        "Ranks": environment.get("world_size"),
        "Time": _duration(rows),
        "Steps": f"{rows[-1]['step']:,}" if rows else None,
        **{metric.label: _overall(rows, name, metric) for name, metric in _of(metrics, Row.TRAINING).items()},
    }
    return [(label, str(value)) for label, value in facts.items() if value is not None]


def _overall(rows: list[dict], name: str, metric: Metric) -> str | None:
    """The last value, or the largest of what is the largest of all ranks: a run may have gone on in a new process."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return None
    return metric.shown(max(values) if metric.reduction is Reduction.MAX else values[-1])


def _duration(rows: list[dict]) -> str | None:
    """Time in training steps and in evaluations; from the rows, so that a pause between two sessions does not count."""
    training = evaluating = 0.0
    before = 0
    for row in rows:
        training += row.get("time/step_seconds", 0.0) * (row["step"] - before)
        evaluating += row.get("time/eval_seconds", 0.0)
        before = row["step"] if "time/step_seconds" in row else before
    parts = {"training": training, "evaluation": evaluating}
    return " + ".join(f"{_clock(seconds)} {label}" for label, seconds in parts.items() if seconds) or None


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _modified(path: Path) -> str | None:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M") if path.exists() else None


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    """Each prompt once, with its reference, its first answer and its last."""
    prompts: dict[str, list[dict]] = {}
    for sample in sorted(_json(run_dir / "samples.json") or [], key=lambda sample: sample["step"]):
        prompts.setdefault(sample["prompt"], []).append(sample)
    return [
        {
            "prompt": prompt,
            "reference": given[0]["reference"],
            "answers": [
                {"when": f"{when} (step {sample['step']})", "text": sample["answer"]}
                for when, sample in zip(("before", "after"), (given[0], given[-1])[: len(given)], strict=False)
            ],
        }
        for prompt, given in prompts.items()
    ]


def _about(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For each evaluated set a table of its labels, and one of true labels by given ones with a shade for each cell."""
    tables = []
    for name, about in found.items():
        numbers = about.get("labels") or {}
        columns = list(dict.fromkeys(column for row in numbers.values() for column in row))
        labels = [[label, *(_shown(row.get(column)) for column in columns)] for label, row in numbers.items()]
        confusion = about.get("confusion")
        cells = []
        for label, row in zip(confusion["labels"], confusion["true_by_predicted"]) if confusion else ():
            total = sum(row) or 1.0
            cells.append((label, [(_shown(value), round(100 * value / total)) for value in row]))
        given = confusion["labels"] if confusion else []
        tables.append({"name": name, "step": about["step"], "columns": columns, "labels": labels,
                       "given": given, "cells": cells})  # fmt: skip
    return tables


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of a table: dotted name and value."""
    rows = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            rows += _flat(item, f"{name}.")
        elif isinstance(item, list):
            rows.append((name, "\n".join(map(_shown, item))))
        else:
            rows.append((name, _shown(item)))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _json(path: Path) -> Any:
    text = _text(path)
    return None if text is None else json.loads(text)
