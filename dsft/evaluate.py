"""Validation over all ranks: the loss of every example exactly once, and a few generated answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from dsft.data.batch import collate
from dsft.data.loader import evaluation_batches
from dsft.engine import Engine
from dsft.metrics import Tally
from dsft.metrics.names import evaluation_metrics
from dsft.runtime.world import World
from dsft.types import Example

PATIENCE = 2.5
"""Seconds after which a rank that failed under ZeRO-3 takes it that the others did not."""


class Evaluator:
    """Evaluates a validation set; the result does not depend on batch size or number of ranks.

    Args:
        dataset: Validation examples, with their `lengths`.
        tokenizer: Turns generated tokens into text.
        world: The ranks.
        micro_batch_size: Examples per forward pass; None fills `token_budget`.
        token_budget: Tokens of a forward pass.
        samples: How many answers to generate, for the first examples.
        sample_tokens: Longest generated answer, in tokens.
        stop_tokens: Token ids that end an answer.
    """

    def __init__(
        self,
        dataset,
        tokenizer,
        world: World,
        micro_batch_size: int | None,
        token_budget: int,
        samples: int,
        sample_tokens: int,
        stop_tokens: Sequence[int] = (),
    ):
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._world = world
        self._batches = evaluation_batches(dataset.lengths, world.rank, world.size, micro_batch_size, token_budget)
        self._samples = samples
        self._sample_tokens = sample_tokens
        self._stop_tokens = list(stop_tokens)

    def metrics(self, engine: Engine, bar) -> dict[str, float]:
        """The `eval/...` metrics over the whole set, the same on every rank; all ranks call it.

        Args:
            engine: The model.
            bar: `tracking.Tracker.bar`, to show progress.
        """
        begun = time.perf_counter()
        tally, examples = Tally(), 0
        with bar("evaluate", len(self._batches)) as advance:
            for numbers in self._batches:
                batch = collate([self._dataset[i] for i in numbers])
                tally.add(engine.evaluate(batch))
                examples += batch.examples
                advance(1)
        mine = {name: float(value) for name, value in tally.sums.items()} | {"examples": float(examples)}
        rows = self._world.gather([*mine.values(), time.perf_counter() - begun])
        *sums, seconds = np.array(rows).T
        totals = {name: float(column.sum()) for name, column in zip(mine, sums)}
        return evaluation_metrics(totals) | {"time/eval_seconds": float(seconds.max())}

    def answers(self, engine: Engine) -> tuple[list[dict[str, str]], list[str]]:
        """Greedy answers to the first validation prompts; all ranks call it, and all generate the same.

        Under ZeRO-3 every rank must take part in every forward pass, so sharing prompts out would win nothing there.

        Returns:
            `prompt`, `reference` and `answer` of each, and what went wrong with those that are missing.

        Raises:
            Exception: One rank failed where others wait for it.
        """
        found, problems = [], []
        with engine.inference() as module, _own_settings(module.model) as model:
            positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
            for number in range(min(self._samples, len(self._dataset))):
                prompt, reference = split_prompt(self._dataset[number])
                room = min(self._sample_tokens, positions - len(prompt))
                if room < 1:
                    problems.append(f"the prompt of validation record {number + 1} alone fills the model")
                    continue
                texts, problem = self._together(engine, partial(self._answer, model, prompt, reference, room))
                (problems if problem else found).append(problem or texts)
        return found, problems

    def _answer(self, model, prompt: np.ndarray, reference: np.ndarray, room: int) -> dict[str, str]:
        """The greedy answer to one prompt, in at most `room` tokens."""
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(self._world.device)
        settings = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._stop_tokens or None,
        )
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        answer = output[0, ids.shape[1] :].tolist()
        parts = {"prompt": prompt.tolist(), "reference": reference.tolist(), "answer": answer}
        return {name: self._tokenizer.decode(part, skip_special_tokens=True) for name, part in parts.items()}

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
def _own_settings(model) -> Iterator[PreTrainedModel]:
    """The transformers model with empty generation settings, for it fills in from its own what a caller leaves open."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    settings, plain.generation_config = getattr(plain, "generation_config", None), GenerationConfig()
    try:
        yield plain
    finally:
        plain.generation_config = settings


def split_prompt(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Token ids before the first supervised token, and those of its run; plain text is split in the middle."""
    begin = int(example.columns["supervised"].argmax())
    if begin <= 1:
        begin = max(1, len(example.ids) // 2)
    unsupervised = np.flatnonzero(~example.columns["supervised"][begin:])
    end = begin + int(unsupervised[0]) if len(unsupervised) else len(example.ids)
    return example.ids[:begin], example.ids[begin:end]
