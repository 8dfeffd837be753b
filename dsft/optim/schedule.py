"""Learning-rate schedules: torch's own, turned into one number per optimizer step.

torch's schedulers drive a parameter of no consequence whose rate is 1. What they make of it is a multiplier, which
knows nothing of layer-wise rates and of the optimizers that ZeRO wraps around ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import lr_scheduler

from dsft.config.effect import warmup_steps
from dsft.config.schema import ScheduleConfig, ScheduleName, Unit
from dsft.errors import UserError


def _drive(kind: type[lr_scheduler.LRScheduler], **settings: Any) -> lr_scheduler.LRScheduler:
    """A scheduler over a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
    scheduler = kind(optimizer, **settings)
    # torch warns where a scheduler moves before its optimizer has.
    optimizer.step()
    return scheduler


_BODIES = {
    ScheduleName.constant: lambda config, steps, better: _drive(lr_scheduler.ConstantLR, factor=1.0),
    ScheduleName.linear: lambda config, steps, better: _drive(
        lr_scheduler.LinearLR, start_factor=1.0, end_factor=config.min_lr_ratio, total_iters=steps
    ),
    ScheduleName.cosine: lambda config, steps, better: _drive(
        lr_scheduler.CosineAnnealingWarmRestarts, T_0=steps, eta_min=config.min_lr_ratio
    ),
    ScheduleName.step: lambda config, steps, better: _drive(
        lr_scheduler.StepLR, step_size=config.step_size, gamma=config.gamma
    ),
    ScheduleName.exponential: lambda config, steps, better: _drive(lr_scheduler.ExponentialLR, gamma=config.gamma),
    ScheduleName.plateau: lambda config, steps, better: _drive(
        lr_scheduler.ReduceLROnPlateau,
        mode="max" if better == "higher" else "min",
        factor=config.gamma,
        patience=config.patience,
        threshold=0.0,
        min_lr=config.min_lr_ratio,
        eps=0.0,
    ),
}


class Schedule:
    """The multiplier of every group's peak rate, by optimizer step.

    Warm-up over W steps gives step k (from 0) the multiplier (k + 1) / W: the first step is not wasted on a rate of
    0, and step W - 1 reaches the peak. (transformers gives k / W; from step W on both agree.) What follows is counted
    from step W and would reach its floor at `total_steps`, so the last step still learns; from there on nothing
    moves. Decays in epochs fall on the ends of epochs, wherever packing and skipped steps put them; those inside
    warm-up are left out.

    A cosine with restarts falls `restarts + 1` times over equal lengths (arXiv:1608.03983).

    Args:
        config: The schedule's section of the config.
        total_steps: Optimizer steps of the whole run.
        better: Which way `schedule.metric` improves, `lower` or `higher` (`Metric.better`).

    Attributes:
        steps: Optimizer steps applied.
    """

    def __init__(self, config: ScheduleConfig, total_steps: int, better: str | None = "lower") -> None:
        self._config, self._total, self._better = config, total_steps, better
        self._warmup_steps = warmup_steps(config, total_steps)
        # With a warm-up longer than the run the body never begins; one step keeps its formulas finite.
        self._body_steps = max(1, total_steps - self._warmup_steps)
        self._by_epoch = config.unit is Unit.epochs and config.name in (ScheduleName.step, ScheduleName.exponential)
        self._start()

    def _start(self) -> None:
        rise = max(1, self._warmup_steps)
        self._warmup = _drive(lr_scheduler.LinearLR, start_factor=1 / rise, total_iters=rise - 1)
        self._body: Any = _BODIES[self._config.name](self._config, self._body_steps, self._better)
        self.steps = 0
        self._ends: list[int] = []  # steps applied by the end of each epoch

    @property
    def multiplier(self) -> float:
        """The share of the peak rate that the next optimizer step takes."""
        return _rate(self._warmup if self.steps < self._warmup_steps else self._body)

    def step(self, applied: bool, epochs: int) -> None:
        """Move on; call it after every optimizer step.

        Args:
            applied: False for a skipped step, which moves only what is counted in epochs.
            epochs: Epochs that are over.
        """
        if applied:
            self.steps += 1
            if self.steps < self._warmup_steps:
                self._warmup.step()
            elif not self._by_epoch and self._warmup_steps < self.steps <= self._total:
                self._advance()
        while len(self._ends) < epochs:
            self._end_epoch(self.steps)

    def _end_epoch(self, steps: int) -> None:
        self._ends.append(steps)
        if self._by_epoch and steps > self._warmup_steps:
            self._advance()

    def _advance(self) -> None:
        if self._config.name is ScheduleName.cosine:
            falls = self._config.restarts + 1
            # At the very end of the last fall torch would start again from the peak.
            end = math.nextafter(falls * self._body_steps, 0)
            self._body.step(min(falls * (self.steps - self._warmup_steps), end))
        elif self._config.name is not ScheduleName.plateau:
            self._body.step()

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Tell a plateau what an evaluation found; the other schedules do not care. Warm-up is not judged.

        Any improvement of `schedule.metric` counts, however small.

        Raises:
            UserError: If `schedule.metric` is not among `metrics`.
        """
        if self._config.name is not ScheduleName.plateau or self.steps < self._warmup_steps:
            return
        if self._config.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise UserError(f"schedule.metric={self._config.metric}: no evaluation gives it; set it to one of {known}")
        self._body.step(metrics[self._config.metric])

    def state_dict(self) -> dict[str, Any]:
        """What going on bit for bit takes; plain values that strict JSON can hold."""
        state: dict[str, Any] = {"steps": self.steps, "epoch_ends": self._ends}
        if self._config.name is ScheduleName.plateau:
            best = self._body.best if math.isfinite(self._body.best) else None
            state["plateau"] = {
                "multiplier": _rate(self._body),
                "best": best,
                "num_bad_epochs": self._body.num_bad_epochs,
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after `state["steps"]` steps, by the config and the length that this schedule was made with."""
        self._start()
        for _ in range(state["steps"]):
            self.step(applied=True, epochs=0)
        for steps in state["epoch_ends"]:
            self._end_epoch(steps)
        # The checkpoint may come from another schedule.
        if self._config.name is ScheduleName.plateau and "plateau" in state:
            plateau = state["plateau"]
            self._body.optimizer.param_groups[0]["lr"] = plateau["multiplier"]
            self._body.num_bad_epochs = plateau["num_bad_epochs"]
            if plateau["best"] is not None:
                self._body.best = plateau["best"]


def apply(optimizer_param_groups: list[dict[str, Any]], multiplier: float) -> None:
    """Set every group's rate to `multiplier` times its `initial_lr`, in place."""
    for group in optimizer_param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def _rate(scheduler: lr_scheduler.LRScheduler) -> float:
    return scheduler.optimizer.param_groups[0]["lr"]
