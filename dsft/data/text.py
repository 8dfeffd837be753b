"""Text out of files: unpacked, in the encoding that it is in, a part at a time."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from dsft.data.raw import Reading
from dsft.errors import UserError
from dsft.runtime.content import HEAD, disguise, no_utf8

BLOCK = 1 << 20
"""Bytes that are decoded at a time."""

_BAD_BYTE = re.compile("[\udc80-\udcff]")
_ASCII = bytes(range(128))
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"\x84\x31\x95\x33": "gb18030",
}
"""Byte-order marks, and the encoding that each is of."""


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))


PACKED: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    ".gz": (gzip.GzipFile, b"\x1f\x8b"),
    ".zst": (_zstd, b"\x28\xb5\x2f\xfd"),
    ".bz2": (bz2.BZ2File, b"BZh"),
    ".xz": (lzma.LZMAFile, b"\xfd7zXZ"),
}
"""Suffix -> what opens such a file, and its first bytes."""


@dataclass(frozen=True)
class Encoding:
    """How a file's bytes are text.

    Attributes:
        codec: Python's name.
        mark: Bytes of the mark before the text.
        damaged: Whether some of it is no text. Such bytes come as U+DC80 to U+DCFF, which UTF-8 itself never gives.
    """

    codec: str
    mark: int = 0
    damaged: bool = False


def format_of(path: Path) -> str:
    """The suffix that names a file's format, in lower case, without that of its compression."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def no_text(path: Path) -> str | None:
    """What a file of text is instead of what its name says, and what to do; None if it may well be that."""
    if problem := disguise(path):
        return problem
    packed = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(HEAD)
    if packed in PACKED and head and not head.startswith(PACKED[packed][1]):
        return f"not compressed as its suffix {packed} says: give it the suffix of what it is"
    with whole(path), _unpacked(path) as file:
        head = file.read(HEAD)
    marked = head.startswith(tuple(_MARKS)) and head[2:4] != b"\0\0"  # UTF-32 has more zeros
    return None if marked else no_utf8(head)


@contextmanager
def open_text(path: Path, encoding: Encoding, newline: str | None) -> Iterator[TextIO]:
    """A file's text, from behind its byte-order mark.

    Args:
        path: A file, perhaps compressed.
        encoding: What `find_encoding` found.
        newline: As for `open`.

    Raises:
        UserError: It cannot be unpacked, as may show while it is read.
    """
    with whole(path), _unpacked(path) as file:
        file.read(encoding.mark)
        yield io.TextIOWrapper(file, encoding.codec, "surrogateescape" if encoding.damaged else "strict", newline)


def find_encoding(path: Path, reading: Reading) -> Encoding:
    """The encoding of a whole file, which is read through; noted if it is not UTF-8.

    That of its byte-order mark; else UTF-8, if it is that; else GB18030, if it is that and looks like it (nearly any
    bytes can be read as GB18030); else UTF-8 with damaged places.

    Raises:
        UserError: It cannot be unpacked; or it begins with the mark of UTF-16 or GB18030, and is no such text from
            some byte on.
    """
    with whole(path):
        found = _encoding(path)
    if found.codec != "utf-8":
        reading.note(f"decoded as {found.codec.upper()}", path)
    return found


def _encoding(path: Path) -> Encoding:
    with _unpacked(path) as file:
        head = file.read(4)
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    codec = _MARKS.get(mark, "utf-8")
    bad = _undecodable(path, codec, len(mark))
    if bad is None:
        return Encoding(codec, len(mark))
    if codec != "utf-8":
        raise UserError(f"{path}: begins as {codec.upper()} text, and is none at byte {bad}")
    return Encoding("gb18030") if not mark and _is_gb18030(path) else Encoding("utf-8", len(mark), damaged=True)


def bad_text(text: str, damaged: bool) -> str | None:
    """Says what of a text is none: a byte that is no UTF-8, or NUL.

    Args:
        text: What a damaged file may have given.
        damaged: Whether it is one.
    """
    if "\0" in text:
        return "it holds a NUL byte, so it is no text"
    return bad_byte(text, 0, len(text)) if damaged else None


def bad_byte(text: str, at: int, end: int) -> str | None:
    """Says which byte between two places of a damaged file's text is no UTF-8, and its column in bytes, from 1."""
    if not (found := _BAD_BYTE.search(text, at, end)):
        return None
    line = text.rfind("\n", 0, found.start()) + 1
    column = len(text[line : found.start()].encode("utf-8", "surrogateescape")) + 1
    return f"not UTF-8: byte {ord(found[0]) - 0xDC00:#04x} at column {column}"


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Names the file that cannot be unpacked.

    Raises:
        UserError: What is read inside is not whole, or is not compressed as its suffix says.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if path.suffix.lower() not in PACKED:
            raise
        raise UserError(f"{path}: cannot be unpacked: {error}. Download or copy it again") from error


def _unpacked(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked; a file without any is empty, whatever its suffix."""
    suffix = path.suffix.lower()
    return PACKED[suffix][0](path) if suffix in PACKED and path.stat().st_size else path.open("rb")


def _blocks(path: Path, skip: int = 0) -> Iterator[bytes]:
    with _unpacked(path) as file:
        file.read(skip)
        while block := file.read(BLOCK):
            yield block


def _undecodable(path: Path, codec: str, skip: int) -> int | None:
    """The first byte, counted from 0, from which the file is no text in this encoding; None if there is none."""
    decoder = codecs.getincrementaldecoder(codec)()
    at = skip
    pending = 0
    try:
        for block in _blocks(path, skip):
            decoder.decode(block)
            at += len(block)
            pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return at - pending + error.start
    return None


def _is_gb18030(path: Path) -> bool:
    """Whether a file without a mark that is not UTF-8 is Chinese text in GB18030 (or GBK, or GB2312), all of it.

    Other files may decode as that too, and come out as nonsense. UTF-8 with a damaged place: most of its bytes above
    ASCII are still UTF-8. Latin letters with accents: a character is an accented letter and the ASCII letter after it,
    where Chinese ones are mostly two bytes above ASCII.
    """
    decoder = codecs.getincrementaldecoder("gb18030")()
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    high = characters = valid = 0
    try:
        for block in _blocks(path):
            text, read = decoder.decode(block), utf8.decode(block)
            high += len(block.translate(None, _ASCII))
            characters += len(text) - len(text.encode("ascii", "ignore"))
            valid += len(read.encode().translate(None, _ASCII))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return 2 * valid <= high and 2 * high >= 3 * characters
