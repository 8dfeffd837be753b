"""What READMEs and documents say of settings, metrics, records, commands and files is so."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import hydra
import pytest
import tiny

from dsft import ds_config
from dsft.config import cli, load, table
from dsft.config.check import check
from dsft.config.schema import knobs
from dsft.metrics import comparable, declare
from dsft.tasks import TASKS, settings_by_task
from dsft.tasks.classify import SHAPES as LABELLED
from dsft.tasks.conversation import SHAPES
from dsft.tasks.extract import SHAPES as ASKED
from dsft.tasks.seq2seq import SHAPES as WRITTEN
from dsft.tasks.tag import SHAPES as TAGGED
from dsft.tasks.task import read as read_record

load.register()

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.zh-CN.md"]
RECIPES = ["docs/RECIPES.md", "docs/RECIPES.zh-CN.md"]
DOCUMENTS = sorted(str(file.relative_to(ROOT)) for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
ONE_READING = 200
"""Lines that a README may have."""

RANKS = 2


@pytest.fixture(params=READMES)
def readme(request) -> str:
    return (ROOT / request.param).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """What follows `launch/train.py` (or the batch script that hands it on) in each command of the shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split(script, 1)[1] for line in lines for script in ("launch/train.py", "train.sbatch") if script in line
    ]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_a_readme_is_one_reading(readme):
    assert len(readme.splitlines()) < ONE_READING


def test_the_tables_are_those_of_schema_and_declarations():
    assert table.with_table(text("docs/SETTINGS.md")) == text("docs/SETTINGS.md"), "run `make table`"


def test_no_setting_or_metric_is_described_in_two_places():
    """A table row of one stands in the generated documents alone."""
    names = [*knobs(), *tiny.METRICS]
    for name in DOCUMENTS:
        if name not in ("docs/SETTINGS.md", "docs/METRICS.md"):
            rows = re.findall(r"^\| `([\w./]+)` \|", text(name), re.M)
            assert not set(rows) & set(names), name


def test_every_shape_of_record_is_shown_and_read(readme):
    shown = [json.loads(record) for record in re.findall(r'`(\{"\w+": .+?\})`', readme)]
    others = [record for record in shown if record.keys() & {"label", "tags", "context", "target"}]
    shown = [record for record in shown if record not in others]
    assert [type(read_record(LABELLED | TAGGED | ASKED | WRITTEN, record, "README")).__name__ for record in others] == [
        "Labelled", "Tagged", "Question", "Pair",
    ]  # fmt: skip
    read = [tiny.conversation(record, "README") for record in shown]
    assert len(shown) == len(SHAPES)
    assert {names for names in SHAPES for record in shown if set(names) <= set(record)} == set(SHAPES)
    assert sum(conversation.text is not None for conversation in read) == 1


def test_both_languages_show_the_same_commands():
    for pair in (READMES, RECIPES):
        english, chinese = (commands(text(name)) for name in pair)
        plain = [re.sub(r"#.*", "", command) for command in english]
        assert plain and plain == [re.sub(r"#.*", "", command) for command in chinese]


@pytest.mark.parametrize("command", [*commands(text("README.md")), *commands(text("docs/RECIPES.md"))])
def test_a_command_composes_and_its_settings_agree(command):
    words = [word for word in shlex.split(command, comments=True) if word not in ("-m", "--cfg", "job")]
    overrides = [word.split(",")[0] if " -m " in command else word for word in words]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = load.from_hydra(hydra.compose("config", overrides=overrides))
    check(
        config,
        ds_config.read(config.deepspeed.json),
        RANKS,
        settings_by_task(),
        comparable(declare(TASKS[config.task.name].metrics, TASKS[config.task.name].target)),
        cli.names(overrides),
    )


def test_every_choice_of_the_command_line_is_named(readme):
    contract = readme.split("run_dir=R\n")[1].split("```")[0]
    choices = list((ROOT / "conf").glob("*/*.yaml"))
    assert not [file for file in choices if not re.search(rf"(?<!\w){file.parent.name}=[^ ]*\b{file.stem}\b", contract)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text(name)) if "://" not in target]
    assert not [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()]
