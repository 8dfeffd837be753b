"""The table of metrics, made from their declarations: `python -m dsft.tasks.metrics_table [FILE ...]`.

Without files it prints the table, else it puts the table between each file's two MARKs.
"""

from __future__ import annotations

import sys

from dsft.config import table
from dsft.metrics import Metric, declare
from dsft.tasks import TASKS

MARK = "<!-- metrics table -->\n"


def markdown_table() -> str:
    """Every metric that some run declares: those of all tasks first, then each task's own under a bold row."""
    declared = {name: declare(task.metrics, task.target) for name, task in TASKS.items()}
    targets = {metric for task in TASKS.values() for metric in (f"train/{task.target}", f"eval/{task.target}")}
    names = {name for task in TASKS.values() for name in task.metrics}
    own = {f"{row}/{name}" for name in names for row in ("eval", "test")} | {"train/loss"} | targets
    lines = ["| metric | unit | meaning | over ranks | better |", "|---|---|---|---|---|", "| **every task** | | | | |"]
    first = next(iter(declared.values()))
    lines += _rows({name: metric for name, metric in first.items() if name not in own})
    for task, metrics in declared.items():
        lines.append(f"| **task={task}** | | | | |")
        lines += _rows({name: metric for name, metric in metrics.items() if name in own})
    return "\n".join(lines) + "\n"


def _rows(metrics: dict[str, Metric]) -> list[str]:
    return [
        f"| `{name}` | {metric.unit} | {metric.meaning} | {metric.reduction.value} | {metric.better or ''} |"
        for name, metric in metrics.items()
    ]


if __name__ == "__main__":
    table.main(sys.argv[1:], MARK, markdown_table)
