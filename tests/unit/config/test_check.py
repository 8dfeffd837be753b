"""Cross-field rules: each refusal names the settings concerned and a way out."""

import itertools
import math

import pytest
import tiny

from dsft.config import schema
from dsft.config.check import BatchSizes, check, check_model, check_rotation, resolve_batch
from dsft.config.load import knobs
from dsft.config.schema import (
    BatchConfig,
    Config,
    Method,
    OptimName,
    Packing,
    Precision,
    ScheduleName,
    Source,
)
from dsft.errors import UserError
from dsft.metrics import comparable
from dsft.tasks import settings_by_task

CPU = {"device": "cpu"}


def config(**settings) -> Config:
    """A sound config with `section__knob=value` set."""
    made = Config()
    usual = {"task__name": "causal_lm", "data__train": "x.jsonl", "model__path": "m", "deepspeed__json": "ds.json"}
    for name, value in (usual | settings).items():
        *path, knob = name.split("__")
        section = made
        for part in path:
            section = getattr(section, part)
        assert hasattr(section, knob)
        setattr(section, knob, value)
    return made


def complaints(ds=None, world_size=2, **settings) -> list[str]:
    try:
        check(
            config(**settings),
            ds or {"zero_optimization": {"stage": 2}},
            world_size,
            settings_by_task(),
            comparable(tiny.METRICS),
        )
    except UserError as error:
        return str(error).splitlines()
    return []


def test_a_sound_config_passes():
    assert complaints() == []


def test_all_failures_are_told_together():
    lines = complaints(data__train=None, optim__lr=0.0, tuning__method=Method.freeze)
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"data__train": None}, ["data.source=files", "data.train=FILE", "data=pydoc"]),
        ({"data__source": Source.pydoc}, ["data.train=x.jsonl", "data.source=pydoc", "data=jsonl"]),
        ({"data__packages": ["numpy"]}, ["data.packages", "data.source=files", "data=pydoc"]),
        (
            {"data__validation": "v.jsonl", "data__validation_share": 0.5},
            ["data.validation=v.jsonl", "data.validation_share=0.5"],
        ),
        ({"data__packing": Packing.none, "data__pack_window": 8}, ["data.pack_window=8", "data.packing=none"]),
        ({"tuning__method": Method.freeze}, ["tuning.method=freeze", "tuning.last_layers=N", "tuning.trainable="]),
        ({"tuning__rank": 8}, ["tuning.rank=8", "tuning.method=full", "tuning=lora"]),
        ({"tuning__use_dora": True}, ["tuning.use_dora=true", "tuning=lora"]),
        ({"tuning__trainable": ["x"], "tuning__method": Method.lora}, ["tuning.trainable", "tuning=freeze"]),
        ({"tuning__trainable": ["("], "tuning__method": Method.freeze}, ["tuning.trainable", "'('"]),
        ({"tuning__method": Method.lora, "tuning__rank": 0}, ["tuning.rank=0", "at least 1"]),
        ({"tuning__method": Method.lora, "tuning__target_modules": []}, ["tuning.target_modules=[]", "all-linear"]),
        (
            {"schedule__warmup_steps": 5, "schedule__warmup_ratio": 0.1},
            ["schedule.warmup_steps=5", "schedule.warmup_ratio=0.1", "to 0"],
        ),
        (
            {"schedule__warmup_steps": 11, "train__max_steps": 10},
            ["schedule.warmup_steps=11", "train.max_steps=10", "Lower"],
        ),
        ({"schedule__restarts": 2, "schedule__name": ScheduleName.linear}, ["schedule.restarts=2", "schedule=cosine"]),
        ({"schedule__gamma": 0.5}, ["schedule.gamma=0.5", "schedule.name=cosine", "schedule=step|exponential|plateau"]),
        ({"schedule__min_lr_ratio": 0.1, "schedule__name": ScheduleName.constant}, ["schedule.min_lr_ratio=0.1"]),
        (
            {"schedule__name": ScheduleName.plateau, "data__validation_share": 0.0},
            ["schedule.name=plateau", "data.validation_share=0", "data.validation"],
        ),
        (
            {"schedule__name": ScheduleName.plateau, "train__eval_every": 0},
            ["schedule.name=plateau", "train.eval_every=0"],
        ),
        (
            {"train__early_stopping_patience": 3, "data__validation_share": 0.0},
            ["train.early_stopping_patience=3", "data.validation_share=0"],
        ),
        (
            {"train__early_stopping_min_delta": 0.1},
            ["train.early_stopping_min_delta=0.1", "train.early_stopping_patience=0"],
        ),
        ({"train__best_metric": "eval/los"}, ["train.best_metric=eval/los", "did you mean eval/loss?"]),
        ({"train__best_metric": "train/loss"}, ["train.best_metric=train/loss", "eval/loss"]),
        ({"train__best_metric": "eval/examples"}, ["train.best_metric=eval/examples", "gets better or worse"]),
        (
            {"schedule__metric": "eval/accuracy", "schedule__name": ScheduleName.plateau},
            ["schedule.metric=eval/accuracy", "did you mean eval/token_accuracy?"],
        ),
        ({"fp16__initial_scale_power": 8}, ["fp16.initial_scale_power=8", "precision=auto", "precision=fp16"]),
        ({"optim__momentum": 0.5}, ["optim.momentum=0.5", "optim.name=adamw", "optim=sgd|muon"]),
        ({"tracking__tags": ["a"]}, ["tracking.tags", "tracking.wandb=false", "tracking=wandb"]),
        ({"train__resume": "nowhere/step-000010"}, ["train.resume=nowhere/step-000010", "auto", "never"]),
        ({"optim__betas": [0.9]}, ["optim.betas=[0.9]", "two numbers"]),
        ({"optim__betas": [0.9, 1.0]}, ["optim.betas=[0.9, 1.0]", "less than 1"]),
        ({"optim__lr": math.nan}, ["optim.lr=nan", "more than 0"]),
        ({"optim__lr": math.inf}, ["optim.lr=inf"]),
        ({"optim__layer_decay": 1.1}, ["optim.layer_decay=1.1", "at most 1"]),
        ({"optim__max_grad_norm": -1.0}, ["optim.max_grad_norm=-1.0", "0 or more"]),
        ({"data__validation_share": 1.0}, ["data.validation_share=1.0", "less than 1"]),
        ({"data__max_length": 1}, ["data.max_length=1", "at least 2"]),
        ({"name": ""}, ["name= is empty", "leave name out"]),
        ({"data__validation": ""}, ["data.validation= is empty", "null"]),
        ({"name": "  "}, ["name=   is empty"]),
        ({"tuning__method": Method.lora, "tuning__target_modules": ["a", " "]}, ["holds an empty text"]),
        ({"tuning__method": Method.lora, "tuning__target_modules": ["a", ""]}, ["tuning.target_modules=[a,]"]),
        ({"train__max_steps": 0}, ["train.max_steps=0", "at least 1"]),
        ({"train__epochs": -1}, ["train.epochs=-1", "at least 1"]),
        ({"batch__global_batch_size": 7}, ["batch.global_batch_size=7", "6 and 8"]),
    ],
)
def test_refusal_names_the_settings_and_the_way_out(settings, parts):
    lines = complaints(**settings)
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"tuning__method": Method.freeze, "tuning__trainable": ["norm"], "tuning__last_layers": 2},
        {"tuning__method": Method.lora, "tuning__rank": 8},
        {"data__source": Source.pydoc, "data__train": None, "data__packages": ["numpy"]},
        {"data__validation": "v.jsonl", "data__validation_share": 0.0},
        {"schedule__name": ScheduleName.plateau, "schedule__metric": "eval/perplexity", "schedule__gamma": 0.5},
        {"train__best_metric": "eval/token_accuracy"},
        {"precision": Precision.fp16, "fp16__initial_scale_power": 8},
        {"optim__name": OptimName.muon, "optim__momentum": 0.95, "optim__max_grad_norm": 0.0},
        {"train__early_stopping_patience": 3, "train__early_stopping_min_delta": 0.01},
        {"data__validation_share": 0.0},
        {"optim__max_grad_norm": 0.0},
        {"train__resume": "."},
    ],
)
def test_what_belongs_together_passes(settings):
    assert complaints(**settings) == []


@pytest.mark.parametrize(
    ("zero", "settings", "parts"),
    [
        ({"stage": 2, "offload_param": CPU}, {}, ["offload_param", "stage 3, not 2", "deepspeed=zero3_offload"]),
        ({"stage": 0, "offload_optimizer": CPU}, {}, ["offload_optimizer", "not 0", "deepspeed=zero2_offload"]),
        (
            {"stage": 3},
            {"optim__name": OptimName.muon, "optim__max_grad_norm": 0.0},
            ["optim.name=muon", "reduce_scatter", "deepspeed=zero2"],
        ),
    ],
)
def test_offload_and_optimizer_fit_the_zero_stage(zero, settings, parts):
    (line,) = complaints({"zero_optimization": zero}, **settings)
    assert all(part in line for part in ["ds.json", *parts])


def test_muon_is_not_clipped():
    """Its gradient would be clipped before or after orthogonalisation, depending on the stage."""
    (line,) = complaints(optim__name=OptimName.muon)
    assert "optim.name=muon" in line and "optim.max_grad_norm=1.0" in line


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": CPU},
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
        {"stage": 0, "offload_optimizer": {"device": "none"}},
    ],
)
def test_offload_with_its_stage_passes(zero):
    assert complaints({"zero_optimization": zero}) == []


def test_every_number_of_the_schema_has_a_range():
    ranged = schema.known("range").keys()
    numbers = {name for name, hint in knobs().items() if hint in (int, float, int | None, float | None)}
    assert numbers - ranged == {
        "batch.micro_batch_size",
        "batch.gradient_accumulation_steps",
        "batch.global_batch_size",
    }
    assert ranged <= numbers


@pytest.mark.parametrize(
    ("given", "world", "sizes"),
    [
        ((None, None, None), 2, (4, 1, 8)),
        ((2, None, None), 3, (2, 1, 6)),
        ((None, 3, None), 2, (4, 3, 24)),
        ((4, 2, None), 2, (4, 2, 16)),
        ((4, None, 16), 2, (4, 2, 16)),
        ((None, 2, 16), 2, (4, 2, 16)),
        ((4, 2, 16), 2, (4, 2, 16)),
        ((None, None, 16), 2, (4, 2, 16)),
        ((None, None, 18), 2, (3, 3, 18)),
        ((None, None, 14), 2, (1, 7, 14)),
        ((None, None, 2), 2, (1, 1, 2)),
        ((8, None, 8), 1, (8, 1, 8)),
    ],
)
def test_batch_sizes_follow_from_those_given(given, world, sizes):
    assert resolve_batch(BatchConfig(*given), world) == BatchSizes(*sizes)


@pytest.mark.parametrize(
    ("given", "world", "parts"),
    [
        ((None, None, 7), 2, ["batch.global_batch_size=7", "2 ranks", "6 and 8"]),
        ((4, None, 10), 2, ["batch.global_batch_size=10", "batch.micro_batch_size=4", "2 ranks", "8 and 16"]),
        ((None, 3, 10), 2, ["batch.gradient_accumulation_steps=3", "6 and 12"]),
        ((4, None, 3), 2, ["nearest sizes that do are 8."]),
        ((4, 2, 32), 2, ["batch.micro_batch_size=4", "is 16", "batch.global_batch_size=32", "null"]),
        ((0, None, None), 2, ["batch.micro_batch_size=0", "at least 1"]),
        ((None, -1, None), 2, ["batch.gradient_accumulation_steps=-1", "at least 1"]),
        ((None, None, 0), 2, ["batch.global_batch_size=0", "at least 1"]),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(given, world, parts):
    with pytest.raises(UserError) as caught:
        resolve_batch(BatchConfig(*given), world)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_whatever_is_given_the_product_is_the_global_size():
    options = [None, 1, 2, 3, 4, 6, 12]
    solved = 0
    for micro, steps, total, world in itertools.product(options, options, [*options, 24, 48], (1, 2, 3)):
        try:
            sizes = resolve_batch(BatchConfig(micro, steps, total), world)
        except UserError:
            continue
        solved += 1
        assert sizes.micro_batch_size * sizes.gradient_accumulation_steps * world == sizes.global_batch_size
        assert micro in (None, sizes.micro_batch_size)
        assert steps in (None, sizes.gradient_accumulation_steps)
        assert total in (None, sizes.global_batch_size)
    assert solved > 200


def test_the_nearest_sizes_offered_are_accepted():
    with pytest.raises(UserError, match="are 12 and 18"):
        resolve_batch(BatchConfig(3, None, 13), 2)
    assert resolve_batch(BatchConfig(3, None, 12), 2).gradient_accumulation_steps == 2
    assert resolve_batch(BatchConfig(3, None, 18), 2).gradient_accumulation_steps == 3


MODEL = {
    "lengths": {"data.max_length": 8192},
    "max_position_embeddings": 8192,
    "embeddings": 100,
    "tokens": 100,
    "resize": False,
}
"""What `check_model` takes, with nothing wrong."""


def test_rows_fit_the_models_positions():
    check_model(**MODEL)
    check_model(**MODEL | {"lengths": {"data.max_length": 10**6}, "max_position_embeddings": None})
    with pytest.raises(UserError, match=r"data\.max_target_length=8193.*8192 positions.*model\.path"):
        check_model(**MODEL | {"lengths": {"data.max_length": 1, "data.max_target_length": 8193}})


def test_every_token_has_an_embedding():
    check_model(**MODEL | {"tokens": 98})
    check_model(**MODEL | {"tokens": 103, "resize": True})
    message = r"101 tokens, but .*model\.path has 100 embeddings.*model\.resize_embeddings=true.* the 1 without one"
    with pytest.raises(UserError, match=message):
        check_model(**MODEL | {"tokens": 101})


def test_a_long_document_does_not_change_how_short_ones_beside_it_are_encoded():
    """LongRoPE, as transformers has it, goes by the longest document of a row."""

    def rotation(train, validation=(), switches_after=100, micro=1, packing=Packing.bfd, evaluated=None):
        config = Config()
        config.data.packing, config.eval.micro_batch_size = packing, evaluated
        check_rotation(
            config,
            switches_after=switches_after,
            micro_batch_size=micro,
            train=list(train),
            validation=list(validation),
        )

    rotation([50, 100])
    rotation([101, 200])
    rotation([50, 101], switches_after=None)
    rotation([50, 101], [50, 101], packing=Packing.none, evaluated=1)
    message = r"more than 100 tokens \(rope_type=longrope\).*data\.max_length=100 or less.*batch\.micro_batch_size=1"
    for given in (
        {"train": [50, 101]},
        {"train": [50, 101], "packing": Packing.none, "micro": 2},
        {"train": [50], "validation": [50, 101], "packing": Packing.none},
    ):
        with pytest.raises(UserError, match=message):
            rotation(**given)
