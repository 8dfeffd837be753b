"""Where numbers, samples and messages go: `metrics.jsonl` first, then the progress bar, then W&B. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsft.metrics import Metric
from dsft.runtime.files import write_json
from dsft.tracking.jsonl import MetricsFile
from dsft.tracking.progress import Progress
from dsft.tracking.wandb_sink import WandbSink

__all__ = ["MetricsFile", "NullTracker", "Progress", "Tracker", "WandbSink"]


class Tracker:
    """All sinks of one run.

    Args:
        run_dir: Holds `metrics.jsonl`, `samples.json`, `evaluation.json` and `audit.json`.
        metrics: All that the run declares, by name.
        progress: The bar and the messages.
        wandb: The W&B run, or None.
    """

    def __init__(
        self, run_dir: Path, metrics: Mapping[str, Metric], progress: Progress, wandb: WandbSink | None = None
    ):
        self._metrics = MetricsFile(Path(run_dir) / "metrics.jsonl", metrics)
        self._samples = Path(run_dir) / "samples.json"
        self._evaluation = Path(run_dir) / "evaluation.json"
        self._audit = Path(run_dir) / "audit.json"
        self._progress = progress
        self._wandb = wandb

    @property
    def run_id(self) -> str | None:
        """Id of the W&B run, for the checkpoint; None without one."""
        return self._wandb.run_id if self._wandb else None

    def rewind(self, step: int) -> int:
        """Drop the rows and samples of steps after `step`; -1 starts anew. Returns how many rows were dropped."""
        kept = [sample for sample in self._all_samples() if sample["step"] <= step]
        dropped = self._metrics.rewind(step)
        if self._samples.exists():
            write_json(self._samples, kept)
        if self._evaluation.exists():
            write_json(self._evaluation, {k: about for k, about in self._all_about().items() if about["step"] <= step})
        return dropped

    def attach(self, wandb: WandbSink) -> None:
        """Send everything from now on to W&B as well."""
        self._wandb = wandb

    def write(self, row: dict[str, float]) -> None:
        """Record and show one row: `step` and metrics that the run declares, else ValueError."""
        self._metrics.write(row)
        self._progress.update(row)
        if self._wandb:
            self._wandb.log(row)

    def note(self, message: str) -> None:
        """Show a message to the person who watches."""
        self._progress.note(message)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show work inside a step; yields a function to call with how many more are done."""
        with self._progress.bar(description, total) as advance:
            yield advance

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Keep generated answers in `samples.json`, and send all of them so far.

        Args:
            step: The step whose weights answered; earlier samples of the same step are replaced.
            samples: Dictionaries with prompt, reference and answer.
        """
        before = [sample for sample in self._all_samples() if sample["step"] != step]
        kept = before + [{"step": step, **sample} for sample in samples]
        write_json(self._samples, kept)
        if self._wandb:
            self._wandb.samples(step, kept)

    def about(self, name: str, step: int, about: dict[str, Any]) -> None:
        """Keep what the last evaluation has to show beside its metrics in `evaluation.json`, and send it.

        Args:
            name: Of the set, `validation` or `test`.
            step: The step whose weights were evaluated.
            about: What the task has to show (`Task.judge`), in JSON types; nothing where it is empty.
        """
        if not about:
            return
        write_json(self._evaluation, self._all_about() | {name: {"step": step, **about}})
        if self._wandb:
            self._wandb.about(name, step, about)

    def audit(self, audit: dict[str, Any]) -> None:
        """Write `audit.json`, and send it."""
        write_json(self._audit, audit)
        if self._wandb:
            self._wandb.audit(audit)

    def finish(self) -> None:
        """Close the bar and end the W&B run."""
        self._progress.close()
        if self._wandb:
            self._wandb.finish()

    def _all_samples(self) -> list[dict[str, Any]]:
        return json.loads(self._samples.read_text(encoding="utf-8")) if self._samples.exists() else []

    def _all_about(self) -> dict[str, Any]:
        return json.loads(self._evaluation.read_text(encoding="utf-8")) if self._evaluation.exists() else {}


class NullTracker:
    """A tracker that does nothing: what every rank but 0 has, so that no caller asks for its rank."""

    run_id: str | None = None

    def rewind(self, step: int) -> int:
        return 0

    def attach(self, wandb: WandbSink) -> None: ...

    def write(self, row: dict[str, float]) -> None: ...

    def note(self, message: str) -> None: ...

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    def samples(self, step: int, samples: list[dict[str, str]]) -> None: ...

    def about(self, name: str, step: int, about: dict[str, Any]) -> None: ...

    def audit(self, audit: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...
