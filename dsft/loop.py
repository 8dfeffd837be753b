"""When things happen: step, log, evaluate, save, stop. The same loop for every task and every way of splitting it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsft import checkpoint
from dsft.config.schema import TrainConfig
from dsft.data.loader import Loader, Step
from dsft.engine import Engine
from dsft.errors import UserError
from dsft.evaluate import Evaluator
from dsft.metrics import Ledger, Metric, comparable
from dsft.optim import Schedule
from dsft.runtime.signals import StopRequest, StopTogether
from dsft.runtime.world import World, peak_memory
from dsft.tracking import NullTracker, Tracker
from dsft.types import Batch


@dataclass
class Counters:
    """How far a run has come: everything in it is saved with a checkpoint.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        tokens: Tokens trained on.
        weight: Sum of the weights of the examples trained on.
        skipped_steps: Steps skipped because of overflow or NaN.
        skipped_in_row: Of these, how many just now, one after the other.
        best: Best value of `train.best_metric`, or None.
        best_step: Step at which it was seen.
        patience_best: The value that early stopping measures improvement from, or None.
        evaluations_without_improvement: For early stopping.
        finished: Why the run is over, or None.
    """

    step: int = 0
    tokens: int = 0
    weight: float = 0.0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    best: float | None = None
    best_step: int | None = None
    patience_best: float | None = None
    evaluations_without_improvement: int = 0
    finished: str | None = None


class Loop:
    """Trains until the last step, a stop request, or the early stop.

    Args:
        engine: Takes steps.
        loader: Hands out steps.
        evaluator: Evaluates, or None where there is no validation set.
        tester: Evaluates the test set at the end, or None where there is none.
        metrics: All that the run declares, by name.
        schedule: The learning rate's multiplier.
        tracker: Where metrics go.
        world: The ranks.
        stop: Raised by a signal.
        train: The run's own section of the config.
        total_steps: When the run is over.
        peak_lr: The largest peak learning rate of all parameter groups.
        run_dir: The run's directory.
        save_frozen: Whether checkpoints hold weights that are not trained.
        extra_state: Further values to save with each checkpoint.
        decide: (what the last evaluation has shown) -> what decides answers beside the model (`Task.decision`), where
            anything does.
        record: What each checkpoint keeps of the run.
        probe: The document whose logits each checkpoint keeps.

    Attributes:
        decision: What it gave last.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        loader: Loader,
        evaluator: Evaluator | None,
        tester: Evaluator | None = None,
        metrics: Mapping[str, Metric],
        schedule: Schedule,
        tracker: Tracker | NullTracker,
        world: World,
        stop: StopRequest,
        train: TrainConfig,
        total_steps: int,
        peak_lr: float,
        run_dir: Path,
        save_frozen: bool,
        extra_state: Callable[[], dict[str, Any]],
        decide: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
        record: checkpoint.Record | None = None,
        probe: Batch | None = None,
    ):
        self.engine = engine
        self.loader = loader
        self.evaluator = evaluator
        self.tester = tester
        self.metrics = metrics
        self.schedule = schedule
        self.tracker = tracker
        self.world = world
        self.stopping = StopTogether(stop, world)
        self.train = train
        self.total_steps = total_steps
        self.peak_lr = peak_lr
        self.run_dir = run_dir
        self.save_frozen = save_frozen
        self.extra_state = extra_state
        self.decide = decide
        self.decision = decide({}) if decide else {}
        self.record = record
        self.probe = probe
        self.counters = Counters()
        self._ledger = Ledger(metrics)

    def run(self) -> str | None:
        """Go on from where the counters stand.

        Returns:
            The name of the signal that stopped the run, or None when it is finished.
        """
        if self.counters.step == 0:
            self.evaluate()
            self.sample()
        if self.counters.step < self.total_steps and self.counters.finished == "steps":
            self.counters.finished = None  # the run was made longer
        if self.counters.finished:
            self.tracker.note(f"this run is finished ({self.counters.finished}); nothing is left to train")
        left = 0 if self.counters.finished else self.total_steps - self.counters.step
        with closing(self.loader.ahead(left, self.world.device)) as steps:
            signal = self._steps(steps)
        if not signal:
            self.sample()
        return signal

    def _steps(self, steps: Iterator[Step]) -> str | None:
        """Train until the run is finished; or until all ranks stop, and then return the signal's name."""
        while self.counters.step < self.total_steps and not self.counters.finished:
            self.one_step(steps)
            signal = self.stopping.after(self.counters.step)
            last = self.counters.step == self.total_steps
            improved = False
            if last or (self.evaluator and self._due(self.train.eval_every)):
                improved = self.evaluate()
                signal = signal or self.stopping.now()
            if last:
                self.counters.finished = "steps"
            if self.counters.finished and self.tester:
                self.tester.decision = self.decision
                row = self.tester.metrics(self.engine, self.tracker.bar)
                self.tracker.write({"step": self.counters.step, **row})
                self.tracker.about("test", self.counters.step, self.tester.about)
            if improved or signal or self.counters.finished or self._due(self.train.save_every):
                self.save()
            if signal:
                return signal
        return None

    def one_step(self, steps: Iterator[Step]) -> None:
        """Take one optimizer step, and log it where one is due; only then anything waits for the device."""
        begun = time.perf_counter()
        step = next(steps)
        loading = time.perf_counter() - begun
        multiplier = self.schedule.multiplier
        tally, applied = self.engine.train_step(step.batches, step.weight, multiplier)
        self.schedule.step(applied, self.loader.epochs)
        self._count(step, applied)
        log = self._due(self.train.log_every) or self.counters.step == self.total_steps
        # these wait for the device, so that the clock covers what it still had to do
        now = self._now(multiplier) if log else {}
        self._ledger.add(tally, time.perf_counter() - begun, loading, step.tokens)
        if log:
            row = self._ledger.row(self.world.gather, now)
            self.tracker.write({"step": self.counters.step, **row})
        self._refuse_endless_skipping()

    def evaluate(self) -> bool:
        """Evaluate, remember the best, and ask for a stop when patience is over. True if this is the new best."""
        if self.evaluator is None:
            return False
        metrics = self.evaluator.metrics(self.engine, self.tracker.bar)
        self.tracker.write({"step": self.counters.step, **metrics})
        self.tracker.about("validation", self.counters.step, self.evaluator.about)
        if self.decide:
            self.decision = self.decide(self.evaluator.about)
        if self.train.best_metric not in metrics:
            raise UserError(
                f"train.best_metric={self.train.best_metric}: this run's evaluations do not give it. Set it to one of "
                f"{', '.join(name for name in comparable(self.metrics) if name in metrics)}."
            )
        if self.counters.step == 0:
            return False
        self.schedule.evaluated(metrics)
        return self._judge(metrics)

    def sample(self) -> None:
        """Generate sample answers and hand them to the tracker; say how many could not be had, and why."""
        if self.evaluator is None or not self.train.samples:
            return
        answers, problems = self.evaluator.answers(self.engine)
        self.tracker.samples(self.counters.step, answers)
        if problems:
            self.tracker.note(
                f"warning: {len(problems)} of {len(answers) + len(problems)} samples of step {self.counters.step} "
                f"could not be generated; the run goes on. The first: {problems[0]}"
            )

    def save(self) -> None:
        """Publish a checkpoint of this step, and thin out the old ones."""
        self._ledger.own_seconds += self.engine.forward_seconds()
        state = {
            **asdict(self.counters),
            "loader": self.loader.state_dict(),
            "schedule": self.schedule.state_dict(),
            "intervals": self.world.gather_objects(self._ledger.state_dict()),
            "decision": self.decision,
            **self.extra_state(),
        }
        path = checkpoint.save(
            self.run_dir,
            self.counters.step,
            self.engine,
            self.world,
            state,
            self.save_frozen,
            self.record,
            self.probe,
        )
        if self.world.is_main:
            checkpoint.retain(self.run_dir, self.counters.step, self.train.keep_last, self.counters.best_step)
        self.tracker.note(f"saved {path}")

    def resume(self, path: Path, identity: dict[str, Any]) -> dict[str, Any]:
        """Go back to a checkpoint of the run that `identity` describes; returns what was saved with it."""
        state = checkpoint.load(path, self.engine, self.world, identity)
        self.counters = Counters(**{name: state[name] for name in asdict(self.counters)})
        self.loader.load_state_dict(state["loader"])
        self.schedule.load_state_dict(state["schedule"])
        self.decision = state.get("decision", self.decision)
        self._ledger.load_state_dict(state["intervals"][self.world.rank], self.world.device)
        return state

    def _due(self, every: int) -> bool:
        return every > 0 and self.counters.step % every == 0

    def _count(self, step: Step, applied: bool) -> None:
        counters = self.counters
        counters.step += 1
        counters.tokens += step.tokens
        counters.weight += step.weight
        counters.skipped_steps += not applied
        counters.skipped_in_row = 0 if applied else counters.skipped_in_row + 1

    def _now(self, multiplier: float) -> dict[str, float]:
        """Quantities of the run as it stands, as `metrics.declared` names them."""
        self._ledger.own_seconds += self.engine.forward_seconds()
        scale = self.engine.loss_scale
        return {
            "grad_norm": self.engine.grad_norm,
            "lr": self.peak_lr * multiplier,
            "epoch": self.loader.progress(),
            "tokens": self.counters.tokens,
            "weight_so_far": self.counters.weight,
            "skipped_steps": self.counters.skipped_steps,
            "peak_bytes": peak_memory(self.world.device),
            **({} if scale is None else {"loss_scale": scale}),
        }

    def _judge(self, metrics: dict[str, float]) -> bool:
        """Compare with the best evaluation so far; returns whether this one is better."""
        counters, train = self.counters, self.train
        value = metrics[train.best_metric]
        gain = self.metrics[train.best_metric].gain
        finite = math.isfinite(value)  # NaN would stay the best for ever, as nothing compares with it
        better = finite and (counters.best is None or gain(value, counters.best) > 0)
        if better:
            counters.best, counters.best_step = value, counters.step
        reference = counters.patience_best
        if finite and (reference is None or gain(value, reference) > train.early_stopping_min_delta):
            counters.patience_best, counters.evaluations_without_improvement = value, 0
        else:
            counters.evaluations_without_improvement += 1
        patience = train.early_stopping_patience
        if patience and counters.evaluations_without_improvement >= patience:
            counters.finished = "early stop"
            best = f"was {counters.best:.6g} at step {counters.best_step}" if counters.best_step else "is not known"
            self.tracker.note(
                f"early stop: {train.best_metric} has not improved by more than {train.early_stopping_min_delta} in "
                f"{patience} evaluations; the best {best}"
            )
        return better

    def _refuse_endless_skipping(self) -> None:
        limit = self.train.max_skipped_steps
        if limit and self.counters.skipped_in_row >= limit:
            scale = self.engine.loss_scale
            cause = (
                f"the fp16 loss scale fell to {scale:g}: gradients overflow; use precision=bf16 or a lower optim.lr"
                if scale is not None
                else "loss or gradient is not finite: lower optim.lr, set optim.max_grad_norm, look for broken records"
            )
            raise UserError(
                f"{limit} steps in a row were skipped, the last one step {self.counters.step} "
                f"(train.max_skipped_steps={limit}); {cause}. The last checkpoint is untouched."
            )
