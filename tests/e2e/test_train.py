"""One run from the command line to the exported model, on two ranks."""

import json
import sys
from pathlib import Path

import helpers
import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft import checkpoint
from dsft.commands.export import export

CHAT = [{"role": "user", "content": "月亮在哪里 ？"}]


@pytest.fixture(scope="module")
def full(base, scratch, tmp_path_factory):
    """A finished ZeRO-2 run with its arguments and result."""
    run_dir = tmp_path_factory.mktemp("full") / "运行"
    steps = ["train.max_steps=10", "train.eval_every=4", "train.save_every=3", "train.keep_last=3"]
    steps += ["train.sample_tokens=8"]
    arguments = [f"run_dir={run_dir}", *base, *steps]
    return run_dir, arguments, helpers.train(arguments, scratch)


@pytest.fixture(scope="module")
def lora(base, scratch, tmp_path_factory):
    """A finished LoRA run under ZeRO-3."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    chosen = ["tuning=lora", "tuning.rank=4", "deepspeed=zero3", "train.max_steps=4", "train.save_every=2"]
    chosen += ["train.sample_tokens=8"]
    result = helpers.train([f"run_dir={run_dir}", *base, *chosen], scratch)
    assert result.code == 0, result.err
    return run_dir


def exported(run_dir: Path, scratch: Path, fresh: bool = False, **options) -> helpers.Result:
    command = ["launch/export.py", f"run_dir={run_dir}", *(f"{name}={value}" for name, value in options.items())]
    return helpers.run([sys.executable, *command], scratch) if fresh else helpers.script(command, scratch)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43)[None]).logits


def of_checkpoint(path: Path, base: list[str]):
    """The model that a checkpoint's own weights make."""
    model = AutoModelForCausalLM.from_pretrained(base[0].partition("=")[2], dtype=torch.float32)
    missing, unexpected = model.load_state_dict(checkpoint.weights(path), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return model


def test_two_ranks_learn_and_say_so(full):
    run_dir, _, result = full
    assert result.code == 0, result.err
    losses = [row["train/loss"] for row in helpers.rows(run_dir) if "train/loss" in row]
    assert len(losses) == 10
    assert losses[-1] < 0.9 * losses[0]
    before, *_, after = [row["eval/loss"] for row in helpers.rows(run_dir) if "eval/loss" in row]
    assert after < 0.9 * before
    for shown in (f"{before:.4f}", f"{after:.4f}", "2 rank(s)", "exported"):
        assert shown in result.err
    assert "Traceback" not in result.err


def test_the_run_directory_holds_what_is_documented(full):
    run_dir, _, _ = full
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.yaml",
        "ds_config.json",
        "environment.json",
        "audit.json",
        "metrics.jsonl",
        "samples.json",
        "checkpoints",
        "model",
        "report.html",
    }
    assert yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["run_dir"] == str(run_dir)
    assert json.loads((run_dir / "ds_config.json").read_text(encoding="utf-8"))["train_batch_size"] == 8
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    assert environment["world_size"] == 2
    audit = json.loads((run_dir / "audit.json").read_text(encoding="utf-8"))
    assert (audit["train"]["records_read"], audit["validation"]["records_read"]) == (120, 11)
    report = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "训练.jsonl" in report and "http" not in report
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".part", ".tmp", ".unfinished")]


def test_every_row_of_metrics_is_declared_and_complete(full):
    rows = helpers.rows(full[0])
    assert all(row.keys() - {"step"} <= tiny.METRICS.keys() for row in rows)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 11))
    always = {name for name in tiny.METRICS if name.startswith(("train/", "time/step", "memory/"))} - {
        "train/loss_scale"
    }
    assert all(always <= row.keys() for row in training)
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 10]
    assert all(row["eval/examples"] == 11 for row in evaluations)
    assert {name for name in tiny.METRICS if name.startswith("eval/")} <= evaluations[0].keys()


def test_the_model_is_that_of_the_last_step(full, base):
    run_dir, _, _ = full
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(of_checkpoint(run_dir / "checkpoints/step-000010", base)))
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "月亮在哪里" in tokenizer.decode(prompt["input_ids"][0])
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]


def test_any_checkpoint_is_exported(full, base, scratch, tmp_path):
    run_dir, _, _ = full
    result = exported(run_dir, scratch, fresh=True, checkpoint="best", output=tmp_path / "best")
    assert result.code == 0, result.err
    evaluations = {row["step"]: row["eval/loss"] for row in helpers.rows(run_dir) if row["step"] and "eval/loss" in row}
    best = run_dir / f"checkpoints/step-{min(evaluations, key=evaluations.get):06d}"
    export(run_dir, which="8", output=tmp_path / "8")
    for name, path in (("best", best), ("8", run_dir / "checkpoints/step-000008")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        torch.testing.assert_close(logits(model), logits(of_checkpoint(path, base)))


def test_the_finished_command_does_no_harm(full, scratch):
    run_dir, arguments, _ = full
    watched = [run_dir / "metrics.jsonl", *sorted((run_dir / "checkpoints").rglob("*.*"))]
    before = {path: path.read_bytes() for path in [*watched, run_dir / "model/model.safetensors"]}
    result = helpers.train(arguments, scratch)
    assert result.code == 0, result.err
    assert "finished" in result.err
    assert {path: path.read_bytes() for path in before} == before


def test_adapters_are_exported_alone_and_merged(lora, base, scratch, tmp_path):
    result = exported(lora, scratch, merge="false", output=tmp_path / "adapters")
    assert result.code == 0, result.err
    assert not (tmp_path / "adapters/model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(base[0].partition("=")[2], dtype=torch.float32)
    untrained = logits(model)
    adapted = logits(PeftModel.from_pretrained(model, tmp_path / "adapters"))
    assert (adapted - untrained).abs().max() > 1e-3
    export(lora, which="last", output=tmp_path / "merged")
    for merged in (tmp_path / "merged", lora / "model"):
        found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
        torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-4)


def test_adapters_that_do_not_exist_are_refused(full, scratch, tmp_path):
    result = exported(full[0], scratch, merge="false", output=tmp_path / "adapters")
    assert result.code == 2
    assert "tuning=full" in result.err and "Traceback" not in result.err
