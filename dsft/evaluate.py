"""Validation over all ranks: the loss of every example exactly once, and a few generated answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from dsft.data.dataset import TokenDataset
from dsft.data.loader import evaluation_batches
from dsft.engine import Engine
from dsft.metrics import Metric, Row, Tally, form
from dsft.metrics.ledger import across
from dsft.runtime.world import World
from dsft.tasks.collate import Collator
from dsft.tasks.task import Sampling

PATIENCE = 2.5
"""Seconds after which a rank that failed under ZeRO-3 takes it that the others did not."""


class Evaluator:
    """Evaluates a validation set; the result does not depend on batch size or number of ranks.

    Args:
        dataset: Validation examples, with their `lengths`.
        collator: Makes batches of them.
        world: The ranks.
        metrics: All that the run declares, by name.
        micro_batch_size: Documents per forward pass; None fills `token_budget`.
        token_budget: Tokens of a forward pass.
        stop_tokens: Token ids that end a generated answer.
        row: Which rows its metrics stand in: EVALUATION or TEST.

    Attributes:
        decision: What decides answers beside the model (`Task.decision`); None where an evaluation is to find it.
        about: What the task has to show of the last evaluation beside its metrics (`Task.judge`), in JSON types.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        collator: Collator,
        world: World,
        metrics: Mapping[str, Metric],
        micro_batch_size: int | None,
        token_budget: int,
        stop_tokens: Sequence[int] = (),
        row: Row = Row.EVALUATION,
    ):
        self._row = row
        self._dataset = dataset
        self._collator = collator
        self._world = world
        self._metrics = metrics
        task, context = collator.task, collator.context
        numbers = range(len(dataset))
        views = np.ones(len(dataset), dtype=np.int64)
        if task.views is not None:
            views[:] = [task.views(dataset[number], number, context) for number in numbers]
        # each document is an example and the number of one of its views
        self._examples = np.repeat(np.arange(len(dataset)), views)
        self._views = np.concatenate([np.arange(count) for count in views])
        lengths = np.asarray(dataset.lengths)[self._examples]
        self._batches = evaluation_batches(lengths, world.rank, world.size, micro_batch_size, token_budget)
        self._stop_tokens = list(stop_tokens)
        self.about: dict[str, Any] = {}
        self.decision: dict[str, Any] | None = None

    def metrics(self, engine: Engine, bar: Callable[..., AbstractContextManager]) -> dict[str, float]:
        """The metrics of an evaluation over the whole set, the same on every rank; all ranks call it.

        Args:
            engine: The model.
            bar: `tracking.Tracker.bar`, to show progress.
        """
        begun = time.perf_counter()
        tally, examples, numbers = Tally(), 0, list[int]()
        with bar("evaluate" if self._row is Row.EVALUATION else "test", len(self._batches)) as advance:
            for documents in self._batches:
                parts = [self._dataset[int(number)] for number in self._examples[documents]]
                numbers.extend(self._examples[documents].tolist() if len(documents) else [])
                batch = self._collator.evaluate(parts, self._views[documents].tolist())
                tally.add(engine.evaluate(batch))
                examples += batch.examples
                advance(1)
        sums = tally.read()
        quantities = {"examples": examples, **self._judged(tally, numbers)}
        quantities["eval_seconds"] = time.perf_counter() - begun
        return form(self._metrics, self._row, across(self._world.gather, sums, quantities))

    def _judged(self, tally: Tally, numbers: list[int]) -> dict[str, float]:
        """What the task makes of the rows of all ranks; the same on every rank.

        Args:
            tally: With this rank's rows.
            numbers: Which example each of them is of.
        """
        task, context = self._collator.task, self._collator.context
        if task.judge is None:
            return {}
        mine = {name: torch.cat(rows).cpu().numpy() for name, rows in tally.rows.items()}
        parts = [part for part in self._world.gather_objects((numbers, mine)) if part[0]]
        rows = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
        if task.kind.by_document:
            order = np.argsort(np.concatenate([part[0] for part in parts]))
            rows = {name: values[order] for name, values in rows.items()}
        found, self.about = task.judge(rows, replace(context, decision=self.decision), self._dataset)
        return found

    def answers(self, engine: Engine) -> tuple[list[dict[str, str]], list[str]]:
        """The task's samples of the first validation examples; all ranks call it, and all make the same.

        Under ZeRO-3 every rank must take part in every forward pass, so sharing them out would win nothing there.

        Returns:
            `prompt`, `reference` and `answer` of each, and what went wrong with those that are missing.

        Raises:
            Exception: One rank failed where others wait for it.
        """
        found: list[dict[str, str]] = []
        problems: list[str] = []
        task, context = self._collator.task, self._collator.context
        if task.sample is None:
            return found, problems
        with engine.inference() as module, own_settings(module.model) as model:
            sampling = Sampling(model, self._world.device, self._stop_tokens, context.train.sample_tokens)
            for number in range(min(context.train.samples, len(self._dataset))):
                make = partial(task.sample, sampling, self._dataset[number], context)
                texts, problem = self._together(engine, make)
                if texts is None:
                    problems.append(f"record {number + 1}: {problem}")
                else:
                    found.append(texts)
        return found, problems

    def _together(self, engine: Engine, make: Callable[[], dict[str, str]]) -> tuple[dict[str, str] | None, str | None]:
        """What `make` gives, or what went wrong with it on any rank; the same on all ranks.

        A sample is not worth a run, so its failure is no exception, unless this rank may have left others in the
        middle of a collective of ZeRO-3. Hence ranks hear of each other without one.
        """
        texts = failure = None
        try:
            texts = make()
        except Exception as problem:  # whatever a model, a tokenizer or a device comes up with
            failure = problem
        message = f"{type(failure).__name__}: {failure}" if failure else ""
        try:
            messages = self._world.exchange(message, PATIENCE if failure and engine.stage == 3 else None)
        except TimeoutError as silence:
            raise (failure or silence) from None
        ranks = [(rank, theirs) for rank, theirs in enumerate(messages) if theirs]
        return (None, "rank {}: {}".format(*ranks[0])) if ranks else (texts, None)


@contextmanager
def own_settings(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The transformers model with empty generation settings, for it fills in from its own what a caller leaves open."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    settings, plain.generation_config = getattr(plain, "generation_config", None), GenerationConfig()
    try:
        yield plain
    finally:
        plain.generation_config = settings
