"""Weights & Biases, which may help a run and may never hurt one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsft.config.schema import TrackingConfig
from dsft.metrics import Metric, comparable

TIMEOUT = 60.0
"""Seconds that W&B may keep the run waiting, at its start and at its end."""

SAMPLE_COLUMNS = ["step", "prompt", "reference", "answer"]


class WandbSink:
    """One W&B run. The first call that fails ends it with one warning; the calls after do nothing.

    Without credentials it records offline, and never asks for them; `WANDB_MODE` is honoured.

    Args:
        section: The `tracking` section of the config.
        run_dir: `wandb/` is made in it.
        name: Name of the run.
        config: The composed config as plain values.
        run_id: Id of the W&B run to go on with, from the checkpoint; None for a new one.
        metrics: All that the run declares; of those by which evaluations are compared W&B shows the best value too.
        note: Called with where the run is to be seen, and what failed.
    """

    def __init__(
        self,
        section: TrackingConfig,
        run_dir: Path,
        name: str,
        config: dict[str, Any],
        run_id: str | None,
        metrics: Mapping[str, Metric],
        note: Callable[[str], None],
    ):
        self.run_id = run_id
        self._note = note
        self._run: Any = None
        self._guard("init", lambda: self._init(section, run_dir, name, config, metrics))

    def log(self, row: dict[str, float]) -> None:
        """Send a row of metrics under its step."""
        if self._run is not None:
            numbers = {name: value for name, value in row.items() if name != "step"}
            self._guard("log", lambda: self._run.log(numbers, step=row["step"]))

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Send a table of sample outputs: dictionaries with step, prompt, reference and answer."""
        if self._run is not None:
            self._guard("samples", lambda: self._run.log({"samples": _table(samples)}, step=step))

    def about(self, name: str, step: int, about: dict[str, Any]) -> None:
        """Send tables of an evaluation: each label's numbers, and which label was taken for which."""
        if self._run is not None:
            self._guard("about", lambda: self._run.log(_about(name, about), step=step))

    def audit(self, audit: dict[str, Any]) -> None:
        """Send the audit of the data, as part of the run's summary."""
        if self._run is not None:
            self._guard("audit", lambda: self._run.summary.update({"audit": audit}))

    def finish(self) -> None:
        """Send what is left, for at most `TIMEOUT` seconds."""
        if self._run is not None:
            self._guard("finish", self._run.finish)
            self._run = None

    def _init(
        self,
        section: TrackingConfig,
        run_dir: Path,
        name: str,
        config: dict[str, Any],
        metrics: Mapping[str, Metric],
    ) -> None:
        import wandb  # takes a second, and only those who ask for it need it

        wandb.setup(wandb.Settings(silent=True))
        run = wandb.init(
            project=section.project,
            entity=section.entity,
            tags=section.tags,
            dir=run_dir,
            name=name,
            config=config,
            id=self.run_id,
            resume="allow" if self.run_id else None,
            mode=_mode(wandb),
            settings=wandb.Settings(
                console="off",  # captured output would hold every redraw of the progress bar
                silent=True,
                init_timeout=TIMEOUT,
                finish_timeout=TIMEOUT,
                finish_timeout_raises=True,
            ),
        )
        for metric in comparable(metrics):
            best = "min" if metrics[metric].better == "lower" else "max"
            run.define_metric(metric, summary=f"last,{best}")
        self._run, self.run_id = run, run.id
        if not run.disabled:
            offline = f"offline, send it with `wandb sync {Path(run.dir).parent}`"
            self._note(f"W&B run {run.id}: {offline if run.offline else run.url}")

    def _guard(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._run = None
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._note(f"warning: W&B failed in {what} and gets nothing more; the run goes on. {reason}")


def _mode(wandb: Any) -> Any:
    """The mode that the environment or W&B's settings choose; offline where it would have to ask for a key."""
    mode = wandb.setup().settings.mode
    if mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
        return "offline"
    return mode


def _about(name: str, about: dict[str, Any]) -> dict[str, Any]:
    import wandb

    tables = {}
    if labels := about.get("labels"):
        columns = sorted({column for numbers in labels.values() for column in numbers})
        rows = [[label, *(numbers.get(column) for column in columns)] for label, numbers in labels.items()]
        tables[f"{name}/labels"] = wandb.Table(columns=["label", *columns], data=rows)
    if confusion := about.get("confusion"):
        labels, cells = confusion["labels"], confusion["true_by_predicted"]
        rows = [[label, *row] for label, row in zip(labels, cells, strict=True)]
        tables[f"{name}/confusion"] = wandb.Table(columns=["true label", *labels], data=rows)
    return tables


def _table(samples: list[dict[str, Any]]) -> Any:
    import wandb

    return wandb.Table(
        columns=[*SAMPLE_COLUMNS], data=[[sample[name] for name in SAMPLE_COLUMNS] for sample in samples]
    )
