"""Every format gives the same records, and a mistake is named by file and line."""

import gzip
import json
import os
import pickle
import random
from datetime import date
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pytest
from pyarrow import parquet

from dsft.data import arrow, sources
from dsft.data.choice import Asked
from dsft.data.sources import BadRecord
from dsft.errors import UserError

ROWS = [{"instruction": "说你好", "output": "你好\u2028世界\u0085。"}, {"instruction": 'a, "b"\nc', "output": "007"}]


def fields(spec):
    return [record.fields for record in sources.Found(str(spec)).records()]


def origins(spec):
    return [record.origin for record in sources.Found(str(spec)).records()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_format_gives_the_same_records(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.to_csv(str(tmp_path / "a.csv"), index=False)
    table.to_csv(str(tmp_path / "a.tsv"), index=False, sep="\t")
    for name in ("a.jsonl", "a.json", "d.json", "a.parquet", "a.csv", "a.tsv"):
        assert fields(tmp_path / name) == ROWS, name


def test_what_pandas_and_datasets_write_is_what_they_hold(tmp_path):
    frame, table = pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)
    for suffix in ("", ".gz", ".bz2", ".xz"):
        frame.to_json(tmp_path / f"lines.jsonl{suffix}", orient="records", lines=True)
        frame.to_json(tmp_path / f"array.json{suffix}", orient="records", indent=1, force_ascii=False)
        frame.to_csv(tmp_path / f"frame.csv{suffix}", index=False)
    frame.to_json(tmp_path / "table.json", orient="table", index=False)
    frame.to_csv(tmp_path / "excel.csv", index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n")
    frame.to_parquet(tmp_path / "frame.parquet")
    table.to_json(tmp_path / "datasets.jsonl")
    table.to_json(tmp_path / "datasets.json", lines=False, force_ascii=False)
    table.to_parquet(tmp_path / "datasets.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert fields(path) == ROWS, path.name
    assert len([*tmp_path.iterdir()]) == 18


def test_a_data_frame_written_by_columns_is_no_list_of_records(tmp_path):
    pandas.DataFrame(ROWS).to_json(tmp_path / "split.json", orient="split")
    assert [bad.problem for bad in sources.Found(str(tmp_path / "split.json")).records()] == [
        "a record is an object, but this is list"
    ] * 2


DAMAGE = {
    "x.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    "g.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("gb18030"),
    "u.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-16"),
    "z.jsonl.gz": lambda rows: gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()),
    "z.jsonl.zst": lambda rows: pa.compress(json.dumps(rows).encode(), codec="zstd", asbytes=True),
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "d.json": lambda rows: json.dumps({"v": 1, "data": rows}).encode(),
    "p.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "x.csv": lambda rows: pandas.DataFrame(rows).to_csv(index=False).encode(),
    "g.csv": lambda rows: pandas.DataFrame(rows).to_csv(index=False, sep=";").encode("gb18030"),
    "x.txt": lambda rows: rows[0]["output"].encode(),
    "x.parquet": lambda rows: pandas.DataFrame(rows).to_parquet(),
    "x.arrow": lambda rows: _stream(pa.Table.from_pylist(rows)),
}


def _stream(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", DAMAGE)
def test_however_a_file_is_damaged_it_is_read_or_named(tmp_path, name):
    """A byte changed, taken out or put in, a piece lost, doubled or zeroed: records, and messages that print."""
    chance, path = random.Random(name), tmp_path / name
    rows = [{"instruction": "月" * n, "output": 'a "b"\n[{c}]' * n} for n in range(1, 5)]
    whole = DAMAGE[name](rows)
    path.write_bytes(whole)
    expected = len(fields(path))
    refused = 0
    for _ in range(150):
        at, size = chance.randrange(len(whole)), chance.choice([1, 1, 1, 2, 30])
        piece = whole[at : at + size]
        put = chance.choice([b"", bytes(len(piece)), chance.randbytes(size), piece * 2, whole[-size:]])
        path.write_bytes(whole[:at] if chance.random() < 0.2 else whole[:at] + put + whole[at + size :])
        try:
            found = list(sources.Found(str(path)).records())
        except UserError as error:
            str(error).encode()
            assert name in str(error)
            refused += 1
            continue
        for one in found:
            if isinstance(one, BadRecord):
                assert one.problem
                str(one).encode()
            else:
                json.dumps(one.fields, ensure_ascii=False, default=repr).encode()
        assert len(found) <= expected + 30
    assert refused < 150 or name.startswith(("x.p", "z."))


def test_jsonl_splits_on_newlines_alone_and_bears_bom_blank_lines_and_crlf(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(("\ufeff" + lines[0] + "\r\n\r\n  \n" + lines[1]).encode())
    assert fields(path) == ROWS
    assert origins(path) == [f"{path}:1", f"{path}:4"]


def test_tool_call_arguments_keep_their_keys(tmp_path):
    calls = [{"messages": [{"arguments": {"city": "北京"}}]}, {"messages": [{"arguments": {"n": None}}]}]
    assert fields(write_jsonl(tmp_path / "x.jsonl", calls)) == calls


def test_parquet_gives_up_the_nulls_that_arrow_fills_in(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "f", "content": "b"}]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x [1].parquet"))
    assert fields(tmp_path / "x [1].parquet") == rows
    assert origins(tmp_path / "x [1].parquet") == [f"{tmp_path / 'x [1].parquet'}:1"]


def test_parquet_is_read_as_datasets_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "ROWS", 3)
    rows = [
        {"n": i, "f": i / 3, "t": "月" * i, "day": date(2026, 1, 1 + i), "many": [{"a": [i], "b": None}] * (i % 3)}
        for i in range(11)
    ]
    table = pa.Table.from_pylist(rows).append_column("kind", pa.array(["x", "y"] * 5 + ["x"]).dictionary_encode())
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train", streaming=True)
    assert fields(tmp_path / "x.parquet") == [arrow.without_nulls(row) for row in expected]
    assert origins(tmp_path / "x.parquet") == [f"{tmp_path / 'x.parquet'}:{n}" for n in range(1, 12)]


@pytest.mark.parametrize(
    "text",
    [
        '[\n {"text": "a"},\n\n {"text": "b"}\n]',
        '{"about": "\\"data\\": [",\n"data": [{"text": "a"},\n\n{"text": "b"}]}',
    ],
)
def test_json_records_know_the_line_they_begin_on(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    assert fields(path) == [{"text": "a"}, {"text": "b"}]
    assert origins(path) == [f"{path}:2", f"{path}:4"]


def test_json_lines_under_the_name_of_json(tmp_path):
    assert fields(write_jsonl(tmp_path / "x.json", ROWS)) == ROWS
    assert fields(write_jsonl(tmp_path / "one.json", ROWS[:1])) == ROWS[:1]


def test_csv_rows_know_the_line_they_begin_on(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbftext,n\n"two\nlines",1\nb,2\n')
    assert fields(path) == [{"text": "two\nlines", "n": "1"}, {"text": "b", "n": "2"}]
    assert origins(path) == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', "x.jsonl:2: not JSON: Expecting value at column 9"),
        ("x.jsonl", b'{"text": "a"}\n\xff\xfe\n{"text": "c"}\n', "x.jsonl:2: not UTF-8: byte 0xff at column 1"),
        ("x.jsonl", b'{"text": "a"}\n["b"]\n{"text": "c"}\n', "x.jsonl:2: a record is an object, but this is list"),
        ("x.json", b'[{"text": "a"},\n3,\n{"text": "c"}]', "x.json:2: a record is an object, but this is int"),
        (
            "x.json",
            b'[{"text": "a"},\n{"text": "\xff"},\n{"text": "c"}]',
            "x.json:2: not UTF-8: byte 0xff at column 11",
        ),
        ("x.csv", b"text\na\nb,b\nc\n", "x.csv:3: 2 fields where the header has 1"),
        ("x.csv", b'text\na\n"b"b\nc\n', "x.csv:3: the quotes of this row do not match"),
        ("x.csv", b"text\na\nb\xff\nc\n", "x.csv:3: not UTF-8: byte 0xff at column 2"),
        ("x.csv", b"text\na\nb\0\nc\n", "x.csv:3: it holds a NUL byte"),
    ],
)
def test_a_bad_record_is_named_and_those_after_it_are_read(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    first, bad, last = sources.Found(str(tmp_path / name)).records()
    assert (first.fields, last.fields) == ({"text": "a"}, {"text": "c"})
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith(f"{tmp_path}/{problem}")
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"text": "a"},\n{"text": ]', r"x.json:2: not JSON: Expecting value at column 10"),
        ("x.csv", b'text\n"open\n"shut"\nc', "x.csv:2: the quotes of this row do not match: .* on line 3"),
        ("x.parquet", b"not parquet", "x.parquet: cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(sources.Found(str(tmp_path / name)).records())


def test_directories_and_globs_go_deep_in_sorted_order(tmp_path):
    for name in ("b/2.jsonl", "a/deep/1.jsonl", "c.jsonl", "a/.hidden/x.jsonl", "a/notes.pdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": name}])
    expected = [{"text": "a/deep/1.jsonl"}, {"text": "b/2.jsonl"}, {"text": "c.jsonl"}]
    assert fields(tmp_path) == expected
    assert fields(tmp_path / "**/*.jsonl") == expected
    assert fields(tmp_path / "?/*.jsonl") == expected[1:2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("data/nowhere.jsonl", "data/nowhere.jsonl: no such file"),
        ("there/nowhere", "there/nowhere: no such file"),
        ("there/*.jsonl", r"there/\*.jsonl: no file of a known format \(found nothing\); supported are .jsonl, .json"),
        ("there", r"there: no file of a known format \(found notes.pdf\); supported are"),
        ("there/notes.pdf", r"notes.pdf: no file of a known format \(found notes.pdf\)"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/notes.pdf").write_text("x")
    with pytest.raises(UserError, match=message):
        list(sources.Found(spec).records())


def test_a_name_with_an_owner_is_a_hub_id(tmp_path, monkeypatch):
    asked = []

    def load_dataset(spec, split):
        asked.append((spec, split))
        return datasets.Dataset.from_list([{"text": "a", "n": None}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = sources.Found("owner/some-set", Asked("test")).records()
    assert (record.fields, record.origin) == ({"text": "a"}, "owner/some-set[test]:1")
    assert asked == [("owner/some-set", "test")]


def test_a_subset_of_a_hub_data_set_is_asked_for_by_name(tmp_path, monkeypatch):
    asked = []

    def load_dataset(spec, split, name):
        asked.append((spec, split, name))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = sources.Found("owner/set", Asked("test", "zh"))
    assert [record.origin for record in found.records()] == ["owner/set/zh[test]:1"]
    assert asked == [("owner/set", "test", "zh")]
    assert found.acts == {"split", "subset"}
    assert found.fingerprint() != sources.Found("owner/set", Asked("test", "en")).fingerprint()


def test_a_hub_id_that_fails_says_that_it_is_no_path_either(tmp_path, monkeypatch):
    def load_dataset(spec, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/set: no such path here, and as a hub id .*ConnectionError: no network"):
        list(sources.Found("owner/set").records())


def test_the_fingerprint_is_of_the_content_and_not_of_the_path(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    before = sources.Found(str(tmp_path / "a.jsonl")).fingerprint()
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert sources.Found(str(tmp_path / "b.jsonl")).fingerprint() == before
    write_jsonl(tmp_path / "b.jsonl", ROWS[::-1])
    assert sources.Found(str(tmp_path / "b.jsonl")).fingerprint() != before


def test_the_fingerprint_knows_how_files_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    before = sources.Found(str(tmp_path / "a.csv")).fingerprint()
    assert sources.Found(str(tmp_path / "a.csv"), header=["text"]).fingerprint() != before
    (tmp_path / "a.csv").rename(tmp_path / "a.tsv")
    assert sources.Found(str(tmp_path / "a.tsv")).fingerprint() != before


def test_names_of_files_that_are_no_utf8_are_read_and_told(tmp_path):
    """As archives made under a Chinese Windows leave them."""
    path = os.fsdecode(os.fsencode(tmp_path) + "/训练集".encode("gbk") + b".jsonl")
    Path(path).write_bytes('{"text": "月"}\n{\n'.encode("gb18030"))
    for spec in (path, str(tmp_path)):
        found = sources.Found(spec)
        good, bad = found.records()
        assert good.fields == {"text": "月"}
        for text in (str(bad), json.dumps(found.notes(), ensure_ascii=False), bad.origin):
            assert r"\udcc1" in text.replace("\\\\", "\\"), "the first character happens to be UTF-8"
            text.encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
        (b"/annex/objects/SHA256E-s3--0\n", "a git-annex pointer"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
    ],
)
def test_a_file_that_is_another_is_named_before_any_record(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for spec in (tmp_path / name, tmp_path, tmp_path / "*"):
        with pytest.raises(UserError, match=rf"{name} is {message}") as caught:
            sources.Found(str(spec))
        assert not isinstance(caught.value, BadRecord)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32"])
def test_text_in_an_encoding_that_is_not_read_is_named(tmp_path, encoding):
    for name, text in (("a.jsonl", '{"text": "月"}\n'), ("a.json", '[{"text": "月"}]'), ("a.csv", "text\n月\n")):
        file = tmp_path / name
        file.write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=rf"{name} is {encoding.upper().replace('6-', '6')} text, not UTF-8: conv"):
            sources.Found(str(file))


def test_a_link_into_an_annex_is_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(".git/annex/objects/X/SHA256E-s3--0")
    with pytest.raises(UserError, match=r"a\.jsonl is a git-annex link"):
        sources.Found(str(tmp_path))
