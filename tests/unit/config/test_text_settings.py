"""A text setting is the text that was written, wherever it was written and whatever it looks like."""

import runpy
import shutil
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from hydra.errors import HydraException

from dsft.config import cli, load
from dsft.config.schema import (
    Config,
    DeepSpeedConfig,
    ModelConfig,
    TaskConfig,
    is_text,
    is_text_list,
    is_text_map,
    is_text_or_null,
    knobs,
)
from dsft.errors import UserError

load.register()

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"
LOOKS_LIKE_ELSE = """1e5 5e37820 2024_11_25 2024-11-25 007 1_000 0x10 0o7 1:30 12:30:45 -1e3 .5 1. inf nan .inf yes no
    on off true False y ~ * % ? = | @x !t &a `x` a#b a@b""".split()
WRITTEN = [*LOOKS_LIKE_ELSE, "a b", "a=b", "a: b", "# x", "it's", 'a"b', "试验 (1)", "[x]", "{x}", "("]
WRITTEN += ["a\\d\\.", "a\\"]
TEXTS = [name for name, hint in knobs().items() if is_text(hint)]
LISTS = [name for name, hint in knobs().items() if is_text_list(hint)]
MAPS = [name for name, hint in knobs().items() if is_text_map(hint)]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


def batched(items: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(items[at : at + size]) for at in range(0, len(items), size)]


def compose(*overrides: str, conf: Path = CONF) -> Config:
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        return load.from_hydra(hydra.compose("config", overrides=cli.quote_text(list(overrides))))


def conf_with(tmp_path: Path, **files: str) -> Path:
    """The project's `conf/` with `experiment/x.yaml` or others added."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    for name, content in files.items():
        (conf / f"{name.replace('__', '/')}.yaml").write_text(content, encoding="utf-8")
    return conf


def test_all_text_of_the_schema_is_known():
    assert {"name", "run_dir", "model.revision", "data.train", "train.resume", "tracking.project"} < set(TEXTS)
    assert set(LISTS) == {
        "data.packages",
        "data.header",
        "data.ignore_fields",
        "tuning.trainable",
        "tuning.target_modules",
        "tracking.tags",
        "model.allow_missing",
        "task.labels",
    }
    assert MAPS == ["data.columns"]
    assert not [n for n, hint in knobs().items() if "str" in str(hint) and n not in TEXTS + LISTS + MAPS]


@pytest.mark.parametrize("texts", batched([*WRITTEN, " a ", "2_0", "null"], len(TEXTS)))
def test_on_the_command_line(texts):
    """Several settings at a time, for composing takes a fifth of a second."""
    given = {name: text for name, text in zip(TEXTS[::-1], texts, strict=False) if text != "null"}
    config = compose(*(f"{name}={text}" for name, text in given.items()))
    assert {name: attrgetter(name)(config) for name in given} == given
    assert compose(f"name={texts[-1]}").name == texts[-1]


def test_every_text_setting():
    config = compose(*(f"{name}=2024_11_25" for name in TEXTS))
    assert {attrgetter(name)(config) for name in TEXTS} == {"2024_11_25"}


@pytest.mark.parametrize("prefix", ["", "++"])
def test_every_list_of_texts(prefix):
    written = "[1e5, 007,null,a b,'a,b',layers\\.[0-3]\\.(q|k),x{2,3}]"
    config = compose(*(f"{prefix}{name}={written}" for name in LISTS))
    for name in LISTS:
        assert attrgetter(name)(config) == ["1e5", "007", "null", "a b", "a,b", "layers\\.[0-3]\\.(q|k)", "x{2,3}"]
    assert compose("+tracking.tags=[]").tracking.tags == []


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize("name", MAPS)
def test_every_mapping_of_texts(name, prefix):
    """Each name of it may be given alone too; what the command line names adds to what a recipe names."""
    texts = {"a": "1e5", "b": "问 题", "c": "a.b.0", "d": "null", "e": "x: y", "f": "no"}
    written = ", ".join(f"{key}: {text}" for key, text in texts.items() if key != "e")
    config = compose(f"{prefix}{name}={{{written}}}", f"{prefix}{name}.e='x: y'", f"{name}.f=no")
    assert attrgetter(name)(config) == texts
    assert cli.names(cli.quote_text([f"{name}={{a: b}}"])) == cli.names(cli.quote_text([f"{name}.a=b"])) == {name}
    assert attrgetter(name)(compose(f"{name}={{}}")) == {}


@pytest.mark.parametrize("value", ["q", "[q]", "null", "{prompt}", "{prompt: q"])
def test_a_mapping_that_is_none_is_refused_by_name(value):
    with pytest.raises((HydraException, UserError)) as caught:
        compose(f"data.columns={value}")
    assert "data.columns" in (load.explain(caught.value) or "")


def test_a_mapping_in_a_recipe(tmp_path):
    recipe = "# @package _global_\ndata:\n  columns: &c {prompt: 1e5, 007: no}\n"
    conf = conf_with(tmp_path, experiment__x=recipe)
    assert compose("experiment=x", conf=conf).data.columns == {"prompt": "1e5", "007": "no"}
    assert compose("experiment=x", "data.columns.prompt=q", conf=conf).data.columns == {"prompt": "q", "007": "no"}
    assert compose("experiment=x", "~data.columns.prompt", conf=conf).data.columns == {"007": "no"}


def test_null_is_null_where_there_may_be_none_and_text_elsewhere():
    config = compose(*(f"++{name}=null" for name in TEXTS))
    for name in TEXTS:
        assert attrgetter(name)(config) == (None if is_text_or_null(knobs()[name]) else "null"), name
    assert compose("model.revision='null'").model.revision == "null"


def test_interpolation_and_hydras_escapes_still_work():
    assert compose("name=007", "run_dir=runs/${name}/1e5").run_dir == "runs/007/1e5"
    assert compose("name=1e5").run_dir == "runs/1e5"
    assert compose(r"name=a\=b\,c").name == "a=b,c"
    assert compose(r"name='1e5'").name == "1e5"


@pytest.mark.parametrize("text", ["1e5", "2024_11_25", "007", "true", "1.50"])
def test_from_the_environment_and_in_its_place(text, monkeypatch, tmp_path):
    monkeypatch.setenv("DSFT_X", text)
    monkeypatch.delenv("DSFT_Y", raising=False)
    recipe = f"# @package _global_\nname: ${{oc.env:DSFT_Y,{text}}}\nmodel: {{revision: '${{oc.env:DSFT_X}}'}}\n"
    made = compose("experiment=x", "train.seed=${oc.env:DSFT_Y,1_0}", f"tracking.tags=[${{oc.env:DSFT_Y,{text}}}]",
                   conf=conf_with(tmp_path, experiment__x=recipe))  # fmt: skip
    assert (made.name, made.model.revision, made.tracking.tags, made.train.seed) == (text, text, [text], 10)
    assert compose("name=${oc.env:DSFT_Y,${train.seed}}", "model.revision=${oc.env:DSFT_Y,null}").name == "0"


def test_in_a_mapping():
    train = compose("train={max_steps: 3, resume: 1e5, best_metric: 'a:b'}").train
    assert (train.max_steps, train.resume, train.best_metric) == (3, "1e5", "a:b")


def test_settings_that_are_no_text_are_read_as_before():
    config = compose("optim.lr=1e-3", "train.max_steps=1_0", "optim.betas=[.5,1e-1]", "train.export=off")
    assert (config.optim.lr, config.train.max_steps, config.optim.betas, config.train.export) == (
        1e-3, 10, [0.5, 0.1], False,
    )  # fmt: skip


@pytest.mark.parametrize("texts", batched([*LOOKS_LIKE_ELSE, "null", "a b"], 12))
def test_in_a_recipe_without_quotes(texts, tmp_path):
    # quotes where it is no plain scalar of YAML's
    plain = [f"'{text}'" if text[0] in "*%?=|@!&`" else text for text in texts]
    listed = "\n".join(f"    - {text}" for text in plain)
    recipe = f"# @package _global_\nname: {plain[0]}\nmodel: {{revision: {plain[-1]}}}\ntracking:\n  tags:\n{listed}\n"
    conf = conf_with(tmp_path, experiment__x=recipe, model__y=f"path: {plain[0]}\n")
    config = compose("experiment=x", "model=y", conf=conf)
    nothing = None if texts[-1] in ("null", "~") else texts[-1]
    assert (config.name, config.model.path, config.model.revision) == (texts[0], texts[0], nothing)
    assert config.tracking.tags == list(texts)


def test_a_choice_is_the_name_of_a_file(tmp_path):
    conf = conf_with(tmp_path, experiment__2024_11="# @package _global_\ndefaults:\n  - override /model: 1e5\n",
                     model__1e5="path: m\n", experiment__7="# @package _global_\nname: seven\n")  # fmt: skip
    assert compose("experiment=2024_11", conf=conf).model.path == "m"
    assert compose("experiment=7", conf=conf).name == "seven"


def test_anchors_and_merges_of_yaml(tmp_path):
    recipe = "# @package _global_\ntrain: &t {max_steps: &n 1_0, resume: *n}\neval: {micro_batch_size: *n}\n"
    config = compose("experiment=x", conf=conf_with(tmp_path, experiment__x=recipe))
    assert (config.train.max_steps, config.train.resume, config.eval.micro_batch_size) == (10, "1_0", 10)


def test_a_recipe_that_is_no_yaml_is_named_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"experiment/x\.yaml:3: not valid YAML"):
        compose("experiment=x", conf=conf_with(tmp_path, experiment__x="name: a\nmodel: [\n"))


@pytest.mark.parametrize("text", [*WRITTEN, "null", "", " a ", "${x}", "\\${x}", "a${b", "a\nb", "\ufeffx", "\u2028"])
def test_written_and_read_back(text, tmp_path):
    config = Config(model=ModelConfig(path="m"), deepspeed=DeepSpeedConfig(json="ds.json"))
    config = replace(
        config,
        name=text,
        task=TaskConfig(name=text),
        data=replace(config.data, validation=text, columns={"prompt": text}),
        tracking=replace(config.tracking, tags=[text, "1e5"]),
    )
    (tmp_path / "config.yaml").write_text(load.to_yaml(config), encoding="utf-8")
    assert load.load_yaml(tmp_path / "config.yaml") == config


def swept(monkeypatch, *arguments: str) -> list[Config]:
    """The configs of the jobs that launch/train.py would run."""
    seen = []
    monkeypatch.setitem(
        sys.modules, "dsft.commands.train", SimpleNamespace(run=lambda config, place: seen.append(config))
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
    return seen


@pytest.mark.parametrize("values", ["1e5,007, a b,null", "choice(1e5,007,'a b',null)"])
def test_through_a_sweep(values, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = swept(monkeypatch, f"name={values}")
    assert [job.name for job in jobs] == ["1e5", "007", "a b", "null"]
    assert [Path(job.run_dir) for job in jobs] == [tmp_path / "runs" / job.name for job in jobs]


def test_lists_through_a_sweep_and_the_directory_of_all_jobs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = swept(monkeypatch, "tracking.tags=[1e5,a],[007]", "run_dir=1e5")
    assert [job.tracking.tags for job in jobs] == [["1e5", "a"], ["007"]]
    assert {Path(job.run_dir).parent for job in jobs} == {tmp_path / "1e5"}


def test_a_sweep_in_a_recipe(monkeypatch, tmp_path):
    recipe = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      model.revision: 5e37820,2_0\n"
    conf = conf_with(tmp_path, experiment__x=recipe)
    jobs = swept(monkeypatch, "--config-dir", str(conf), "experiment=x", f"run_dir={tmp_path}/sweep")
    assert [job.model.revision for job in jobs] == ["5e37820", "2_0"]


def test_choices_in_a_list_are_the_names_of_files(tmp_path):
    conf = conf_with(tmp_path, experiment__2024_11="# @package _global_\nname: a\n",
                     experiment__007="# @package _global_\ntracking: {tags: [b]}\n")  # fmt: skip
    config = compose("experiment=[2024_11,007]", conf=conf)
    assert (config.name, config.tracking.tags) == ("a", ["b"])


def test_values_of_hydras_own_options_are_no_settings():
    options = ["--config-dir", "name=1e5", "-cn", "tuning=2", "name=1e5"]
    assert cli.quote_text(options) == [*options[:4], "name='1e5'"]


@pytest.mark.parametrize(
    "text", ["🦊", "C:\\data\\new", "a\tb", "a\nb", "x" * 5000, "a#b: c", "$HOME", "a'b\"c", "'a'b"]
)
def test_what_a_shell_may_hand_on(text):
    assert compose(f"name={text}", f"++tracking.tags=[{text},1e5]").tracking.tags == [text, "1e5"]
    assert compose(f"name={text}").name == text


def test_a_recipe_in_another_encoding_is_named(tmp_path):
    conf = conf_with(tmp_path, experiment__x="")
    (conf / "experiment" / "x.yaml").write_bytes("# @package _global_\nname: 试验\n".encode("gb18030"))
    with pytest.raises(UserError, match=r"experiment/x\.yaml: not UTF-8 at byte 26: save it as UTF-8"):
        compose("experiment=x", conf=conf)
    with pytest.raises(UserError, match=r"x\.yaml: not UTF-8"):
        load.load_yaml(conf / "experiment" / "x.yaml")
