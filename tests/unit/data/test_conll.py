"""Words in columns."""

import pytest

from dsft.data.raw import BadRecord
from dsft.data.sources import Found


def read(tmp_path, text: str, name: str = "x.conll", encoding: str = "utf-8"):
    (tmp_path / name).write_bytes(text.encode(encoding))
    return list(Found(str(tmp_path / name)).records())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_sentences_are_records(tmp_path, end, encoding):
    lines = ["-DOCSTART-\tO", "", "月亮\tB-天体", "在\tO", "山上\tB-LOC", "", "", "#moon\tO", "!\tO"]
    found = read(tmp_path, end.join(lines), encoding=encoding)
    assert [row.fields for row in found] == [
        {"tokens": ["月亮", "在", "山上"], "tags": ["B-天体", "O", "B-LOC"]},
        {"tokens": ["#moon", "!"], "tags": ["O", "O"]},
    ]
    assert [row.origin.rpartition(":")[2] for row in found] == ["3", "8"]


def test_columns_by_spaces_with_what_stands_between(tmp_path):
    text = "# sent_id = 12\n#\nEU NNP I-NP B-ORG\n# . O O\nrejects VBZ I-VP O\n"
    (found,) = read(tmp_path, text, "x.bio")
    assert found.fields == {"tokens": ["EU", "#", "rejects"], "tags": ["B-ORG", "O", "O"]}
    assert found.origin.endswith(":3")


@pytest.mark.parametrize(
    ("text", "line"), [("a\tO\nb\n", 2), ("a\tO\nb\tx\tO\n", 2), ("a\n", 1), ("\n\na\tO\nb\t \n", 4)]
)
def test_a_bad_line_is_named_and_its_sentence_left_out(tmp_path, text, line):
    (bad, good) = read(tmp_path, text + "\ngood\tO\n")
    assert isinstance(bad, BadRecord) and bad.origin.endswith(f"x.conll:{line}")
    assert good.fields == {"tokens": ["good"], "tags": ["O"]}


def test_an_empty_file_has_no_records(tmp_path):
    assert read(tmp_path, "\n\n") == []
