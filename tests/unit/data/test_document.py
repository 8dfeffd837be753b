"""A text file is a document."""

import gzip

import pytest

from dsft.data import document
from dsft.data.raw import BadRecord
from dsft.data.sources import Found

TEXT = "# 静夜思\n\n床前明月光，\n疑是地上霜。\n"


def records(path):
    return list(Found(str(path)).records())


@pytest.mark.parametrize("name", ["a.txt", "a.md", "README.md", "A.TXT"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_a_file_is_one_record_with_its_text(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(TEXT.replace("\n", "\r\n").encode(encoding))
    (one,) = records(path)
    assert (one.fields, one.origin) == ({"text": TEXT}, f"{path}:1")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert records(tmp_path / f"{name}.gz")[0].fields == {"text": TEXT}


def test_a_directory_of_texts_is_their_records_in_order(tmp_path):
    for name in ("b.txt", "a.md", "c/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text(" \n")
    found = Found(str(tmp_path))
    assert [one.fields["text"] for one in found.records()] == ["a.md", "b.txt", "c/d.txt"]
    assert found.notes() == {"empty": {"files": 1, "first": [str(tmp_path / "empty.txt")]}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\0b", "it holds a NUL byte"),
        ("月".encode() + b"ok\xff", "not UTF-8: byte 0xff at column 6"),
        (b"x" * 101, "a document of more than 100 characters"),
    ],
)
def test_what_is_no_document_is_one_bad_record(tmp_path, monkeypatch, content, problem):
    monkeypatch.setattr(document, "LONGEST", 100)
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"x" * 100)
    bad, good = records(tmp_path)
    assert isinstance(bad, BadRecord) and bad.problem.startswith(problem)
    assert good.fields == {"text": "x" * 100}
