"""A setting that does nothing: refused where the command line gave it, a warning where a recipe brought it along."""

import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from hydra.core.global_hydra import GlobalHydra
from test_check import config

from dsft.config import effect, schema
from dsft.config.check import check
from dsft.config.effect import Length, by_config, by_length, by_model, by_place, by_task, by_tokens, enforce
from dsft.config.schema import (
    Balance,
    Config,
    Method,
    Resampling,
    ScheduleName,
    Source,
    TrainOn,
    Unit,
    knobs,
    known,
)
from dsft.errors import UserError
from dsft.metrics import comparable
from dsft.optim import Schedule
from dsft.tasks import settings_by_task

ROOT = Path(__file__).resolve().parents[3]
TRAIN = ROOT / "launch" / "train.py"
PLATEAU = {"schedule__name": ScheduleName.plateau}
LONG = Length(held_out=10, all_supervised=False, total_steps=1000, steps_to_decay=10)
ALWAYS = set(
    """task.name model.path model.attention data.source data.validation data.test data.max_records data.max_length
    data.packing data.columns
    data.ignore_fields data.on_bad_record data.on_overflow data.cache_dir data.num_workers tuning.method
    tuning.neftune_alpha deepspeed.json batch.micro_batch_size batch.gradient_accumulation_steps
    batch.global_batch_size optim.name optim.lr optim.max_grad_norm optim.groups optim.layer_decay
    schedule.warmup_ratio
    train.seed train.log_every train.save_every train.keep_last train.resume train.max_skipped_steps train.export
    train.deterministic tracking.wandb tracking.progress precision activation_checkpointing name run_dir""".split()
)
"""Settings that act in every run, if only as a limit or on its speed."""


def idle(settings, given=None, rules=by_config) -> list[str]:
    """What is refused."""
    made = config(**settings)
    try:
        enforce(made, rules(made), given)
    except UserError as error:
        return str(error).splitlines()
    return []


def warned(settings, given, rules=by_config) -> list[str]:
    made = config(**settings)
    return enforce(made, rules(made), given)


def length(given=None, **changes):
    return lambda made: by_length(made, replace(LONG, **changes), given)


def here(made: Config):
    return by_place(made, model_on_hub=False, acts={})


def test_of_every_setting_it_is_known_when_it_acts():
    lora = config(tuning__method=Method.lora, data__source=Source.pydoc, data__packing=schema.Packing.none)
    cases = [
        *by_config(config(data__validation="v", data__test="t")),
        *by_config(config(data__validation_share=0.0, train__samples=0, **PLATEAU)),
        *by_config(config(train__max_steps=1, schedule__warmup_steps=2, schedule__name=ScheduleName.constant)),
        *by_config(config(optim__name=schema.OptimName.sgd)),
        *by_config(config(optim__name=schema.OptimName.lion)),
        *by_config(lora),
        *here(config()),
        *by_task(config(task__name="b"), {"a": known("of_some_tasks"), "b": ()}),
        *length(given=(), all_supervised=True, total_steps=5)(config(train__epochs=2, train__max_steps=5)),
        *length(given=(), total_steps=5)(config(train__epochs=2, train__max_steps=6)),
        *by_model(config(), "m", chunked=False, decayed=False, rows_alone=True),
        *by_tokens(config(), tokens=9, embeddings=9, new=0, added=0),
    ]
    assert {one.name for one in cases} | ALWAYS == set(knobs())
    assert not {one.name for one in cases} & (ALWAYS - {"schedule.name"})
    for one in cases:
        assert one.message.startswith(f"{one.name}="), one


@pytest.mark.parametrize(
    "name", ["tuning.rank", "optim.betas", "schedule.metric", "tracking.project", "fp16.loss_scale_window"]
)
def test_given_as_the_default_is_given(name):
    made = config(optim__name=schema.OptimName.sgd) if name == "optim.betas" else config()
    given = {name}
    with pytest.raises(UserError, match=rf"^{name}=.* does nothing with "):
        enforce(made, by_config(made), given)
    assert enforce(made, by_config(made), frozenset()) == []


def test_from_a_recipe_it_is_a_warning():
    settings = {"tuning__rank": 8, "data__packages": ["numpy"]}
    assert [line.split(" ")[0] for line in warned(settings, {"name"})] == ["data.packages=[numpy]", "tuning.rank=8"]
    (line,) = idle(settings, {"tuning.rank"})
    assert line.startswith("tuning.rank=8 does nothing with tuning.method=full: choose tuning=lora")


def test_check_refuses_and_warns_at_once():
    made = config(tuning__rank=8, tracking__tags=["a"])
    ds = {"zero_optimization": {"stage": 2}}
    assert len(check(made, ds, 1, settings_by_task(), comparable(tiny.METRICS), frozenset())) == 2
    with pytest.raises(UserError, match=r"^tracking\.tags=\[a\] does nothing with tracking\.wandb=false") as caught:
        check(made, ds, 1, settings_by_task(), comparable(tiny.METRICS), {"tracking.tags"})
    assert "tuning.rank" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"train__samples": 0, "train__eval_every": 0, "data__validation_share": 0.0},
        {"data__validation": "v", "data__validation_share": 0.0},
        {"tracking__tags": [], "tuning__use_dora": False, "tuning__dropout": 0.0, "tuning__last_layers": None},
        {"schedule__restarts": 0, "schedule__min_lr_ratio": 0.0, "schedule__name": ScheduleName.constant},
        {"optim__implementation": effect.Config().optim.implementation, "optim__name": schema.OptimName.sgd},
    ],
)
def test_switched_off_in_so_many_words_is_no_mistake(settings):
    assert idle(settings, {name.replace("__", ".") for name in settings}) == []


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eval.micro_batch_size", {"eval__micro_batch_size": 2}),
        ("train.best_metric", {"train__best_metric": "eval/token_accuracy"}),
        ("train.best_metric", {}),
        ("train.early_stopping_patience", {"train__early_stopping_patience": 2}),
        ("train.eval_every", {"train__eval_every": 10}),
        ("train.samples", {"train__samples": 3}),
        ("train.sample_tokens", {"train__sample_tokens": 3}),
        ("schedule.name", PLATEAU),
        ("schedule.patience", {**PLATEAU, "schedule__patience": 5}),
    ],
)
def test_where_nothing_is_held_out(name, settings):
    """By a share of 0, or because the only record is trained on."""
    for rules, share, why, remedy in (
        (
            by_config,
            0.0,
            "data.validation_share=0 without data.validation holds nothing out",
            "a data.validation_share",
        ),
        (length(held_out=0), 0.1, "there is only one record", "more records"),
    ):
        with_share = {**settings, "data__validation_share": share}
        (line,) = idle(with_share, {name}, rules)
        assert line.startswith(f"{name}=") and why in line and f"data.validation=FILE or {remedy}" in line
        assert idle(with_share, frozenset(), rules) == []


def test_the_choice_of_a_group_is_given_too():
    settings = {**PLATEAU, "data__validation_share": 0.0}
    assert idle(settings, {"schedule"})[0].startswith("schedule.name=plateau acts on evaluations")
    assert warned(settings, {"data.validation_share"})[0].startswith("schedule.name=plateau acts on evaluations")


def test_a_share_of_one_record():
    (line,) = idle({"data__validation_share": 0.3}, {"data.validation_share"}, length(held_out=0))
    assert line.startswith("data.validation_share=0.3 does nothing: nothing is held out")


@pytest.mark.parametrize(
    ("settings", "changes", "parts"),
    [
        (
            {"schedule__warmup_steps": 11, "train__epochs": 1},
            {"total_steps": 10},
            ["schedule.warmup_steps=11", "the 10 steps", "Lower"],
        ),
        (
            {"schedule__name": ScheduleName.exponential},
            {"total_steps": 10},
            ["exponential", "every 1 epochs. Choose schedule.unit=steps, train"],
        ),
        (
            {"schedule__name": ScheduleName.step, "schedule__unit": Unit.steps, "schedule__step_size": 10},
            {"total_steps": 10},
            ["schedule.name=step", "every 10 steps. Choose schedule.unit=steps with a fitting schedule.step_size"],
        ),
        (
            {"train__early_stopping_patience": 3, "train__eval_every": 20},
            {"total_steps": 80},
            ["train.early_stopping_patience=3", "at evaluation 4", "have 3 before", "train.eval_every=20"],
        ),
        (
            {**PLATEAU, "schedule__patience": 1, "train__eval_every": 50},
            {"total_steps": 101},
            ["evaluation 3", "have 2"],
        ),
        (
            {"data__train_on": TrainOn.last_assistant},
            {"all_supervised": True},
            ["data.train_on=last_assistant", "`text`"],
        ),
    ],
)
def test_in_a_run_that_is_too_short(settings, changes, parts):
    given = {name.replace("__", ".") for name in settings}
    (line,) = idle(settings, given, length(**changes))
    for part in parts:
        assert part in line
    assert warned(settings, {"train.epochs"}, length(**changes)) == [line]
    assert idle(settings, given, length()) == []


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"schedule__warmup_steps": 10}, 10),
        ({"schedule__name": ScheduleName.exponential}, 11),
        ({"schedule__name": ScheduleName.step, "schedule__unit": Unit.steps, "schedule__step_size": 10}, 11),
        ({"train__early_stopping_patience": 3, "train__eval_every": 20}, 81),
        ({**PLATEAU, "schedule__patience": 1, "train__eval_every": 50}, 151),
    ],
)
def test_in_a_run_that_is_just_long_enough(settings, steps):
    assert idle(settings, {name.replace("__", ".") for name in settings}, length(total_steps=steps)) == []


def test_epochs_that_a_recipes_limit_cuts_short():
    settings = {"train__epochs": 3, "train__max_steps": 14}

    def rules(given):
        return length(given, total_steps=14)

    (line,) = idle(settings, {"train.epochs"}, rules({"train.epochs"}))
    assert "train.max_steps=14" in line and "train.max_steps=null" in line
    both = {"train.epochs", "train.max_steps"}
    assert idle(settings, both, rules(both)) == []
    assert idle(settings, {"train.epochs"}, length({"train.epochs"}, total_steps=13)) == []


def test_steps_that_a_recipes_epochs_cut_short():
    """As when a finished run is to be made longer by train.max_steps, and its recipe counts epochs."""
    settings = {"train__epochs": 3, "train__max_steps": 500}

    def refused(given, steps=300):
        return idle(settings, given, length(given, total_steps=steps))

    (line,) = refused({"train.max_steps"})
    assert line.startswith(
        "train.max_steps=500 does nothing: train.epochs=3, which the recipe sets, ends the run first"
    )
    assert "after 300 steps. Add train.epochs=null" in line
    assert refused({"train.epochs", "train.max_steps"}) == refused({"train.max_steps"}, steps=500) == []


def test_a_recipes_data_is_not_looked_for_where_it_is_not_read():
    assert effect.sources(config(data__source=Source.pydoc, data__train="gone.jsonl")) == {}
    both = config(data__train="a.jsonl", data__validation="b.jsonl")
    assert effect.sources(both) == {"data.train": "a.jsonl", "data.validation": "b.jsonl"}


def test_a_warm_up_that_is_too_long_is_told_once():
    settings = {"schedule__warmup_steps": 20, "train__max_steps": 10}
    both = [*warned(settings, ()), *warned(settings, (), length(total_steps=10))]
    assert len(both) == 1 and "is longer than train.max_steps=10" in both[0]
    assert "is longer than the 9 steps" in warned({**settings, "train__max_steps": 21}, (), length(total_steps=9))[0]


@pytest.mark.parametrize(
    ("settings", "enough"),
    [
        ({"schedule__restarts": 3}, 5),
        ({"schedule__restarts": 3, "schedule__warmup_ratio": 0.3}, 8),
        ({"schedule__name": ScheduleName.step, "schedule__unit": Unit.steps, "schedule__step_size": 4,
          "schedule__warmup_steps": 5}, 10),
        ({"schedule__name": ScheduleName.exponential, "schedule__unit": Unit.steps, "schedule__warmup_steps": 5}, 7),
    ],
)  # fmt: skip
def test_a_schedule_whose_shape_has_no_room(settings, enough):
    """Held against the rates: in the run that is refused they stay at the peak after the warm-up."""
    name = "schedule.restarts" if "schedule__restarts" in settings else "schedule.name"
    for steps, refused in ((enough - 1, True), (enough, False)):
        lines = idle(settings, {name}, length(total_steps=steps))
        assert [line.startswith(f"{name}=") for line in lines] == [True] * refused
        made = Schedule(config(**settings).schedule, steps)
        rates = []
        for _ in range(steps):
            rates.append(made.multiplier)
            made.step(applied=True, epochs=0)
        peak = rates.index(1.0)
        assert (min(rates[peak:]) == 1.0) is refused


def test_a_revision_and_a_split_are_of_the_hub():
    settings = {"model__revision": "5e37820", "data__split": "test", "data__subset": "zh", "data__header": ["text"]}
    settings |= {"data__validation": "y.jsonl", "data__validation_split": "dev"}
    revision, split, held_out, subset, header = idle(settings, None, here)
    assert "model.revision=5e37820 does nothing with model.path=m" in revision
    assert "data.split=test does nothing with data.train=x.jsonl" in split
    assert "data.validation_split=dev does nothing with data.validation=y.jsonl" in held_out
    assert subset.startswith(
        "data.subset=zh does nothing with data.train=x.jsonl and data.validation=y.jsonl: there is"
    )
    assert header.startswith(
        "data.header=[text] does nothing with data.train=x.jsonl and data.validation=y.jsonl: ther"
    )
    acts = {"data.train": {"split", "subset", "header"}, "data.validation": {"split"}}
    assert idle(settings, None, lambda made: by_place(made, model_on_hub=True, acts=acts)) == []
    (line,) = idle({"data__validation_split": "dev"}, None, here)
    assert line.startswith("data.validation_split=dev does nothing with data.validation=null")


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        (
            {"model__resize_embeddings": True},
            {"tokens": 98, "new": 2, "added": 2},
            "model.resize_embeddings=true does nothing: each of the 98 tokens has one of the model's 100 embeddings.",
        ),
        (
            {"tuning__new_tokens": True, "tuning__method": Method.lora},
            {"tokens": 98, "new": 0, "added": 0},
            "tuning.new_tokens=true does nothing: there are no new tokens. Name some with data.new_tokens=FILE",
        ),
        (
            {"data__new_tokens": "words.txt", "model__resize_embeddings": True},
            {"tokens": 102, "new": 2, "added": 0},
            "data.new_tokens=words.txt does nothing: all that it names are tokens of the model's vocabulary already.",
        ),
    ],
)
def test_settings_for_new_tokens_that_are_none_or_have_rows(settings, counts, message):
    """As of a recipe that goes on from an exported model, which has the tokens: there it is a warning."""

    def rules(made):
        return by_tokens(made, embeddings=100, **counts)

    (refused,) = idle(settings, None, rules)
    assert refused.startswith(message)
    assert warned(settings, (), rules) == [refused]
    assert (
        idle(
            {**settings, "tuning__method": Method.lora},
            None,
            lambda made: by_tokens(made, embeddings=100, tokens=102, new=2, added=2),
        )
        == []
    )


def test_what_the_model_has_no_use_for():
    settings = {"model__logits_chunk": 64, "optim__weight_decay": 0.1, "tuning__new_tokens": True}
    settings |= {"tuning__method": Method.freeze, "tuning__trainable": ["embed"]}

    def rules(acts):
        return lambda made: by_model(made, "gemma", chunked=acts, decayed=acts, rows_alone=acts)

    head, rows, decay = idle(settings, None, rules(False))
    assert "model.logits_chunk=64 does nothing with gemma" in head
    assert "tuning.new_tokens=true does nothing: tuning.trainable or tuning.last_layers trains all rows" in rows
    assert "optim.weight_decay=0.1 does nothing where only norms" in decay
    assert idle(settings, None, rules(True)) == []


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.save(home / "model")
    tiny.write_jsonl(home / "chats.jsonl", tiny.records(12))
    tiny.write_jsonl(home / "one.jsonl", tiny.records(1))
    tiny.write_jsonl(home / "texts.jsonl", [{"text": "the red fox sees a blue bird"}] * 4)
    (home / "conf" / "experiment").mkdir(parents=True)
    recipe = "model: {revision: main}\ndata: {split: test}\nschedule: {warmup_steps: 300}\ntuning: {rank: 8}\n"
    (home / "conf" / "experiment" / "x.yaml").write_text(f"# @package _global_\n{recipe}", encoding="utf-8")
    return home


def launched(command: str, home: Path, monkeypatch, capfd) -> str:
    """What launch/train.py writes to stderr before it refuses; this process joins no process group."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    data = "" if "data.train" in command else "data.train=chats.jsonl"
    arguments = f"{command} model.path=model data=jsonl {data} data.max_length=64"
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *shlex.split(arguments)])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert stopped.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("model.revision=5e37820", "model.revision=5e37820 does nothing with model.path=model"),
        ("data.split=train", "data.split=train does nothing with data.train=chats.jsonl"),
        (
            "train.epochs=1 schedule.warmup_steps=100",
            "schedule.warmup_steps=100 is longer than the 3 steps of this run",
        ),
        ("data.train=one.jsonl train.samples=1", "train.samples=1 acts on evaluations, and nothing is held out"),
        ("data.train=texts.jsonl data.train_on=assistant", "data.train_on=assistant does nothing with these records"),
        ("schedule=plateau data.validation_share=0", "schedule.name=plateau acts on evaluations"),
        ("schedule=exponential", "schedule.name=exponential does nothing in the 3 steps of this run"),
    ],
)
def test_the_command_line_is_refused(command, error, home, monkeypatch, capfd):
    assert f"error: {error}" in launched(command, home, monkeypatch, capfd)


def test_a_recipes_settings_are_warned_of(home, monkeypatch, capfd):
    err = launched("--config-dir conf experiment=x train.early_stopping_patience=4", home, monkeypatch, capfd)
    lines = [line for line in err.splitlines() if line.startswith(("warning: ", "error: "))]
    assert [line.split("=")[0] for line in lines] == [
        "warning: tuning.rank",
        "warning: model.revision",
        "warning: data.split",
        "error: train.early_stopping_patience",
    ]


def test_records_and_losses_are_not_both_balanced():
    both = {"task__balance": Balance.balanced, "data__balance": Resampling.oversample}
    (line,) = idle(both)
    assert line.startswith("task.balance=balanced does nothing with data.balance=oversample")
    assert idle({"task__balance": Balance.balanced}) == idle({"data__balance": Resampling.undersample}) == []
