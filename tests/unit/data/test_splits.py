"""The split that a file's name says is the one that `datasets` finds in it."""

from pathlib import PurePath

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

from dsft.data.splits import by_split, same, split_of
from dsft.errors import UserError


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("data/train-00001-of-00002.parquet", "train"),
        ("data/train_sft-00000-of-00003-a1b2c3.parquet", "train_sft"),
        ("data/prefs-00000-of-00001.parquet", "prefs"),
        ("data/data-00000-of-00001.arrow", None),
        ("chats-00000-of-00001.jsonl", None),
        ("test.jsonl.gz", "test"),
        ("squad-dev-v2.0.json", "validation"),
        ("squad_Train_v1.json", "train"),
        ("alpaca.val.csv", "validation"),
        ("eval_set.jsonl", "test"),
        ("myTestData.jsonl", "test"),
        ("testset.jsonl", "test"),
        ("测试集.jsonl", "test"),
        ("对话-训练.csv", "train"),
        ("validation/part-0.jsonl", "validation"),
        ("en/dev/0.jsonl", "validation"),
        ("train/test_cases.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("pretraining.jsonl", None),
        ("contest.jsonl", None),
        ("latest.jsonl", None),
        ("evaluate.jsonl", None),
        ("attest/value.jsonl", None),
        ("devices.csv", None),
    ],
)
def test_a_path_says_its_split(path, split):
    assert split_of(PurePath(path)) == split


@pytest.mark.parametrize("path", ["train_test.jsonl", "data/val-train.csv", "训练test.json"])
def test_a_name_that_says_two_is_refused(path):
    with pytest.raises(UserError, match=r"it cannot be told whether this is of the split t"):
        split_of(PurePath(path))


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "test.jsonl"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        ["train/a.csv", "validation/b.csv", "test/c.csv"],
        ["data/train/a.csv", "data/dev/b.csv"],
        ["x_train.json", "x-valid.json", "x.eval.json"],
        ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
        ["training/0.jsonl", "testing/0.jsonl"],
        ["a.jsonl", "b.jsonl"],
    ],
)
def test_files_are_shared_out_as_datasets_does(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    theirs = DataFilesDict.from_patterns(sanitize_patterns(get_data_patterns(str(tmp_path))), base_path=str(tmp_path))
    ours = by_split([tmp_path / name for name in names], tmp_path) or {"train": [tmp_path / name for name in names]}
    assert {split: {*map(str, paths)} for split, paths in ours.items()} == {k: {*v} for k, v in theirs.items()}


def test_files_that_say_none_are_trained_on_unless_others_are(tmp_path):
    a, test, train = (tmp_path / name for name in ("a.jsonl", "test.jsonl", "train.jsonl"))
    assert by_split([a], tmp_path) == {}
    assert by_split([a, test], tmp_path) == {"train": [a], "test": [test]}
    assert by_split([a, test, train], tmp_path) == {"": [a], "test": [test], "train": [train]}


def test_names_of_one_split():
    assert same("dev", "validation") and same("eval", "test") and same("train_sft", "train_sft")
    assert not same("train", "train_sft") and not same("dev", "test")
