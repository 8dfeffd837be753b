"""A task is one file and one entry: the toy task, trained by the real command and held against a plain loop."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import pytest
import tiny
import torch
from torch.nn import functional as F
from toy import ANSWERS
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    tiny.save(path / "model")
    rows = [{"text": text, "true": len(text) % 2 == 0} for text in tiny.texts(24)]
    tiny.write_jsonl(path / "train.jsonl", rows)
    return path


def settings(home: Path, **changes) -> dict:
    return {
        "task": {"name": "toy"},
        "model": {"path": str(home / "model")},
        "data": {
            "train": str(home / "train.jsonl"),
            "cache_dir": str(home / "cache"),
            "validation_share": 0.25,
            "max_length": 64,
        },
        "deepspeed": {"json": "ds_configs/zero2.json"},
        "batch": {"global_batch_size": 4},
        "train": {"max_steps": 3},
        "precision": "fp32",
        **changes,
    }


@pytest.mark.parametrize("packing", ["bfd", "padded"])
def test_a_run_of_the_toy_task(pools, home, packing):
    run = home / packing
    changes = {"run_dir": str(run)}
    config = settings(home, **changes)
    config["data"]["packing"] = packing
    for outcome in pools(2).run(cases.runs, settings=[config], watched=str(home / "cache")):
        assert outcome[0][0] == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/labels"] == rows[-1]["eval/examples"] == 6
    assert {"train/loss", "train/labels"} <= rows[1].keys()
    assert rows[-1]["eval/loss"] == pytest.approx(evaluation(run, home)[0], rel=1e-5)
    assert rows[-1]["eval/accuracy"] == evaluation(run, home)[1]
    assert "Accuracy" in (run / "report.html").read_text()


def evaluation(run: Path, home: Path) -> tuple[float, float]:
    """Loss and accuracy of the exported model on the held-out statements, one at a time by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    held_out, total, right = held_out_statements(home), 0.0, 0
    for text, true in held_out:
        ids = torch.tensor([tiny.TOKENIZER(text)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1, ANSWERS]
        total += float(F.cross_entropy(logits[None], torch.tensor([int(true)])))
        right += int(logits.argmax() == int(true))
    return total / len(held_out), right / len(held_out)


def held_out_statements(home: Path) -> list[tuple[str, bool]]:
    import numpy as np

    rows = [json.loads(line) for line in (home / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = sorted(np.random.default_rng(0).permutation(len(rows))[:6])
    return [(rows[i]["text"], rows[i]["true"]) for i in chosen]


def test_settings_that_it_does_not_read_are_refused(pools, home):
    config = settings(home, run_dir=str(home / "refused"))
    config["data"]["train_on"] = "all"
    (((outcome, _),),) = pools(1).run(cases.runs, settings=[config], watched=str(home / "cache"))
    assert "data.train_on=all does nothing with task=toy: choose task=causal_lm" in outcome


def test_a_malformed_row_is_named(pools, home):
    (home / "bad.jsonl").write_text('{"text": "a", "true": "yes"}\n')
    config = settings(home, run_dir=str(home / "refused"))
    config["data"]["train"] = str(home / "bad.jsonl")
    (((outcome, _),),) = pools(1).run(cases.runs, settings=[config], watched=str(home / "model"))
    assert "bad.jsonl:1: field `true` is true or false, but this is 'yes'" in outcome


def test_it_is_short_and_stands_in_the_guide():
    text = (ROOT / "tests" / "toy.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert text in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
