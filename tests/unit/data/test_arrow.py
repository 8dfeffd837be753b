"""Parquet and Arrow files as other programs write them; `save_to_disk` as `load_from_disk` reads it."""

import struct

import datasets
import pandas
import pyarrow as pa
import pytest
from pyarrow import parquet

from dsft.data import arrow
from dsft.data.raw import BadRecord
from dsft.data.sources import Found
from dsft.errors import UserError

ROWS = [
    {"messages": [{"role": "user", "content": "月" * n}, {"role": "tool", "name": "f", "content": "b"}][: 1 + n % 2],
     "n": n, "score": n / 3}
    for n in range(700)
]  # fmt: skip


def fields(spec):
    return [one.fields for one in Found(str(spec)).records()]


def test_pandas_parquet(tmp_path):
    pandas.DataFrame({"text": ["月", None, "c"], "n": [1, 2, 3]}).to_parquet(tmp_path / "x.parquet")
    assert fields(tmp_path / "x.parquet") == [{"text": "月", "n": 1}, {"n": 2}, {"text": "c", "n": 3}]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_data_set(tmp_path, shards):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=shards)
    # what `map` leaves beside it is none of it
    (tmp_path / "saved/cache-0a.arrow").write_bytes((tmp_path / f"saved/data-00000-of-0000{shards}.arrow").read_bytes())
    expected = [arrow.without_nulls(row) for row in datasets.load_from_disk(tmp_path / "saved")]
    assert fields(tmp_path / "saved") == expected == ROWS
    left_out = Found(str(tmp_path / "saved")).about()["left_out"]
    assert [name.rpartition("/")[2] for name in left_out["not in state.json"]["first"]] == ["cache-0a.arrow"]


def test_a_shuffled_and_filtered_data_set_is_saved_as_it_is(tmp_path):
    chosen = datasets.Dataset.from_list(ROWS).shuffle(seed=1).select(range(100, 160))
    chosen.save_to_disk(tmp_path / "saved")
    assert [row["n"] for row in fields(tmp_path / "saved")] == chosen["n"][:]


def test_a_shard_that_is_missing_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state\.json: data-00001-of-00002\.arrow is not there"):
        Found(str(tmp_path / "saved"))


def test_both_formats_of_arrow_and_its_own_types(tmp_path):
    table = pa.table({"text": ["a", "b"], "kind": pa.array(["x", "y"]).dictionary_encode()})
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            for at in range(2):
                writer.write_table(table.slice(at, 1))
        assert fields(tmp_path / f"{name}.arrow") == table.to_pylist()


def test_an_empty_file_is_an_empty_file(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    pandas.DataFrame({"text": []}).to_parquet(tmp_path / "pandas.parquet")
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "datasets.parquet")
    for suffix in (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt", ".ndjson.gz", ".tsv.zst"):
        (tmp_path / f"nothing{suffix}").write_bytes(b"")
    pandas.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "one.parquet")
    found = Found(str(tmp_path))
    assert [one.fields for one in found.records()] == [{"text": "a"}]
    assert found.notes()["empty"]["files"] == 10, "a text beside records is not read at all"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_row_that_is_no_text_is_one_bad_record(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(arrow, "ROWS", 4)
    wrong = pa.array([b"a", b"b\xff", "月".encode(), b"\x80"] * 3)
    table = pa.table({"text": pa.StringArray.from_buffers(len(wrong), *wrong.buffers()[1:])})
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    found = list(Found(str(path)).records())
    assert [one.fields["text"] for one in found[::2]] == ["a", "月"] * 3
    assert all(isinstance(one, BadRecord) and "Invalid UTF8 sequence" in one.problem for one in found[1::2])
    assert [one.origin for one in found] == [f"{path}:{n}" for n in range(1, 13)]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_that_is_cut_off_is_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        path.write_bytes((tmp_path / "saved/data-00000-of-00001.arrow").read_bytes())
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=rf"x\.{suffix}: cannot be read as {suffix.capitalize()}"):
        fields(path)


def test_a_layout_that_points_outside_of_the_file_does_not_end_the_process(tmp_path):
    """Arrow itself would read there, and be killed."""
    table, path = pa.table({"text": ["seven..", "eleven.....", "c"]}), tmp_path / "x.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    whole, ends = path.read_bytes(), struct.pack("<4i", 0, 7, 18, 19)
    assert whole.count(ends) == 1
    path.write_bytes(whole.replace(ends, struct.pack("<4i", 0, 7, 1 << 30, 19)))
    first, *bad = Found(str(path)).records()
    assert first.fields == {"text": "seven.."}
    assert [isinstance(one, BadRecord) for one in bad] == [True, True]
