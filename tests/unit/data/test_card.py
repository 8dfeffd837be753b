"""What a data set's card says of subsets and splits is read as `datasets` reads it."""

import json

import datasets
import pytest

from dsft.data.card import subsets
from dsft.data.choice import Asked
from dsft.data.sources import Found
from dsft.errors import UserError

CARDS = {
    "splits": """configs:
- config_name: default
  data_files:
  - split: train
    path: raw/part-*
  - split: test
    path: [raw/other-1.jsonl, raw/other-2.jsonl]
""",
    "one glob": "configs:\n- config_name: x\n  data_files: raw/part-*.jsonl\n",
    "a list": "configs:\n- config_name: x\n  data_files: [raw/part-1.jsonl, raw/other-1.jsonl]\n",
    "a directory": "configs:\n- config_name: x\n  data_dir: inner\n",
    "several": """configs:
- config_name: en
  data_files: raw/part-1.jsonl
- config_name: zh
  default: true
  data_files:
  - {split: train, path: raw/part-2.jsonl}
  - {split: test, path: inner/*}
""",
}
FILES = ("raw/part-1.jsonl", "raw/part-2.jsonl", "raw/other-1.jsonl", "raw/other-2.jsonl", "inner/train.jsonl",
         "inner/test.jsonl")  # fmt: skip


@pytest.fixture
def clone(tmp_path):
    def make(card):
        for name in FILES:
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_text(json.dumps({"text": name}) + "\n")
        (tmp_path / "set/README.md").write_text(f"---\nlicense: mit\n{card}---\n# A data set\n---\n")
        return tmp_path / "set"

    return make


def read(spec, split, subset=None):
    return [one.fields["text"] for one in Found(str(spec), Asked(split, subset)).records()]


@pytest.mark.parametrize(
    ("card", "subset", "split"),
    [
        *[(card, None, "train") for card in CARDS],
        ("splits", None, "test"),
        ("splits", "default", "train"),
        ("a directory", "x", "test"),
        ("several", None, "test"),
        ("several", "en", "train"),
        ("several", "zh", "train"),
    ],
)
def test_as_datasets_reads_it(clone, tmp_path, card, subset, split):
    root = clone(CARDS[card])
    theirs = datasets.load_dataset(str(root), name=subset, split=split, cache_dir=str(tmp_path / "cache"))
    assert read(root, split, subset) == theirs["text"][:]


def test_what_the_card_does_not_name_is_refused_with_what_it_does(clone):
    root = clone(CARDS["several"].replace("  default: true\n", ""))
    with pytest.raises(UserError, match=r"it has several subsets; there are en, zh: choose one with data\.subset=NAME"):
        read(root, "train")
    with pytest.raises(UserError, match=r"no subset fr; there are en, zh"):
        read(root, "train", "fr")
    with pytest.raises(UserError, match=r"no split test; there are train"):
        read(root, "test", "en")
    assert read(root, "train", "inner") == ["inner/train.jsonl"], "a subdirectory, which the card does not name"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("configs: [\n", r"README\.md: the YAML at its head does not say"),
        ("configs: [x]\n", r"README\.md: the YAML at its head does not say"),
        ("configs:\n- data_files: a\n", r"README\.md: the YAML at its head does not say.*config_name"),
        ("configs:\n- config_name: x\n  data_files: hf://datasets/a/b\n", r"hf://datasets/a/b lies elsewhere"),
        (
            "configs:\n- config_name: x\n  data_files: raw/gone-*\n",
            r"its split train of x is raw/gone-\*, and there is",
        ),
    ],
)
def test_a_card_that_cannot_be_followed_is_named(clone, card, message):
    with pytest.raises(UserError, match=message):
        Found(str(clone(card)))


def test_settings_of_the_hubs_readers_are_named(clone):
    found = Found(str(clone(CARDS["one glob"] + '  sep: "\\t"\n')))
    assert found.about()["unread"] == ["sep"]


@pytest.mark.parametrize("text", ["# Notes\n", "", "---\nlicense: mit\n---\n", "---\n- a\n---\n", "--- a rule\n---\nx"])
def test_other_texts_of_that_name_say_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert subsets(tmp_path) == []
