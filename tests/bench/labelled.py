"""Tags and answers: dsft's run beside transformers' Trainer and beside a plain loop, on the same examples.

    python tests/bench/labelled.py [--rows 8] [--threads 2] task=tag data.train=train.conll model.path=DIR OVERRIDES

The overrides are given to `launch/train.py` as they are. One process trains at a time, with as many threads each, in
turn: dsft, the Trainer (the same examples padded, `--rows` at a time, in an order of its own), and a loop that takes
the examples of each of dsft's steps one by one, with the same first weights, AdamW and a constant rate. Dropout is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from dsft import assemble
from dsft.config import load
from dsft.model import load as models
from dsft.runtime.place import discover
from dsft.tasks import TASKS
from dsft.tasks.task import View
from dsft.types import IGNORE_INDEX

ROOT = Path(__file__).parents[2]
FIXED = ["precision=fp32", "schedule=constant", "train.eval_every=0", "train.save_every=0", "train.export=false"]
FIXED += ["train.resume=never", "optim.weight_decay=0", "deepspeed=zero0", "data=jsonl", "batch.micro_batch_size=2"]
FIXED += ["batch.gradient_accumulation_steps=1", "tracking.progress=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [*FIXED, *options.overrides, f"run_dir={scratch}/run"]
        load.register()
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = load.from_hydra(hydra.compose("config", overrides=overrides))
        source = models.resolve(config.model.path, kind=TASKS[config.task.name].kind)
        directory = without_dropout(source.path, Path(scratch) / "model")
        overrides.append(f"model.path={directory}")
        config.model.path = str(directory)
        made = assemble.plan(config, discover())
        rows = run(overrides, Path(scratch), options.threads)
        rest = rows[1:]
        ours = median(row["time/tokens_per_second"] for row in rest)
        theirs = trainer(made, config, len(rows), options.rows, scratch)
        print(f"dsft     {ours:8,.0f} tokens/s (median of {len(rest)} steps, {made.packing.value})")
        print(f"Trainer  {theirs:8,.0f} tokens/s ({options.rows} padded rows a step)")
        print(f"dsft / Trainer: {ours / theirs:.2f}")
        losses = plain_loop(made, config, len(rows))
        away = max(abs(row["train/loss"] - loss) / loss for row, loss in zip(rows, losses, strict=True))
        print(f"loss of {len(rows)} steps, {losses[0]:.4f} to {losses[-1]:.4f}: at most {away:.1e} from the loop's")


def without_dropout(path: str, copy: Path) -> Path:
    """A copy of a model's directory whose config drops nothing."""
    shutil.copytree(path, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {name: 0.0 for name, value in config.items() if "drop" in name and isinstance(value, float)}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def run(overrides: list[str], scratch: Path, threads: int) -> list[dict[str, float]]:
    """Training rows of a run of dsft."""
    command = [sys.executable, str(ROOT / "launch/train.py"), *overrides]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    lines = (scratch / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def fields(made: assemble.Plan, example: Any) -> dict[str, Any]:
    """An example as transformers' own models take it."""
    arrays = made.task.inputs(example, View(0), made.collator.context)
    wanted = {
        name: torch.as_tensor(arrays[name]) for name in ("input_ids", "token_type_ids", "labels") if name in arrays
    }
    if "document_target" in arrays:
        wanted |= dict(zip(("start_positions", "end_positions"), torch.as_tensor(arrays["document_target"])))
    return wanted


def fresh(made: assemble.Plan) -> Any:
    """The model with its first weights."""
    return models.load_model(made.model.source, torch.float32, "sdpa").train()


def trainer(made: assemble.Plan, config: Any, steps: int, rows: int, scratch: str) -> float:
    """Tokens of examples that transformers' Trainer takes in a second, from its second step on."""
    counted: list[int] = []
    moments: list[float] = []

    def padded(parts: list[dict]) -> dict[str, torch.Tensor]:
        counted.append(sum(len(part["input_ids"]) for part in parts))
        moments.append(time.perf_counter())
        filling = {"labels": IGNORE_INDEX}
        batch = {
            name: pad_sequence([part[name] for part in parts], True, filling.get(name, 0)) if values.dim() else
            torch.stack([part[name] for part in parts])
            for name, values in parts[0].items()
        }  # fmt: skip
        lengths = torch.tensor([len(part["input_ids"]) for part in parts])
        mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        return batch | {"attention_mask": mask.long()}

    data = [fields(made, made.train_set[number]) for number in range(len(made.train_set))]
    settings = TrainingArguments(
        output_dir=f"{scratch}/trainer",
        per_device_train_batch_size=rows,
        max_steps=steps + 1,
        learning_rate=config.optim.lr,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(fresh(made), settings, train_dataset=data, data_collator=padded).train()
    # it asks for a batch before it has trained on the one before: times between like places are those of a step
    return sum(counted[1:steps]) / (moments[steps] - moments[1])


def plain_loop(made: assemble.Plan, config: Any, steps: int) -> list[float]:
    """The loss of each step, as transformers' models give it for single examples."""
    model = fresh(made)
    optimizer = torch.optim.AdamW(model.parameters(), config.optim.lr, tuple(config.optim.betas), weight_decay=0)
    losses = []
    for step in range(steps):
        examples = [made.train_set[int(number)] for row in made.planner.step_rows(0, step) for number in row]
        weight, total = sum(example.weight for example in examples), 0.0
        optimizer.zero_grad()
        for example in examples:
            given = {name: value[None] for name, value in fields(made, example).items()}
            loss = model(**given).loss * (example.weight / weight)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        losses.append(total)
    return losses


if __name__ == "__main__":
    main()
