"""The audit adds up, and shows an example as it is learnt."""

import io
import json

import numpy as np
import pytest
import tiny
from rich.console import Console

from dsft.config.schema import DataConfig, OnBadRecord, OnOverflow
from dsft.data import audit
from dsft.data.prompting import left_out
from dsft.tasks import fit


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte, so that every Chinese character is three."""
    return tiny.byte_tokenizer()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("audit")
    rows = [{"prompt": "床前?", "completion": "明" * n} for n in (*range(1, 21), 100, 200)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ["{", '{"[red]x": 1}']
    (root / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    skip, drop = OnBadRecord.skip, OnOverflow.drop
    data = DataConfig(
        train=str(root / "train.jsonl"),
        cache_dir=str(root / "cache"),
        max_length=128,
        on_bad_record=skip,
        on_overflow=drop,
    )
    train, validation, report = tiny.prepare(data, tokenizer)
    return train, validation, {**report, "example": audit.example_spans(train[0], tokenizer)}


def test_the_counts_add_up(prepared):
    train, validation, report = prepared
    part = report["train"]
    dropped = {audit.BAD: 2, fit.TOO_LONG: 2}
    assert part["records_dropped"] == dropped
    assert part["records_read"] == 24 == part["records_kept"] + part["records_held_out"] + sum(dropped.values())
    assert (part["records_kept"], part["records_held_out"], part["records_truncated"]) == (len(train), 1, 0)
    assert part["tokens"] == sum(len(train[i].ids) for i in range(len(train)))
    assert part["supervised_tokens"] == sum(int(train[i].columns["weights"].sum()) for i in range(len(train)))
    assert part["supervised_share"] == part["supervised_tokens"] / part["tokens"]
    assert [bad["origin"].split(":")[-1] for bad in part["bad_records"]] == ["23", "24"]
    held_out = report["validation"]
    assert (held_out["records_read"], held_out["records_kept"], held_out["tokens"]) == (1, 1, validation.lengths.sum())


def test_length_percentiles_are_lengths_that_occur(prepared):
    train, _, report = prepared
    lengths = report["train"]["lengths"]
    assert list(lengths) == ["min", "p5", "p25", "p50", "p75", "p95", "p99", "max"]
    assert (lengths["min"], lengths["max"]) == (train.lengths.min(), train.lengths.max())
    assert set(lengths.values()) <= set(train.lengths.tolist())
    assert lengths["p50"] == sorted(train.lengths)[(len(train) - 1) // 2]


def test_the_audit_is_json(prepared):
    report = prepared[2]
    assert json.loads(json.dumps(report))["train"] == report["train"]


def test_spans_come_out_in_whole_characters(prepared, tokenizer):
    train, _, _ = prepared
    assert audit.example_spans(train[0], tokenizer) == [
        ("<|im_start|>user\n床前?<|im_end|>\n<|im_start|>assistant\n", False),
        ("明<|im_end|>", True),
        ("\n", False),
    ]


def test_spans_make_up_the_whole_text(tokenizer):
    ids = np.asarray(tokenizer("  月 光 moon light ")["input_ids"], dtype=np.int32)
    supervised = np.arange(len(ids)) >= 6
    assert (
        "".join(text for text, _ in audit.example_spans(tiny.example(ids, supervised), tokenizer))
        == "  月 光 moon light "
    )


def shown(prepared, tokenizer, **kwargs):
    file = io.StringIO()
    train, _, report = prepared
    audit.show(report, train[0], tokenizer, Console(file=file, width=400, **kwargs))
    return file.getvalue()


def test_without_colour_the_supervised_part_is_in_brackets(prepared, tokenizer):
    text = shown(prepared, tokenizer)
    assert "⟦明<|im_end|>⟧" in text
    for part in ("records read", "24", fit.TOO_LONG, "supervised share", "train.jsonl:24: fields [red]x are none"):
        assert part in text
    assert "\x1b" not in text


def test_with_colour_the_supervised_part_is_green(prepared, tokenizer):
    text = shown(prepared, tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m明<|im_end|>\x1b[0m" in text
    assert "⟦明" not in text


def test_what_was_found_of_files_is_told_where_there_is_something_to_say(tmp_path, tokenizer):
    rows = [{"prompt": "床前?", "completion": "明月"}, {"prompt": "a", "completion": "b"}] * 3
    (tmp_path / "set").mkdir()
    for name in ("train-a.jsonl", "train-b.jsonl", "test.jsonl"):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "set" / name).write_text(lines, encoding="gb18030" if name == "train-b.jsonl" else "utf-8")
    (tmp_path / "set/train-c.csv").write_text("prompt;completion\nx;y\n")
    (tmp_path / "set/dev.json").write_text(json.dumps(rows))
    places = {"train": str(tmp_path / "set"), "validation": str(tmp_path / "set")}
    data = DataConfig(cache_dir=str(tmp_path / "cache"), **places)
    for _ in range(2):  # the second time from the cache
        prepared = tiny.prepare(data, tokenizer)
        files = prepared[2]["train"]["files"]
        assert (prepared[2]["train"]["records_read"], prepared[2]["validation"]["records_read"]) == (13, 6)
        assert files["formats"] == {".jsonl": 2, ".csv": 1}
        assert files["noticed"]["decoded as GB18030"] == {"files": 1, "first": [str(tmp_path / "set/train-b.jsonl")]}
        lines = shown(prepared, tokenizer).replace(f"{tmp_path}/set/", "").splitlines()
        assert [line for line in lines if line.startswith(("train: ", "validation: "))] == [
            "train: files of several formats: 2 .jsonl, 1 .csv",
            "train: 1 file of the split test, left out: test.jsonl",
            "train: 1 file of the split validation, left out: dev.json",
            "train: 1 file decoded as GB18030: train-b.jsonl",
            "train: 1 file with fields separated by ';': train-c.csv",
            "validation: 1 file of the split test, left out: test.jsonl",
            "validation: 3 files of the split train, left out: train-a.jsonl, train-b.jsonl, train-c.csv",
        ]


def test_a_field_to_ignore_that_no_record_has_is_counted_at_0_and_warned_of(tmp_path):
    path = str(tiny.write_jsonl(tmp_path / "x.jsonl", [{"text": "the moon", "extra": 1}] * 2))
    data = DataConfig(train=path, cache_dir=str(tmp_path), validation_share=0.0, ignore_fields=["extra", "extar"])
    _, _, parts = tiny.prepare(data, tiny.TOKENIZER)
    assert parts["train"]["notes"][left_out("extra")] == 2 and parts["train"]["notes"][left_out("extar")] == 0
    assert audit.idle_ignores(parts, data.ignore_fields) == ["data.ignore_fields names `extar`, which no record has"]
