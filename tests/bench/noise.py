"""What noise costs that is the same for any split: percent of a forward and backward pass.

    python tests/bench/noise.py [--tokens 2048] [--layers 30] [--rounds 5] [--threads 1]

A Llama of SmolLM2-135M's shape with random weights. Each way of noise is taken in turn with the same model without
noise, and with torch's own dropout where it has one, so that their ratios hold although machines are noisy.
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
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import collate

from dsft.config.schema import Attention, Method, TaskConfig, TuningConfig
from dsft.model import attention, tuning
from dsft.model.noise import Noise
from dsft.runtime.world import computes_bf16
from dsft.tasks import TASKS
from dsft.tasks.isolation import probe_tokens
from dsft.tasks.module import TaskModule
from dsft.types import Example

SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def example(ids: np.ndarray, supervised: np.ndarray, number: int = 0) -> Example:
    """An example of these ids."""
    return Example(
        {"ids": ids, "weights": supervised.astype(np.float32)}, len(ids), float(supervised.sum()), number=number
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = row(options.tokens).to(device)
    make = partial(task, options.layers, device)
    ways = {
        "lora": make(Method.lora, rate=0.0),
        "lora, dropout 0.1": make(Method.lora, rate=0.1),
        "lora, torch's dropout 0.1": torchs_own(make(Method.lora, rate=0.1)),
        "full": make(Method.full),
        "full, NEFTune 5": make(Method.full, alpha=5.0),
        "full, attention dropout 0.1": make(Method.full, attention_rate=0.1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            taken = step(way, batch, device)
            if number:  # the first round warms up
                seconds[name].append(taken)
    print(f"{batch.tokens} tokens, {options.layers} layers, {device}, median of {options.rounds}")
    for name, taken in seconds.items():
        ratios = [100 * (a / b - 1) for a, b in zip(taken, seconds[name.partition(",")[0]], strict=True)]
        spread = f"{median(ratios):+6.1f} % ({min(ratios):+.1f} to {max(ratios):+.1f})"
        print(f"{name:30} {median(taken) * 1000:9.1f} ms  {spread}")


def row(tokens: int):
    """Documents of 100 to 300 tokens, about as many tokens as asked for."""
    random = np.random.default_rng(0)
    examples = []
    while sum(len(e.ids) for e in examples) < tokens:
        ids = random.integers(0, SHAPE["vocab_size"], int(random.integers(100, 301))).astype(np.int32)
        supervised = np.arange(len(ids)) > len(ids) // 2
        examples.append(example(ids, supervised, len(examples)))
    return collate(examples)


def task(
    layers: int, device, method: Method, rate: float = 0.0, alpha: float = 0.0, attention_rate: float = 0.0
) -> TaskModule:
    """The task around a model in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, attention_dropout=attention_rate)
    config._attn_implementation = attention.NAME
    dtype = torch.bfloat16 if computes_bf16() else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype)
    model = tuning.apply(model, TuningConfig(method=method, dropout=rate), seed=0).to(device)
    noise = Noise(model, 0, alpha)
    kernel = attention.choose_kernel(Attention.auto, device, dtype, dropout=attention_rate > 0)
    tokens = probe_tokens([example(np.arange(48, dtype=np.int32), np.ones(48, dtype=bool))])
    return TaskModule(
        model, partial(TASKS["causal_lm"].loss, settings=TaskConfig()), kernel, 1024, noise, tokens
    ).train()


def torchs_own(task: TaskModule) -> TaskModule:
    """The same with torch's dropout, which depends on the split."""
    for module in task.modules():
        if isinstance(module, torch.nn.Dropout):
            del module.forward
    task._checked = True  # the check would refuse it
    return task


def step(task: TaskModule, batch, device) -> float:
    task.zero_grad()
    begun = time.perf_counter()
    loss, _ = task(batch)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
