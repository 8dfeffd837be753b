"""Of a directory only the split and subset that are asked for are read, and the rest is named."""

import json
import os

import datasets
import pytest

from dsft.config.schema import DataConfig
from dsft.data.choice import Asked
from dsft.data.sources import Found, places
from dsft.errors import UserError


def lay_out(root, *names):
    """JSON Lines, each file with one record that says its name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n")
    return root


def read(spec, split="train", subset=None, **more):
    return [one.fields["text"] for one in Found(str(spec), Asked(split, subset, **more)).records()]


CLONE = ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl")


def test_a_clone_of_a_hub_data_set(tmp_path):
    lay_out(tmp_path, *CLONE, ".git/train.jsonl")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "LICENSE.txt").write_text("x")
    assert read(tmp_path) == read(tmp_path / "data") == [*CLONE[:2]]
    assert read(tmp_path, "test") == [CLONE[2]]
    left_out = Found(str(tmp_path)).about()["left_out"]
    assert {why: [os.path.basename(name) for name in about["first"]] for why, about in left_out.items()} == {
        "about the data set": ["README.md", "dataset_infos.json"],
        "texts beside records": ["LICENSE.txt"],
        "of the split test": ["test-00000-of-00001.jsonl"],
    }


@pytest.mark.parametrize("spec", ["", "*.jsonl", "*"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path, spec):
    lay_out(tmp_path, "dev.jsonl", "test.jsonl", "train.jsonl")
    with pytest.raises(UserError, match=r"no split holdout; there are test, train, validation: choose .* data\.split="):
        Found(str(tmp_path / spec), Asked("holdout"))
    with pytest.raises(UserError, match=r"no split train; there are test, validation: .* data\.validation_split=NAME"):
        (tmp_path / "train.jsonl").unlink()
        Found(str(tmp_path / spec), Asked(setting="data.validation_split"))


def test_a_glob_that_says_a_split_means_it(tmp_path):
    lay_out(tmp_path, "train.jsonl", "test-a.jsonl", "test-b.jsonl", "dev/0.jsonl")
    assert read(tmp_path / "test-*.jsonl") == ["test-a.jsonl", "test-b.jsonl"]
    assert read(tmp_path / "dev/*.jsonl") == read(tmp_path / "**/dev/*") == ["dev/0.jsonl"]
    assert read(tmp_path / "t*.jsonl") == ["train.jsonl"]
    assert read(tmp_path / "test-a.jsonl") == ["test-a.jsonl"]
    assert Found(str(tmp_path / "test-*.jsonl")).acts == set()
    with pytest.raises(UserError, match="no split train; there are test"):
        read(tmp_path / "te*.jsonl")


def test_where_no_name_says_a_split_all_are_read(tmp_path):
    lay_out(tmp_path, "a.jsonl", "b/c.jsonl")
    found = Found(str(tmp_path), Asked("test"))
    assert [one.fields["text"] for one in found.records()] == ["a.jsonl", "b/c.jsonl"]
    assert found.acts == set()
    assert Found(str(lay_out(tmp_path, "test.jsonl"))).acts == {"split"}


def test_saved_dictionaries_of_data_sets(tmp_path):
    rows = {name: [{"text": f"{name}{n}"} for n in range(3)] for name in ("train", "test", "extra")}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in rows.items()})
    whole.save_to_disk(tmp_path / "saved")
    for split in rows:
        assert read(tmp_path / "saved", split) == datasets.load_from_disk(tmp_path / "saved")[split]["text"][:]
    with pytest.raises(UserError, match="no split dev; there are extra, test, train"):
        read(tmp_path / "saved", "dev")
    assert read(tmp_path / "saved/test") == ["test0", "test1", "test2"], "a directory of its own is one data set"


def test_subsets_are_directories(tmp_path):
    lay_out(tmp_path, "en/train.jsonl", "en/test.jsonl", "zh/train.jsonl", "data/fr/train.jsonl")
    assert read(tmp_path, subset="zh") == ["zh/train.jsonl"]
    assert read(tmp_path, "test", "en") == ["en/test.jsonl"]
    assert read(tmp_path, subset="fr") == ["data/fr/train.jsonl"]
    assert Found(str(tmp_path), Asked("train", "zh")).acts == {"split", "subset"}
    with pytest.raises(UserError, match=r"no subset de; there are data, en, fr, zh: choose one with data\.subset=NAME"):
        read(tmp_path, subset="de")


def test_a_subset_of_the_validation_set_is_that_of_the_same_place_alone(tmp_path):
    lay_out(tmp_path, "set/en/train.jsonl", "set/en/dev.jsonl", "set/zh/train.jsonl", "set/zh/dev.jsonl", "v.jsonl")
    for validation, expected in (("set", ["zh/dev.jsonl"]), ("v.jsonl", ["v.jsonl"])):
        data = DataConfig(train=str(tmp_path / "set"), validation=str(tmp_path / validation), subset="zh")
        found = places(data)
        texts = {
            name: [one.fields["text"].removeprefix("set/") for one in some.records()] for name, some in found.items()
        }
        assert texts == {"data.train": ["zh/train.jsonl"], "data.validation": expected}


@pytest.mark.parametrize("subset", ["..", ".", "/"])
def test_a_subset_lies_within(tmp_path, subset):
    lay_out(tmp_path, "set/a.jsonl", "b.jsonl")
    with pytest.raises(UserError, match="no subset"):
        read(tmp_path / "set", subset=subset)


@pytest.mark.parametrize("names", [("a.jsonl", "a.jsonl.gz"), ("a.csv.zst", "a.csv.gz")])
def test_a_file_and_its_packed_copy_are_not_read_both(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{names[0]} and {names[1]} are the same file|{names[1]} and {names[0]} are"):
        Found(str(tmp_path))
    assert list(Found(str(tmp_path / names[0])).records()) == []


def test_files_of_a_user_are_read_however_they_are_called(tmp_path):
    """`state.json` is what `save_to_disk` writes only if it says so."""
    lay_out(tmp_path, "state.json", "b.json")
    assert read(tmp_path) == ["b.json", "state.json"]


def test_a_split_of_a_thousand_files_makes_a_small_report(tmp_path):
    lay_out(tmp_path, *(f"{split}-{n}.jsonl" for split in ("train", "test") for n in range(500)))
    about = Found(str(tmp_path)).about()
    assert about["formats"] == {".jsonl": 500}
    assert about["left_out"]["of the split test"]["files"] == 500
    assert len(json.dumps(about)) < 2000
