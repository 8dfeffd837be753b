"""Encoders adapted to raw text by the real command: in flat rows and padded, killed and resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import tiny
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

STEPS = ["train.max_steps=12", "train.log_every=2", "train.eval_every=5", "train.save_every=4", "train.seed=3"]
ENCODERS = {
    # dropout of activations and of attention weights, by which a wrong random state would show
    "bert": ({}, "bfd", "the model keeps documents apart"),
    "deberta-v2": ({"relative_attention": True}, "padded", "does not keep the documents of a row apart"),
}


@pytest.fixture(scope="module", params=ENCODERS)
def home(request, tmp_path_factory) -> tuple[str, Path]:
    """An encoder with its tokenizer, and texts of which some are longer than a row."""
    path = tmp_path_factory.mktemp(request.param)
    tiny.masked(request.param, "eager", **ENCODERS[request.param][0]).save_pretrained(path / "model")
    tiny.ENCODER_TOKENIZER.save_pretrained(path / "model")
    rows = [{"text": text} for text in [*tiny.texts(50), *tiny.texts(6, seed=1, longest=200)]]
    tiny.write_jsonl(path / "文本.jsonl", rows)
    return request.param, path


def arguments(path: Path, run: str) -> list[str]:
    return [
        f"run_dir={path / run}",
        "task=masked_lm",
        f"model.path={path / 'model'}",
        "data=jsonl",
        f"data.train={path / '文本.jsonl'}",
        f"data.cache_dir={path / 'cache'}",
        "data.validation_share=0.2",
        "data.max_length=32",
        "precision=fp32",
        "batch.micro_batch_size=3",
        "batch.gradient_accumulation_steps=2",
        "eval.pseudo_perplexity=2",
        *STEPS,
    ]


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened_and_loads(home, scratch):
    family, path = home
    straight = helpers.train(arguments(path, "straight"), scratch)
    assert straight.code == 0, straight.err
    with helpers.start(arguments(path, "killed"), scratch) as running:
        running.until(helpers.reached(path / "killed", 6))
        running.kill()
    resumed = helpers.train(arguments(path, "killed"), scratch)
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.err
    assert helpers.numbers(path / "killed") == helpers.numbers(path / "straight")
    weights = [(path / run / "model/model.safetensors").read_bytes() for run in ("killed", "straight")]
    assert weights[0] == weights[1]

    _, packing, why = ENCODERS[family]
    audit = json.loads((path / "straight/audit.json").read_text(encoding="utf-8"))
    assert audit["packing"]["packing"] == packing
    assert f"data.packing=auto takes {packing}: " in straight.err and why in straight.err
    train = audit["train"]
    assert train["records_kept"] + train["records_held_out"] == 56 and train["examples"] > train["records_kept"]
    check_model(path / "straight")
    given = [f"run_dir={path / 'labels'}", "task=classify", f"model.path={path / 'straight/model'}", "data=jsonl"]
    given += [f"data.train={tiny.write_jsonl(path / 'labels.jsonl', tiny.labelled_rows(20))}", "train.max_steps=2"]
    given += [f"data.cache_dir={path / 'cache'}", "data.max_length=48", "precision=fp32", "train.export=false"]
    task = helpers.train(given, scratch)
    assert task.code == 0, task.err
    assert "the head has 3 outputs: blue, red, 狐狸; new, by" in task.err


def check_model(run: Path) -> None:
    """The exported model fills a mask, and its pseudo-perplexity was written down."""
    model = AutoModelForMaskedLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    with torch.no_grad():
        logits = model(**tokenizer("the red [MASK] sees", return_tensors="pt")).logits
    assert logits.isfinite().all()
    rows = helpers.rows(run)
    evaluations = [row for row in rows if "eval/loss" in row]
    assert evaluations[-1]["eval/pseudo_perplexity"] < evaluations[0]["eval/pseudo_perplexity"]
    assert {"eval/token_accuracy", "eval/perplexity", "eval/masked_tokens"} <= evaluations[0].keys()
    (sample, *_) = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert "[MASK]" in sample["prompt"]
