"""Reading a config: what is refused, with which words, and what survives a round trip."""

import inspect
import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from omegaconf import OmegaConf

from dsft.config import cli, load, schema, table
from dsft.config.schema import ActivationCheckpointing, Config, Method, OptimName, Precision
from dsft.errors import UserError

load.register()

ROOT = Path(__file__).resolve().parents[3]
CONF = str(ROOT / "conf")
TRAIN = ROOT / "launch" / "train.py"


@pytest.fixture(autouse=True)
def _schema(monkeypatch):
    for name in (*load._LOCAL_RANKS, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards: `reporting` sets it


def compose(*overrides: str) -> Config:
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return load.from_hydra(hydra.compose("config", overrides=cli.quote_text(list(overrides))))


def complaint(*overrides: str) -> str:
    with pytest.raises(Exception) as caught:
        compose(*overrides)
    message = load.explain(caught.value)
    assert message is not None
    return message


def launch(monkeypatch, *arguments: str, run=None) -> None:
    """launch/train.py in this process, with `run` in the place of the real training."""
    monkeypatch.setitem(sys.modules, "dsft.commands.train", SimpleNamespace(run=lambda config, place: run(config)))
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    runpy.run_path(str(TRAIN), run_name="__main__")


def test_composed_config_is_plain_dataclasses_with_enums():
    config = compose("precision=bf16", "tuning=lora", "activation_checkpointing=full", "optim.betas=[0.8,0.9]")
    assert type(config) is Config
    assert (config.precision, config.tuning.method) == (Precision.bf16, Method.lora)
    assert config.activation_checkpointing is ActivationCheckpointing.full
    assert config.optim.betas == [0.8, 0.9] and type(config.optim.betas) is list
    assert config.run_dir == "runs/run"
    assert compose("name=try").run_dir == "runs/try"


def test_overriding_the_model_path_alone_is_enough():
    assert compose("model.path=/models/x").model.path == "/models/x"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "Did you mean optim.lr?"]),
        ("optm=adamw", ["optm", "Did you mean optim?"]),
        ("lr=1e-3", ["lr", "Did you mean optim.lr?"]),
        ("train.learning_rate=1", ["train.learning_rate", "train.max_steps"]),
        ("+optim.clip=1", ["optim.clip", "optim.max_grad_norm"]),
        ("++data.max_len=2", ["data.max_len", "Did you mean data.max_length?"]),
        ("+new.key=1", ["new.key"]),
        ("optim=adamm", ["optim=adamm", "Did you mean optim=adamw?", "adamw, lion, muon, sgd"]),
        ("deepspeed=zero5", ["deepspeed=zero5", "zero2_offload"]),
        ("experiment=lora_chats", ["Did you mean experiment=lora_chat?"]),
        ("optim.name=adan", ["optim.name=adan", "Did you mean optim.name=adamw?"]),
        ("precision=bf17", ["precision=bf17", "Did you mean precision=bf16?", "auto, fp32, bf16, fp16"]),
        ("data.train_on=assistent", ["Did you mean data.train_on=assistant?"]),
        ("optim.lr=fast", ["optim.lr", "a number", "fast"]),
        ("train.max_steps=1.5", ["train.max_steps", "a whole number or null", "1.5"]),
        ("train.export=perhaps", ["train.export", "true or false"]),
        ("data.packages=numpy", ["data.packages", "a list [text, ...]"]),
        ("optim.lr.peak=3", ["optim.lr", "a number"]),
        ("optim=3", ["optim=3: there is no such choice", "adamw, lion, muon, sgd"]),
        ("model.path=???", ["model.path has no value", "model=smollm2_135m"]),
        ("data.train=${nowhere}", ["data.train", "nowhere"]),
        ("data.train=A,b", ["data.train=A,b: a comma separates", "'data.train=A\\,b'", "add -m"]),
        ("tracking.tags=a,b", ["tracking.tags=a,b: a comma", "Write a list as 'tracking.tags=[a,b]'"]),
        ("optim.lr=1,2", ["optim.lr=1,2: a comma separates several values. To try them all, add -m"]),
        ("precision=null", ["precision=null: there is no such choice"]),
        ("precision=BF16", ["precision=BF16: there is no such choice. Did you mean precision=bf16?"]),
        ("schedule=LINEAR", ["schedule=LINEAR", "Did you mean schedule=linear?"]),
        ("model=org/name", ["model=org/name: there is no such choice. Did you mean model.path=org/name?"]),
        ("data=chats.jsonl", ["data=chats.jsonl: there", "Did you mean data=jsonl data.train=chats.jsonl?"]),
        ("deepspeed=ds_configs/my.json", ["Did you mean deepspeed.json=ds_configs/my.json?"]),
        ("hydra/launcher=none_such", ["hydra/launcher=none_such: there is no such choice"]),
        ("deepspeed=zero2.json", ["Did you mean deepspeed=zero2?"]),
        ("data.train", ["cannot read 'data.train'", "NAME=VALUE"]),
        ("optim={lr: 1", ["optim={lr: 1", "quotes"]),
        ("~optim.lr", ["~optim.lr"]),
    ],
)
def test_mistakes_name_the_setting_and_the_nearest_valid_one(override, parts):
    message = complaint(override)
    for part in parts:
        assert part in message
    assert "Traceback" not in message and "full_key" not in message


def test_all_unknown_keys_are_told_at_once():
    message = complaint("+optim.foo=1", "+bar=2")
    assert "optim.foo" in message and "bar" in message


def test_a_programming_error_is_no_mistake_of_the_users():
    assert load.explain(AttributeError("x")) is None
    assert load.explain(ValueError("x")) is None


def test_yaml_round_trip_keeps_every_value(tmp_path):
    config = compose(
        "data.train=数据/对话.jsonl", "data=jsonl", "optim.eps=1e-12", "tracking.tags=[a,'b c']", "train.epochs=2"
    )
    text = load.to_yaml(config)
    assert "数据/对话.jsonl" in text
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load.load_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["config.yaml", "No such file"]),
        ("model: [", ["config.yaml:1", "not valid YAML"]),
        ("- 1\n", ["config.yaml", "a mapping"]),
        ("model: {path: x}\ndeepspeed: {json: y}\noptim: {lrr: 1}\n", ["config.yaml", "optim.lrr", "optim.lr?"]),
        ("model: {path: x}\n", ["config.yaml", "deepspeed.json has no value"]),
        ("model: {path: x}\ndeepspeed: {json: y}\nprecision: fp8\n", ["precision=fp8", "fp32, bf16, fp16"]),
        ("model: 3\n", ["config.yaml", "model is a group of settings"]),
    ],
)
def test_a_bad_config_file_is_refused_with_its_name(tmp_path, text, parts):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load.load_yaml(file)
    for part in parts:
        assert part in str(caught.value)


def test_diff_has_one_line_per_changed_knob():
    old = compose()
    new = compose("optim=lion", "optim.lr=1e-3", "data.packages=[numpy]", "train.epochs=2", "run_dir=数据")
    assert load.diff(old, old) == []
    assert load.diff(old, new) == [
        "data.packages: [] -> [numpy]",
        "optim.name: adamw -> lion",
        "optim.lr: 0.0001 -> 0.001",
        "optim.betas: [0.9, 0.999] -> [0.9, 0.99]",
        "train.epochs: null -> 2",
        "run_dir: runs/run -> 数据",
    ]


def test_launcher_arguments_are_taken_away():
    given = ["--local_rank=1", "optim.lr=1", "--local-rank", "3", "--cfg", "job", "--local-rank=0", "--local_rank", "2"]
    assert cli.split_launcher_args(given) == ["optim.lr=1", "--cfg", "job"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("data.train=数据/对话 (1).jsonl", "数据/对话 (1).jsonl"),
        ("data.train=${name}/对话.jsonl", "run/对话.jsonl"),
        ("data.train='对话,1.jsonl'", "对话,1.jsonl"),
        ("data.train=plain.jsonl", "plain.jsonl"),
    ],
)
def test_text_of_any_script_needs_no_quotes(given, wanted):
    assert compose(given).data.train == wanted


def test_lists_of_any_script_too():
    assert compose("tracking.tags=[试验, a b,二]").tracking.tags == ["试验", "a b", "二"]


def test_launch_from_any_directory_prints_the_composed_config_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TRAIN), "--local_rank=0", "--cfg", "job", "optim.lr=3e-4", "model.path=模型"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = OmegaConf.create(done.stdout)
    assert (shown.optim.lr, shown.model.path, shown.precision) == (3e-4, "模型", "auto")
    assert list(tmp_path.iterdir()) == []


def test_a_run_gets_the_config_in_the_directory_where_it_was_started(monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    launch(
        monkeypatch, "--local_rank=1", "data=jsonl", "data.train=foo.jsonl", run=lambda c: seen.append((c, Path.cwd()))
    )
    assert [(config.data.train, directory) for config, directory in seen] == [("foo.jsonl", tmp_path)]
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_is_what_the_run_returns(monkeypatch):
    with pytest.raises(SystemExit) as caught:
        launch(monkeypatch, run=lambda config: 75)
    assert caught.value.code == 75


@pytest.mark.parametrize("place", ["composition", "run"])
def test_a_users_mistake_ends_with_its_message_alone(monkeypatch, capfd, place):
    def run(config):
        raise UserError("data.jsonl:3: no messages.")

    with pytest.raises(SystemExit) as caught:
        launch(monkeypatch, *(["optim.lrr=1"] if place == "composition" else []), run=run)
    assert caught.value.code == 2
    message = (
        "unknown setting optim.lrr. Did you mean optim.lr?" if place == "composition" else "data.jsonl:3: no messages."
    )
    assert capfd.readouterr() == ("", f"error: {message}\n")


def test_other_ranks_speak_after_rank_0_had_time_to(monkeypatch, capfd):
    silent = []
    monkeypatch.setattr(load.time, "sleep", lambda seconds: silent.append((seconds, capfd.readouterr())))
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as caught:
        launch(monkeypatch, "optim.lrr=1")
    assert caught.value.code == 2
    assert silent == [(5.0, ("", ""))]
    assert capfd.readouterr().err.startswith("error: unknown setting optim.lrr")


def test_full_errors_on_request(monkeypatch):
    monkeypatch.setattr(load, "_TRACEBACK", True)
    with pytest.raises(UserError), load.reporting():
        raise UserError("x")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(config):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        launch(monkeypatch, run=run)


def test_every_job_of_a_sweep_has_a_run_directory_of_its_own(monkeypatch, tmp_path):
    seen = []
    sweep = ["-m", "optim.lr=1e-3,1e-4", "schedule=linear", f"run_dir={tmp_path}/sweep"]
    launch(monkeypatch, *sweep, run=seen.append)
    assert [(config.optim.lr, config.run_dir) for config in seen] == [
        (1e-3, f"{tmp_path}/sweep/optim.lr=0.001,schedule=linear"),
        (1e-4, f"{tmp_path}/sweep/optim.lr=0.0001,schedule=linear"),
    ]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["multirun.yaml"]


def test_a_sweep_under_a_launcher_is_refused(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        launch(monkeypatch, "-m", "optim.lr=1,2", f"run_dir={tmp_path}")
    assert "--multirun" in capfd.readouterr().err


def test_help_is_hydras(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        launch(monkeypatch, "--help")
    assert caught.value.code == 0
    assert "zero3_offload" in capsys.readouterr().out


def sections() -> list[type]:
    return [c for _, c in inspect.getmembers(schema, is_dataclass) if c.__module__ == schema.__name__]


@pytest.mark.parametrize("section", sections())
def test_every_knob_has_a_docstring(section):
    knobs = [f.name for f in fields(section) if not str(f.type).endswith("Config")]
    assert sorted(table.docstrings(section)) == sorted(knobs)


def test_table_has_one_row_per_knob():
    rows = table.markdown_table().splitlines()
    named = [row.split("`")[1] for row in rows if row.startswith("| `")]
    assert sorted(named) == sorted(load.knobs())
    assert all(row.replace(r"\|", "").count("|") == 4 for row in rows)
    assert "| `optim.name` | `adamw` |" in table.markdown_table()
    assert OptimName.muon.name in next(row for row in rows if "`optim.name`" in row)
    assert "| `model.path` | required |" in table.markdown_table()


def test_a_section_may_stand_within_a_section():
    """As data.clean.* or eval.generate.* will: names, what is known of a setting, and the table reach into it."""
    from dataclasses import dataclass, field

    from dsft.config import schema

    @dataclass
    class Inner:
        limit: int = schema.setting(3, range=schema.AT_LEAST_1)
        """How many."""

    @dataclass
    class Outer:
        inner: Inner = field(default_factory=Inner)
        plain: bool = False
        """Whether."""

    @dataclass
    class Root:
        outer: Outer = field(default_factory=Outer)

    assert list(schema.knobs(Root)) == ["outer.inner.limit", "outer.plain"]
    assert schema.known("range", Root) == {"outer.inner.limit": schema.AT_LEAST_1}
