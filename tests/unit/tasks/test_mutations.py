"""10,000 damaged records: no traceback, each accounted for, and nothing that means something changed in silence."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import mutations
import numpy as np
import pairwise
import pytest
import tiny

from dsft.config.schema import DataConfig, OnBadRecord, TaskConfig
from dsft.data import blocks
from dsft.data.sources import BadRecord, Found, Raw
from dsft.tasks import TASKS, encode
from dsft.tasks.task import Context
from dsft.types import Example

ROOT = Path(__file__).parents[3]
COUNT = 10_000 if pairwise.PUBLISH else 1_500
NAMES = re.compile(r"`[^`]+`|not JSON|UTF-8|turn \d|chat template|known shapes|a record is an object|half a character")
"""How a message names what is wrong: a field, the line's syntax, a turn, the template."""


@pytest.fixture(scope="module")
def context():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = mutations.RICH
    data = DataConfig(max_length=4096, on_bad_record=OnBadRecord.skip)
    return Context(tokenizer, data, TaskConfig(name="causal_lm"))


def outcome(context, raw: Raw | BadRecord):
    """What becomes of a record: its examples, what is wrong with it or why it is dropped; and what is noted of it."""
    made = (
        raw
        if isinstance(raw, BadRecord)
        else blocks._made(partial(encode, task=TASKS["causal_lm"], context=context), raw)
    )
    if isinstance(made, BadRecord):
        return "refused", made.problem, frozenset()
    if not isinstance(made, list):
        return "dropped", made.reason, frozenset(raw.notes)
    examples = tuple((tuple(e.ids), tuple(e.columns["weights"])) for e in made if isinstance(e, Example))
    return "kept", examples, frozenset(raw.notes)


def is_named(name: str, path: tuple, problem: str) -> bool:
    """Whether a message names what was damaged: the field itself, or one that it stands in."""
    keys = [key for key in path if isinstance(key, str)]
    return bool(NAMES.search(problem)) and (not keys or any(key in problem for key in keys))


def _without_plain(value):
    """A record without what says nothing to a model."""
    if isinstance(value, dict):
        return {key: _without_plain(one) for key, one in value.items() if key not in mutations.PLAIN}
    return [_without_plain(one) for one in value] if isinstance(value, list) else value


def means_nothing(name: str, path: tuple, before: dict, line: bytes) -> str | None:
    """Why a change need not show, if there is a reason."""
    keys = [key for key in path if isinstance(key, str)]
    if not path:
        return "it reads as the same" if _without_plain(json.loads(line)) == _without_plain(before) else None
    if keys[-1] in mutations.PLAIN and name != "a field added":
        return "it says nothing to a model"
    record, value = json.loads(line), mutations.at(before, path)
    if name in ("removed", "null", "emptied", "renamed") and value in (None, "", [], {}):
        return "nothing was there"
    if (
        name == "null"
        and isinstance(mutations.at(before, path[:-1]), dict)
        and keys[-1] in ("weight", "loss_weight")
        and value == 1
    ):
        return "a weight of 1"
    after = mutations.at(record, path) if name not in ("removed", "renamed") else None
    if any(value in same and after in same for same in (["user", "human"], ["assistant", "gpt"], ["tool", "function"])):
        return "another name for the same role"
    if name == "in a list" and keys[-1] == "function_call":
        return "a list of one call"
    return None


def test_every_mutation_shows_or_is_named(context, tmp_path):
    random = np.random.default_rng(0)
    made = [mutations.mutated(random) for _ in range(COUNT)]
    file = tmp_path / "mutated.jsonl"
    file.write_bytes(b"\n".join(line for *_, line in made) + b"\n")
    usual = {id(record): outcome(context, Raw(record, "")) for record in mutations.CORPUS}
    assert {kind for kind, *_ in usual.values()} == {"kept"}
    found = {int(raw.origin.rpartition(":")[2]): raw for raw in Found(str(file)).records()}
    silent, unnamed, table = [], [], Counter()
    for number, (name, path, before, line) in enumerate(made, start=1):
        kind, result, notes = outcome(context, found[number])
        same = (kind, result) == usual[id(before)][:2]
        noted = notes != usual[id(before)][2]
        reason = means_nothing(name, path, before, line) if same and not noted else None
        shown = kind if not same else "noted" if noted else "means nothing" if reason else "silent"
        table[name, "changed" if shown == "kept" else shown] += 1
        if shown == "silent":
            silent.append((name, path, line.decode(errors="replace")))
        if kind == "refused" and not is_named(name, path, result):
            unnamed.append((name, path, result))
        assert result if kind != "kept" else True
    assert not silent, f"{len(silent)}: {silent[:5]}"
    assert not unnamed, f"{len(unnamed)}: {unnamed[:5]}"
    assert set(found) == set(range(1, COUNT + 1)), "each line is accounted for"
    if pairwise.PUBLISH:
        publish(table)


def test_a_file_of_mutated_records_is_counted_whole(tmp_path):
    random = np.random.default_rng(1)
    lines = [mutations.mutated(random)[-1] for _ in range(300)]
    file = tmp_path / "mutated.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = mutations.RICH
    data = DataConfig(train=str(file), on_bad_record=OnBadRecord.skip, cache_dir=str(tmp_path / "cache"), num_workers=1)
    part = tiny.prepare(data, tokenizer)[2]["train"]
    assert part["records_read"] == 300
    kept = part["records_kept"] + part["records_held_out"]
    assert kept + sum(part["records_dropped"].values()) == 300
    assert json.loads(json.dumps(part))  # it can be written down


def publish(table: Counter) -> None:
    """Write docs/MUTATIONS.md."""
    outcomes = ("changed", "refused", "dropped", "noted", "means nothing")
    lines = [
        "# Damaged records",
        "",
        f"{COUNT:,} records of all shapes, in English and Chinese, each damaged in one way at random, under a template",
        "that writes all that a conversation can have (`DSFT_PUBLISH=1 pytest tests/unit/tasks/test_mutations.py`).",
        "*Changed*: other ids, mask or weights. *Refused*: a bad record whose message names the field, the turn or",
        "the line. *Dropped*: counted in the audit by its reason. *Noted*: the audit names the field. *Means nothing*:",
        "it says nothing to a model (`id`, `source`, another name of the same role), and nothing changes. None changes",
        "anything in silence, none ends in a traceback.",
        "",
        f"| what was done | {' | '.join(outcomes)} |",
        "|---|" + "---|" * len(outcomes),
    ]
    for name in dict.fromkeys(name for name, _ in sorted(table)):
        lines.append(f"| {name} | {' | '.join(f'{table[name, one]:,}' for one in outcomes)} |")
    totals = [sum(count for (_, one), count in table.items() if one == wanted) for wanted in outcomes]
    lines.append(f"| all | {' | '.join(f'{total:,}' for total in totals)} |")
    lines += ["", f"Refused: {totals[1] / COUNT:.1%} of all."]
    (ROOT / "docs" / "MUTATIONS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
