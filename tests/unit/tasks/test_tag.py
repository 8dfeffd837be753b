"""Tags of words: records, windows, what is learnt of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
from sklearn import metrics

from dsft.config.schema import DataConfig, OnOverflow
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.tasks import TASKS, encode, labels, tag
from dsft.tasks.task import View, read
from dsft.tasks.windows import windows
from dsft.types import Dropped


def record(**fields):
    return read(tag.SHAPES, fields, "rows:1")


def encoded(row: dict, data: DataConfig | None = None, tokens=None, **settings):
    context = tiny.collator("tag", tokens=tokens, **settings).context
    raw = Raw(row, "rows:1")
    return encode(raw, TASKS["tag"], replace(context, data=data or DataConfig())), raw.notes


@pytest.mark.parametrize("words", ["tokens", "words"])
@pytest.mark.parametrize("tags", ["tags", "ner_tags", "pos_tags", "labels"])
def test_lists_of_words_and_tags(words, tags):
    made = record(**{words: ["月", "亮", "rose", "."], tags: ["B-X", "I-X", "O", 3], "id": 1})
    assert made.text == "月亮 rose ."
    assert [made.text[slice(*span)] for span in made.words] == ["月", "亮", "rose", "."]
    assert made.tags == ["B-X", "I-X", "O", "3"] and made.metadata == {"id": 1}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "field `tokens` has 1 words, and `tags` has 2 tags"),
        ({"tokens": [], "tags": []}, "field `tokens` is a list of one or more"),
        ({"tokens": "a b", "tags": ["O"]}, "field `tokens` is a list"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"field `tokens\[1\]` is text"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, r"field `tokens\[1\]` is empty"),
        ({"tokens": ["a"], "tags": [None]}, r"field `tags\[0\]` is None"),
        ({"text": "moon", "spans": [[0, 9, "X"]]}, r"field `spans\[0\]` begins at 0 and ends at 9 of 4"),
        ({"text": "moon", "spans": [[2, 2, "X"]]}, r"field `spans\[0\]` begins"),
        ({"text": "moon", "spans": [[0, 3, "X"], [2, 4, "Y"]]}, "spans 'X' and 'Y' overlap at character 2"),
        ({"text": "moon", "spans": [{"start": 0, "end": 4}]}, r"field `spans\[0\].label` is None"),
        ({"text": "moon", "spans": ["X"]}, r"field `spans\[0\]` is no span"),
        ({"text": "a  b", "spans": [[1, 3, "X"]]}, "the span 'X' from 1 to 3 holds no word"),
    ],
)
def test_what_is_no_tagged_text_is_refused_by_its_field(fields, problem):
    with pytest.raises(BadRecord, match=problem):
        record(**fields)


def test_chinese_words_are_joined_without_spaces_however_long_they_are():
    assert record(tokens=["在", "山上", "看", "moon", "月亮"], tags=["O"] * 5).text == "在山上看 moon 月亮"


def test_a_chinese_character_is_a_word_behind_letters_too():
    assert tag.WORD.findall("我用GPT4写的code_x。") == ["我", "用", "GPT4", "写", "的", "code", "_", "x", "。"]


def test_spans_of_characters_become_tags_of_words_cut_at_their_ends():
    text = "Saw 月亮山 at Lake-side!"
    begin = text.index("Lake")
    made = record(text=text, entities=[{"start": 4, "end": 6, "label": "天体"}, [begin, begin + 9, "LOC"]])
    words = [made.text[slice(*span)] for span in made.words]
    assert words == ["Saw", "月", "亮", "山", "at", "Lake", "-", "side", "!"]
    assert made.tags == ["O", "B-天体", "I-天体", "O", "O", "B-LOC", "I-LOC", "I-LOC", "O"]
    inside = record(text="unhappy", spans=[[2, 7, "X"]])
    assert [inside.text[slice(*span)] for span in inside.words] == ["un", "happy"] and inside.tags == ["O", "B-X"]
    beside = record(text="月亮", spans=[[0, 1, "X"], [1, 2, "X"]])
    assert beside.tags == ["B-X", "B-X"]


def test_the_first_token_of_each_word_has_its_tag():
    ((made,), _) = encoded({"tokens": ["fox", "狐狸", "zyx"], "tags": ["B-ANIMAL", "I-ANIMAL", "O"]})
    (at,) = np.nonzero(made.columns["words"] >= 0)
    assert made.columns["words"][at].tolist() == [0, 1, 2] and made.weight == 3
    text = "fox 狐狸 zyx"
    offsets = tiny.ENCODER_TOKENIZER(text, return_offsets_mapping=True)["offset_mapping"]
    assert [text[slice(*offsets[place])].strip()[0] for place in at] == ["f", "狐", "z"]
    given = tag.inputs(made, View(0), tiny.collator("tag").context)
    assert given["labels"][at].tolist() == [tiny.TAGS.index(name) for name in ("B-ANIMAL", "I-ANIMAL", "O")]
    assert (given["labels"][made.columns["words"] < 0] == -100).all()


def test_words_without_a_token_of_their_own_are_counted():
    (made,), notes = encoded({"tokens": ["the", "bird"], "tags": ["O", "B-ANIMAL"]})
    assert made.weight == 2 and not notes
    joint = tiny.byte_tokenizer()
    joint.add_tokens(["月亮"])
    (made,), notes = encoded({"tokens": ["月", "亮", "x"], "tags": ["B-天体", "I-天体", "O"]}, tokens=joint)
    assert notes == {tag.SHARED} and made.columns["words"][made.columns["words"] >= 0].tolist() == [0, 2]


@pytest.mark.parametrize("length", [1, 5, 10, 11, 17, 18, 19, 100, 1001])
@pytest.mark.parametrize("overlap", [0, 1, 4, 9])
def test_windows_cover_everything_and_answer_each_token_once_where_it_is_farthest_from_a_cut(length, overlap):
    found = windows(length, 10, overlap)
    assert [token for *_, first, last in found for token in range(first, last)] == list(range(length))
    assert all(end - begin == min(10, length) for begin, end, _, _ in found)
    assert all(begin <= first < last <= end for begin, end, first, last in found)

    def distance(token, begin, end):
        return min(token - begin if begin else length, end - 1 - token if end < length else length)

    for (b1, e1, _, last), (b2, e2, _, _) in pairwise(found):
        for token in range(b2, e1):
            left, right = distance(token, b1, e1), distance(token, b2, e2)
            assert left >= right - 1 if token < last else right >= left - 1


def test_each_word_of_a_long_text_is_learnt_once():
    row = tiny.tagged_rows(1, seed=5, longest=200)[0]
    made, _ = encoded(row, DataConfig(max_length=24), overlap=6)
    assert len(made) > 3 and max(len(part.ids) for part in made) == 24
    words = [int(word) for part in made for word in part.columns["words"] if word >= 0]
    assert words == list(range(len(row["tokens"])))
    names = [name for part in made for name in part.columns["labels"]]
    assert names == [labels.key(name) for name in row["tags"]]


def test_what_is_too_long_is_split_dropped_or_refused_but_never_cut():
    row = tiny.tagged_rows(1, seed=5, longest=200)[0]
    dropped, _ = encoded(row, DataConfig(max_length=24, on_overflow=OnOverflow.drop), overlap=4)
    assert isinstance(dropped, Dropped)
    for data, overlap in (
        (DataConfig(max_length=24, on_overflow=OnOverflow.error), 4),
        (DataConfig(max_length=24, on_overflow=OnOverflow.truncate), 4),
        (DataConfig(max_length=24), 22),
    ):
        with pytest.raises(
            UserError, match="data.max_length=24 has room|truncate with task=tag|task.overlap=22 leaves"
        ):
            encoded(row, data, overlap=overlap)


def test_plain_tags_are_counted_by_word_as_scikit_learn_counts_them():
    names, random = ("ADJ", "NOUN", "VERB", "X"), np.random.default_rng(0)
    context = replace(tiny.collator("tag").context, labels=labels.Labels(names))
    rows = {name: random.integers(0, 3, 60) for name in ("predicted", "true")} | {"counts": random.random(60)}
    rows |= {"record": np.repeat(np.arange(6), 10), "word": np.tile(np.arange(10), 6)}
    numbers, about = tag.judge(rows, context, [])
    given = rows["true"], rows["predicted"]
    assert numbers["accuracy"] == pytest.approx(metrics.accuracy_score(*given, sample_weight=rows["counts"]))
    macro = metrics.f1_score(*given, average="macro", sample_weight=rows["counts"])
    assert numbers["tag_f1_macro"] == pytest.approx(macro) and "f1" not in numbers
    each = metrics.precision_recall_fscore_support(*given, sample_weight=rows["counts"])
    assert [*about["labels"]] == ["ADJ", "NOUN", "VERB"]
    for place, row in enumerate(about["labels"].values()):
        assert [*row.values()] == pytest.approx([values[place] for values in each])


def test_windows_of_a_record_are_joined_in_the_order_of_its_words():
    context = tiny.collator("tag").context
    names = {name: number for number, name in enumerate(tiny.TAGS)}
    true = [names[name] for name in ("B-ANIMAL", "I-ANIMAL", "O", "B-天体")]
    rows = {"predicted": np.array([true[2], true[3], true[1], true[0]]), "counts": np.ones(4)}
    rows |= {"true": np.array([true[2], true[3], true[1], true[0]]), "record": np.array([0, 1, 0, 0])}
    numbers, about = tag.judge(rows | {"word": np.array([2, 0, 1, 0])}, context, [])
    assert numbers["f1"] == 1 and {kind: row["support"] for kind, row in about["labels"].items()} == {
        "ANIMAL": 1, "天体": 1,
    }  # fmt: skip
