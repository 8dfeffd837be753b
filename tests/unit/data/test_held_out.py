"""Held out means held out: what says the same, pieces of one record and groups stay on one side."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import tiny
from sklearn.model_selection import train_test_split

from dsft.config.schema import DataConfig, OnOverflow, TaskConfig
from dsft.data import dataset
from dsft.data.held_out import sides
from dsft.data.sources import BadRecord
from dsft.tasks import TASKS, encode
from dsft.tasks.task import Context, content_key

NONE = np.zeros(1000, np.uint64)
SHARES = (0.1, 0.1)


def drawn(kinds: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, kinds + 1, 1000).astype(np.uint64)


@pytest.mark.parametrize("kinds", [3, 30, 700, 10**9])
@pytest.mark.parametrize("grouped", [0, 5, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_content_and_no_group_stands_on_two_sides(kinds, grouped, seed):
    contents, groups = drawn(kinds), drawn(grouped, 1) if grouped else NONE
    chosen = sides(contents, groups, NONE, SHARES, seed)
    for keys in (contents, groups) if grouped else (contents,):
        for key in np.unique(keys):
            assert len(set(chosen[keys == key])) == 1
    assert set(chosen) <= {0, 1, 2} and 0 in chosen


def test_shares_are_met_to_the_record_where_nothing_is_tied():
    chosen = sides(drawn(10**12), NONE, NONE, SHARES, 3)
    assert np.bincount(chosen).tolist() == [800, 100, 100]
    assert not np.array_equal(chosen, sides(drawn(10**12), NONE, NONE, SHARES, 4))
    few = sides(np.arange(1, 4, dtype=np.uint64), NONE[:3], NONE[:3], (0.01,), 0)
    assert sorted(few) == [0, 0, 1], "at least one"
    assert sides(np.ones(1, np.uint64), NONE[:1], NONE[:1], (0.5,), 0).tolist() == [0]
    assert not sides(drawn(9), NONE, NONE, (0.0, 0.0), 0).any()


def test_with_ties_shares_are_met_as_nearly_as_whole_groups_allow():
    groups = drawn(100, 1)
    chosen = sides(drawn(10**12), groups, NONE, (0.2,), 0)
    assert 200 - np.bincount(groups.astype(int)).max() < chosen.sum() <= 200


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_every_stratum_gives_the_same_share(share):
    """As scikit-learn does it, to the record."""
    strata = np.random.default_rng(5).choice([7, 8, 9], 1000, p=[0.7, 0.25, 0.05]).astype(np.uint64)
    chosen = sides(drawn(10**12), NONE, strata, (share,), 0)
    _, theirs = train_test_split(strata, test_size=share, stratify=strata, random_state=0)
    for stratum in (7, 8, 9):
        assert abs(chosen[strata == stratum].sum() - (theirs == stratum).sum()) <= 1
    assert chosen.sum() == len(theirs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["the red fox"], [" the  red\nfox "]),
        (["ＡＢＣ１２３"], ["abc123"]),
        (["春天 来了"], ["春天\u3000来了"]),
        (["ﬁne"], ["FINE"]),
    ],
)
def test_what_only_looks_different_is_the_same_content(one, other):
    assert content_key(one) == content_key(other)


def test_what_says_something_else_is_not():
    assert len({content_key(texts) for texts in (["a", "b"], ["a b"], ["b", "a"], ["a", "c"], ["春"], ["夏"])}) == 6


def rows(count: int) -> list[dict]:
    """Every text stands there three times, written differently."""
    texts = tiny.texts(count // 3, seed=2, longest=80)
    ways = (lambda text: text, lambda text: f"  {text.upper()}\n", lambda text: text.replace(" ", "\u3000"))
    return [
        {"text": way(f"{number} {text}"), "user": number % 7, "meta": {"lang": "en" if number % 4 else "zh"}}
        for way in ways
        for number, text in enumerate(texts)
    ]


def prepared(tmp_path, rows, **settings) -> dataset.Prepared:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    data = DataConfig(train=str(file), cache_dir=str(tmp_path / "cache"), num_workers=1, max_length=32, **settings)
    context = Context(tiny.TOKENIZER, data, TaskConfig(name="causal_lm"))
    recipe = {"by": [data.group_by_field, data.stratify_by_field, data.on_overflow.value]}
    return dataset.prepare(data, partial(encode, task=TASKS["causal_lm"], context=context), recipe, 0)


def said(part: dataset.TokenDataset) -> set[int]:
    """The number that every record's text begins with."""
    first: dict[int, str] = {}
    for number in range(len(part)):
        first.setdefault(part[number].record, tiny.TOKENIZER.decode(part[number].ids))
    return {int(text.split()[0]) for text in first.values()}


def test_train_validation_and_test_share_nothing(tmp_path):
    made = prepared(tmp_path, rows(300), validation_share=0.1, test_share=0.1, on_overflow=OnOverflow.split)
    parts = [made.train, made.validation, made.test]
    records = [set(part.records.tolist()) for part in parts]
    assert not records[0] & records[1] and not records[0] & records[2] and not records[1] & records[2]
    assert sum(map(len, records)) == 300
    assert [len(one) for one in records[1:]] == [30, 30]
    assert max(len(part) for part in parts) > 240, "documents were split"
    assert not said(parts[0]) & said(parts[1]) and not said(parts[0]) & said(parts[2])
    assert made.audit["train"]["records_repeated"] == 2 * len(said(parts[0]))
    assert made.audit["train"]["records_held_out"] == 60
    assert (made.audit["validation"]["records_kept"], made.audit["test"]["records_kept"]) == (30, 30)
    assert made.audit["test"]["records_also_trained_on"] == 0


def test_groups_and_strata_are_fields_of_the_rows(tmp_path):
    data = rows(420)
    made = prepared(tmp_path, data, validation_share=0.2, group_by_field="user")
    users = [{data[record]["user"] for record in part.records} for part in (made.train, made.validation)]
    assert not users[0] & users[1] and users[1]
    made = prepared(tmp_path, data, validation_share=0.2, stratify_by_field="meta.lang")
    held = [data[record]["meta"]["lang"] for record in sorted(set(made.validation.records.tolist()))]
    whole = [row["meta"]["lang"] for row in data]
    for lang in ("en", "zh"):
        assert abs(held.count(lang) - 0.2 * whole.count(lang)) <= 3, "to the three records that say the same"


def test_a_record_without_the_field_is_named(tmp_path):
    with pytest.raises(
        BadRecord, match=r"rows\.jsonl:2: field `meta\.lang` is missing, and data\.stratify_by_field=meta"
    ):
        prepared(tmp_path, [rows(3)[0], {"text": "a"}], validation_share=0.2, stratify_by_field="meta.lang")


def test_a_validation_file_that_repeats_training_records_is_told(tmp_path):
    data = rows(30)
    file = tiny.write_jsonl(tmp_path / "held.jsonl", [*data[:4], {"text": "not there"}])
    made = prepared(tmp_path, data, validation=str(file))
    assert made.audit["validation"]["records_also_trained_on"] == 4
    assert made.test is None and made.audit["test"] is None
    assert json.dumps(made.audit)


def test_a_test_file_is_read_whole(tmp_path):
    file = tiny.write_jsonl(tmp_path / "test.jsonl", [{"text": "one"}, {"text": "two"}])
    made = prepared(tmp_path, rows(30), test=str(file), validation_share=0.1)
    assert (len(made.test), made.audit["test"]["records_read"]) == (2, 2)
