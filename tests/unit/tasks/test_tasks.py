"""What a task is stands in its own file: nothing else in the package knows one by its name."""

import re
from pathlib import Path

import tiny

from dsft.config.schema import known
from dsft.tasks import TASKS, settings_by_task

ROOT = Path(__file__).parents[3]


def test_no_file_names_a_task_but_its_own_and_its_entry():
    found = set()
    for file in (ROOT / "dsft").rglob("*"):
        if file.suffix not in (".py", ".j2"):
            continue
        text = file.read_text(encoding="utf-8")
        # some names are common words: as a task's they stand in quotes, behind `task=`, or in an import
        named = set(re.findall(r"""(?:["']|task=)(\w+)\b(?!:)""", text))
        named |= {word for line in re.findall(r"(?:from|import) .*", text) for word in re.findall(r"\w+", line)}
        found |= {(file.relative_to(ROOT / "dsft").as_posix(), name) for name in TASKS if name in named}
    entries = {("tasks/__init__.py", name) for name in TASKS}
    assert entries <= found <= entries | {(f"tasks/{name}.py", name) for name in TASKS}


def test_every_setting_of_some_tasks_is_read_by_one_and_not_by_all():
    read = list(settings_by_task().values())
    assert set().union(*read) == known("of_some_tasks").keys()


def test_every_task_can_be_chosen():
    assert {file.stem for file in (ROOT / "conf" / "task").glob("*.yaml")} == set(TASKS)


def test_texts_of_a_record_can_be_read_and_replaced_without_knowing_it():
    """By which steps that clean or augment text stay blind to tasks."""
    for fields in (
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}], "tools": []},
        {"text": "床前明月光"},
    ):
        record = tiny.conversation(fields, "f.jsonl:1")
        texts = record.texts()
        changed = record.with_texts({name: text.upper() + "!" for name, text in texts.items()})
        assert changed.texts() == {name: text.upper() + "!" for name, text in texts.items()}
        assert changed.origin == "f.jsonl:1" and record.texts() == texts
        assert record.protected_spans() == {}
