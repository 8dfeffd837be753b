"""A file's encoding is told as other programs tell it, and its text is theirs, whole or packed."""

import bz2
import gzip
import io
import lzma
import random
import subprocess

import pyarrow
import pytest

from dsft.data import text
from dsft.data.raw import Reading
from dsft.errors import UserError

CHINESE = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。① Hello, 世界! 𠮷野家 €5\n" * 20
PLAIN = "".join(f"line {n}: 月亮 {n * n}\n" for n in range(3000))


def read(path, reading=None):
    encoding = text.find_encoding(path, reading or Reading())
    with text.open_text(path, encoding, newline="") as file:
        return file.read()


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize(
    ("codec", "mark", "name"),
    [
        ("utf-8", b"", None),
        ("utf-8", b"\xef\xbb\xbf", None),
        ("utf-16-le", b"\xff\xfe", "UTF-16-LE"),
        ("utf-16-be", b"\xfe\xff", "UTF-16-BE"),
        ("gb18030", b"", "GB18030"),
        ("gb18030", b"\x84\x31\x95\x33", "GB18030"),
    ],
)
def test_each_encoding_is_found_out_and_named(tmp_path, monkeypatch, block, codec, mark, name):
    monkeypatch.setattr(text, "BLOCK", block)
    path, reading = tmp_path / "x.txt", Reading()
    path.write_bytes(mark + CHINESE.encode(codec))
    assert read(path, reading) == CHINESE
    assert reading.notes == ({f"decoded as {name}": {"files": 1, "first": [str(path)]}} if name else {})


@pytest.mark.parametrize("codec", ["gb2312", "gbk"])
@pytest.mark.parametrize("said", ["联通", "问,答\n你好,很好\n", "a" * 1000 + "月", "他说：“好。”"])
def test_older_chinese_encodings_and_short_texts(tmp_path, codec, said):
    """联通 in GBK is valid UTF-8 too, as is known of an old editor: what is UTF-8 as a whole is UTF-8."""
    path = tmp_path / "x.csv"
    path.write_bytes(said.encode(codec))
    try:
        expected = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        expected = said
    assert read(path) == expected


@pytest.mark.parametrize(
    "content",
    [
        "It’s a “quote” — and it’s fine… ".encode() * 50 + b"caf\xe9s" + "it’s ".encode(),
        "月亮".encode() * 50 + b"\xb0\xa1" + "月亮".encode(),
        "naïve cafés déjà vus, Ölgemälde, mañanas".encode("latin-1"),
        "naïves".encode("latin-1"),
        b"\x80\x81\xff" * 5,
    ],
)
def test_damaged_utf8_and_western_text_are_not_taken_for_chinese(tmp_path, content):
    """Most of these can be decoded as GB18030, and would come out as nonsense."""
    path, reading = tmp_path / "x.txt", Reading()
    path.write_bytes(content)
    assert read(path, reading) == content.decode("utf-8", "surrogateescape")
    assert not reading.notes
    assert text.find_encoding(path, reading).damaged


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    ("content", "at"),
    [
        (b"\xff\xfea\0b\0c", 6),
        (b"\xff\xfea\0\x00\xd8a\0", 4),
        (b"\x84\x31\x95\x33ab\xff", 6),
    ],
)
def test_text_that_is_not_what_its_mark_says_is_named_with_the_byte(tmp_path, monkeypatch, content, at, block):
    monkeypatch.setattr(text, "BLOCK", block)
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.txt: begins as .* text, and is none at byte {at}"):
        text.find_encoding(tmp_path / "x.txt", Reading())


def compressed(suffix, content):
    """By libraries; in the last one two streams follow one another, as `cat a.gz b.gz` makes them."""
    return {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
    }[suffix](content)


@pytest.mark.parametrize("suffix", text.PACKED)
@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "utf-16"])
def test_packed_text_of_any_encoding_is_read(tmp_path, suffix, codec):
    path = tmp_path / f"x.txt{suffix.upper()}"
    content = PLAIN.encode(codec)
    path.write_bytes(compressed(suffix, content[:70_000]) + compressed(suffix, content[70_000:]))
    assert read(path) == PLAIN
    assert text.no_text(path) is None
    assert text.format_of(path) == ".txt"


@pytest.mark.parametrize(("program", "suffix"), [("gzip", ".gz"), ("zstd", ".zst"), ("bzip2", ".bz2"), ("xz", ".xz")])
def test_the_programs_themselves_where_they_are_installed(tmp_path, program, suffix):
    try:
        done = subprocess.run([program, "-c"], input=PLAIN.encode(), capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip(f"no {program}")
    (tmp_path / f"x{suffix}").write_bytes(done.stdout)
    assert read(tmp_path / f"x{suffix}") == PLAIN


@pytest.mark.parametrize("suffix", text.PACKED)
def test_a_packed_file_that_is_not_whole_is_named(tmp_path, suffix):
    path = tmp_path / f"x.txt{suffix}"
    whole = compressed(suffix, random.Random(0).randbytes(50_000).hex().encode())
    for at in (len(whole) - 3, len(whole) // 2, 3):
        path.write_bytes(whole[:at])
        with pytest.raises(UserError, match=rf"x\.txt{suffix}: cannot be unpacked"):
            read(path)
    path.write_bytes(b"plain text, downloaded by a program that unpacks")
    assert text.no_text(path) == f"not compressed as its suffix {suffix} says: give it the suffix of what it is"
    path.write_bytes(b"")
    assert text.no_text(path) is None


def test_a_large_file_is_read_in_parts(tmp_path, monkeypatch):
    """No call reads more than a block: a file of any size takes the same memory."""
    asked = []

    class Watched(io.BytesIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

        def read1(self, size=-1):
            asked.append(size)
            return super().read1(size)

    monkeypatch.setattr(text, "_unpacked", lambda path: Watched((CHINESE * 500).encode("gb18030")))
    encoding = text.find_encoding(tmp_path / "x.txt", Reading())
    with text.open_text(tmp_path / "x.txt", encoding, newline="\n") as file:
        assert sum(1 for _ in file) == CHINESE.count("\n") * 500
    assert encoding.codec == "gb18030" and min(asked) >= 0 and max(asked) <= text.BLOCK
