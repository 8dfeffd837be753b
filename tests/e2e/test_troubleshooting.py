"""Every mistake that the document shows, made for real: what it says is printed is what is printed."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import helpers
import pytest
import tiny
from hydra.core.global_hydra import GlobalHydra

from dsft.checkpoint import MANIFEST, _describe

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
CASE = re.compile(r"```console\n\$ python launch/train.py (.+)\n((?:.+\n)+?)```")
THINK = "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}"
LAST_TURN_THINKS = tiny.CHATML.replace("{{ message['content'] }}", THINK + "{{ message['content'] }}")
CHAT = [
    {"role": "user", "content": "Where is the moon?"},
    {"role": "assistant", "content": "Over the hill."},
    {"role": "user", "content": "And the sun?"},
    {"role": "assistant", "content": "It has set."},
]


def cases(readme: str) -> list[tuple[str, str]]:
    """Arguments of each command that a troubleshooting document shows, and what it says is printed."""
    return CASE.findall((ROOT / readme).read_text(encoding="utf-8"))


def in_use(command: str) -> bool:
    """Whether the mistake is only found once there is a process group, of which a test process has one at most."""
    return "run_dir=runs/chat" in command


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """The files that the commands name, and a run that is going on."""
    home = tmp_path_factory.mktemp("home")
    for name, template in (("my-model", tiny.CHATML), ("base-model", None), ("thinking-model", LAST_TURN_THINKS)):
        tiny.llama(max_position_embeddings=512).save_pretrained(home / name)
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(home / name)
    good = {"messages": CHAT}
    tiny.write_jsonl(home / "chats.jsonl", [good] * 4)
    (home / "broken.jsonl").write_text(json.dumps(good) + '\n{"messages": [{"role": "user"}\n', encoding="utf-8")
    tiny.write_jsonl(home / "unanswered.jsonl", [good, good, {"messages": CHAT[:1]}])
    tiny.write_jsonl(home / "faq.jsonl", [{"title": "Where is the moon?", "body": "Over the hill."}])
    long = {"prompt": "Where is the moon? " * 100, "completion": "Over the hill."}
    tiny.write_jsonl(home / "long_prompts.jsonl", [long] * 3)
    (home / "ds.json").write_text('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', encoding="utf-8")
    offload = {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    (home / "offload.json").write_text(json.dumps(offload), encoding="utf-8")
    (home / "adapters").mkdir()
    about = {"base_model_name_or_path": "my-model"}
    (home / "adapters/adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    shutil.copytree(home / "my-model", home / "cloned-model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n"
    (home / "cloned-model/model.safetensors").write_text(pointer, encoding="utf-8")
    two_rank_checkpoint(home / "runs/chat/checkpoints/step-000020")
    (home / "runs/busy").mkdir()
    with filelock.FileLock(home / "runs/busy/.lock"):
        yield home


def two_rank_checkpoint(directory: Path) -> None:
    """As much of a whole checkpoint of two ranks as is read before it is refused."""
    directory.mkdir(parents=True)
    cursor = {"epoch": 0, "step_in_epoch": 0, "global_batch_size": 8}
    state = {"step": 20, "world_size": 2, "zero_stage": 2, "frozen": True, "data": "", "loader": cursor}
    file = directory / "state.json"
    file.write_text(json.dumps(state), encoding="utf-8")
    manifest = {"step": 20, "files": {file.name: _describe(file)}}
    (directory / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def told(command: str, home: Path, monkeypatch, capsys) -> tuple[int, str]:
    """Run the launch script in this process, from `home`; its exit code and stderr."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards: the script sets it
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *shlex.split(command)])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TRAIN), run_name="__main__")
    return stopped.value.code, capsys.readouterr().err


def told_by_a_process(command: str, home: Path, scratch: Path, monkeypatch) -> tuple[int, str]:
    """The same in a process of its own."""
    monkeypatch.setenv("HOME", str(home))
    result = helpers.script([TRAIN, *shlex.split(command)], scratch, cwd=home)
    return result.code, result.err


@pytest.mark.parametrize(("command", "expected"), cases("docs/TROUBLESHOOTING.md"))
def test_the_user_sees_what_the_readme_shows(command, expected, home, scratch, monkeypatch, capsys):
    if in_use(command):
        code, err = told_by_a_process(command, home, scratch, monkeypatch)
    else:
        code, err = told(command, home, monkeypatch, capsys)
    message = err.replace(f"{home}/", "").replace(f"{home.resolve()}/", "")
    assert code == 2
    assert "Traceback" not in message
    assert message[message.index("error: ") :] == expected


def test_there_are_at_least_ten_and_both_languages_show_the_same():
    assert len(cases("docs/TROUBLESHOOTING.md")) >= 10
    assert cases("docs/TROUBLESHOOTING.md") == cases("docs/TROUBLESHOOTING.zh-CN.md")
