"""Validation over all ranks: the loss of every example exactly once, and a few generated answers."""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from dsft.data.batch import collate
from dsft.data.loader import evaluation_batches
from dsft.engine import Engine
from dsft.metrics import Tally
from dsft.metrics.names import evaluation_metrics
from dsft.runtime.world import World
from dsft.types import Example


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
    ):
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._world = world
        self._batches = evaluation_batches(dataset.lengths, world.rank, world.size, micro_batch_size, token_budget)
        self._samples = samples
        self._sample_tokens = sample_tokens

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

    def answers(self, engine: Engine) -> list[dict[str, str]]:
        """Greedy answers to the first validation prompts; all ranks call it, and all generate the same.

        Under ZeRO-3 every rank must take part in every forward pass, so sharing prompts out would win nothing there.

        Returns:
            `prompt`, `reference` and `answer` of each.
        """
        found = []
        with engine.inference() as module:
            config = module.model.config.get_text_config()
            positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
            for number in range(min(self._samples, len(self._dataset))):
                example = self._dataset[number]
                prompt, reference = split_prompt(example)
                room = min(self._sample_tokens, positions - len(prompt))
                if room < 1:
                    continue  # the prompt alone fills the model
                ids = torch.from_numpy(prompt.astype(np.int64))[None].to(self._world.device)
                output = module.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=room,
                    do_sample=False,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
                answer = output[0, ids.shape[1] :].tolist()
                decode = self._tokenizer.decode
                found.append(
                    {
                        "prompt": decode(prompt.tolist(), skip_special_tokens=True),
                        "reference": decode(reference.tolist(), skip_special_tokens=True),
                        "answer": decode(answer, skip_special_tokens=True),
                    }
                )
        return found


def split_prompt(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Token ids before the first supervised token, and those of its run; plain text is split in the middle."""
    begin = int(example.supervised.argmax())
    if begin <= 1:
        begin = max(1, len(example.ids) // 2)
    unsupervised = np.flatnonzero(~example.supervised[begin:])
    end = begin + int(unsupervised[0]) if len(unsupervised) else len(example.ids)
    return example.ids[:begin], example.ids[begin:end]
