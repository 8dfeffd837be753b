"""Texts written from texts by the real command: killed and resumed on two ranks, exported whole and as adapters."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

STEPS = ["train.max_steps=12", "train.log_every=2", "train.eval_every=5", "train.save_every=4", "train.seed=3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A T5 with dropout, and texts of which some are longer than a row."""
    path = tmp_path_factory.mktemp("written")
    tiny.two_sided("t5", dropout_rate=0.1).save_pretrained(path / "model")
    tiny.TWO_SIDED_TOKENIZER.save_pretrained(path / "model")
    tiny.write_jsonl(path / "翻译.jsonl", tiny.written_rows(70))
    return path


def arguments(path: Path, run: str) -> list[str]:
    return [
        f"run_dir={path / run}",
        "task=seq2seq",
        f"model.path={path / 'model'}",
        "data=jsonl",
        f"data.train={path / '翻译.jsonl'}",
        f"data.cache_dir={path / 'cache'}",
        "data.validation_share=0.2",
        "data.max_length=24",
        "data.max_target_length=12",
        "task.source_prefix='翻译: '",
        "task.label_smoothing=0.1",
        "precision=fp32",
        "batch.micro_batch_size=2",
        "batch.gradient_accumulation_steps=2",
        "train.sample_tokens=8",
        *STEPS,
    ]


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened_and_loads(home, scratch):
    straight = helpers.train(arguments(home, "straight"), scratch)
    assert straight.code == 0, straight.err
    with helpers.start(arguments(home, "killed"), scratch) as running:
        running.until(helpers.reached(home / "killed", 6))
        running.kill()
    resumed = helpers.train(arguments(home, "killed"), scratch)
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.err
    assert helpers.numbers(home / "killed") == helpers.numbers(home / "straight")
    for name in ("model/model.safetensors", "samples.json"):
        files = [(home / run / name).read_bytes() for run in ("killed", "straight")]
        assert files[0] == files[1], name
    audit = json.loads((home / "straight/audit.json").read_text(encoding="utf-8"))
    assert audit["packing"]["packing"] == "padded" and 0 < audit["packing"]["padding"] < 0.5
    assert audit["train"]["notes"]["targets that were cut off, whose end is not learnt"] > 0
    check_sample(home / "straight")


def check_sample(run: Path) -> None:
    """The exported model writes the run's last sample."""
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    (first, *_, last) = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert last["prompt"].startswith("翻译: ") and last["reference"] == first["reference"]
    tokens = tokenizer(last["prompt"], return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(written, skip_special_tokens=True) == last["answer"]


def test_adapters_under_zero3(home, scratch):
    result = helpers.train([*arguments(home, "lora"), "tuning=lora", "deepspeed=zero3", "optim.lr=0.01"], scratch)
    assert result.code == 0, result.err
    evaluated = [row for row in helpers.rows(home / "lora") if "eval/loss" in row]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"]
    alone = home / "lora" / "alone"
    done = helpers.script(["launch/export.py", f"run_dir={home / 'lora'}", "merge=false", f"output={alone}"], scratch)
    assert done.code == 0, done.err
    base = AutoModelForSeq2SeqLM.from_pretrained(home / "model")
    adapted = PeftModel.from_pretrained(base, str(alone)).eval()
    merged = AutoModelForSeq2SeqLM.from_pretrained(home / "lora" / "model").eval()
    tokens = tiny.TWO_SIDED_TOKENIZER("月亮在哪里 ？", text_target="the red fox", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(adapted(**tokens).logits, merged(**tokens).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.packing=bfd", "data.packing=bfd: an encoder-decoder reads one text and writes another"),
        ("task.target_language=fr", "task.target_language=fr does nothing with"),
        ("tuning.neftune_alpha=5", "tuning.neftune_alpha=5.0: encoder-decoders look tokens up at several places"),
        ("data.train_on=all", "data.train_on=all does nothing with task=seq2seq"),
    ],
)
def test_what_does_not_belong_is_refused_before_anything_is_written(home, scratch, given, message):
    result = helpers.train([*arguments(home, f"refused {given}"), given], scratch, ranks=1)
    assert result.code != 0 and "Traceback" not in result.err
    assert message in result.err
    assert not (home / f"refused {given}").exists()
