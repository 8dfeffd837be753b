"""A run that is refused changes nothing, whatever it is refused for; one that is accepted goes on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cases
import pytest
import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.save(home / "model")
    tiny.save(home / "other", seed=1)
    tiny.write_jsonl(home / "train.jsonl", tiny.records(40))
    tiny.write_jsonl(home / "changed.jsonl", tiny.records(40, seed=5))
    return home


def settings(home: Path, run_dir: str = "run", **changes) -> dict:
    """The config of a short LoRA run in `home`, with changes by section and name."""
    config = {
        "task": {"name": "causal_lm"},
        "model": {"path": str(home / "model")},
        "data": {"train": str(home / "train.jsonl"), "cache_dir": str(home / "cache"), "max_length": 64},
        "deepspeed": {"json": "ds_configs/zero1.json"},
        "tuning": {"method": "lora", "rank": 4, "alpha": 8.0},
        "batch": {"micro_batch_size": 1, "global_batch_size": 2},
        "train": {"max_steps": 3, "save_every": 2, "sample_tokens": 4, "epochs": None},
        "optim": {"name": "adamw"},
        "precision": "fp32",
        "run_dir": str(home / run_dir),
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        text = value.replace("HOME", str(home)) if isinstance(value, str) else value
        if key:
            config[section][key] = text
        else:
            config[section] = text
    return config


@pytest.fixture(scope="module")
def run_dir(pools, home) -> Path:
    """A finished run in the middle of an epoch, with what a kill and people leave behind."""
    assert pools(1).run(cases.runs, settings=[settings(home)], watched=str(home / "run"))[0] == [(0, True)]
    assert not (home / "run/.lock").exists()
    part = home / "run/checkpoints/step-000009.part"
    part.mkdir()
    (part / "half").write_bytes(b"half")
    (home / "run/.lock").touch()
    return home / "run"


REFUSALS = [
    ({"tuning__alpha": 256.0}, r"saved with tuning\.alpha=8(\.0)?, and this run has 256"),
    ({"tuning__rank": 8}, "saved with tuning.rank=4, and this run has 8"),
    ({"tuning": {"method": "full"}}, "saved with tuning.method=lora, and this run has full"),
    ({"train__seed": 1}, "saved with train.seed=0, and this run has 1"),
    ({"precision": "bf16"}, "saved with precision=fp32, and this run has bf16"),
    ({"optim__name": "sgd"}, "saved with optim.name=adamw, and this run has sgd"),
    ({"deepspeed__json": "ds_configs/zero2.json"}, "written with ZeRO stage 1, and this run has 2"),
    ({"data__train": "HOME/changed.jsonl"}, "was saved in the middle of an epoch with data.train="),
    ({"batch__global_batch_size": 4}, "within an epoch planned with batch.global_batch_size=2"),
    ({"model__path": "HOME/other"}, r"saved with the base model HOME/model, .*: HOME/other, .*model\.safetensors"),
    ({"train__resume": "never"}, "train.resume=never would overwrite them"),
]
FIRST = [
    ({"train__resume": "HOME/damaged"}, "damaged is no whole checkpoint: no readable manifest.json"),
    ({"train__resume": "HOME/run/checkpoints/step-000003", "tuning__alpha": 256.0}, r"saved with tuning\.alpha=8"),
    ({"tuning__target_modules": ["nothing"]}, "is the name of no linear layer"),
    ({"data__train": "HOME/missing.jsonl"}, r"missing\.jsonl"),
    ({"deepspeed__json": "HOME/missing.json"}, r"missing\.json"),
]


def test_a_refused_run_changes_nothing_in_its_directory(pools, home, run_dir):
    configs = [settings(home, **changes) for changes, _ in REFUSALS]
    outcomes = pools(1).run(cases.runs, settings=configs, watched=str(run_dir))[0]
    for (outcome, changed), (_, expected) in zip(outcomes, REFUSALS, strict=True):
        assert re.search(expected.replace("HOME", re.escape(str(home))), str(outcome)), (outcome, expected)
        assert not changed, expected


def test_another_number_of_ranks_changes_nothing(pools, home, run_dir):
    for rank in pools(2).run(cases.runs, settings=[settings(home)], watched=str(run_dir)):
        ((message, changed),) = rank
        assert "written with ranks 1, and this run has 2" in message
        assert not changed


def test_a_first_run_that_is_refused_leaves_nothing(pools, home, run_dir):
    """Neither its directory nor the directories above it that were made for it."""
    (home / "damaged").mkdir(exist_ok=True)
    configs = [settings(home, "new/and/deep/run", **changes) for changes, _ in FIRST]
    outcomes = pools(1).run(cases.runs, settings=configs, watched=str(run_dir))[0]
    for (outcome, _), (_, expected) in zip(outcomes, FIRST, strict=True):
        assert re.search(expected, str(outcome)), (outcome, expected)
    assert not (home / "new").exists()


def test_a_record_of_metrics_that_cannot_be_read_is_refused_before_anything_is_written(pools, home, run_dir):
    shutil.copytree(run_dir, home / "spoilt")
    metrics = home / "spoilt/metrics.jsonl"
    metrics.write_text("no row\n" + metrics.read_text())
    configs = [settings(home, "spoilt", train__max_steps=4)]
    ((message, changed),) = pools(1).run(cases.runs, settings=configs, watched=str(home / "spoilt"))[0]
    assert "metrics.jsonl:1: this line is no row of metrics" in message
    assert not changed


def test_a_model_that_leaks_is_refused_before_anything_is_written(pools, home):
    """The first forward pass belongs to the acceptance."""
    (outcome,) = pools(1).run(cases.leaking_run, settings=settings(home, "leaking/run", data__packing="bfd"))
    assert "does not keep the documents of a row apart" in outcome
    assert not (home / "leaking").exists()


def test_an_accepted_run_goes_on_and_clears_what_a_kill_left(pools, home, run_dir):
    configs = [settings(home, train__max_steps=4)]
    assert pools(1).run(cases.runs, settings=configs, watched=str(run_dir))[0] == [(0, True)]
    assert not list(run_dir.glob("checkpoints/*.part"))
    assert (run_dir / "checkpoints/step-000004/probe.safetensors").stat().st_size < 32 * 400 * 4 + 1000
