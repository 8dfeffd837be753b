"""What a file is, by its first bytes: files are often not what their names say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ANNEX = "/annex/objects/"
HEAD = 512
"""Bytes that are looked at."""

PAGE = re.compile(rb"<!doctype html|<\?xml|<html\s+[^\s<]|<html>[^\S\n]*\S|<html>.*<title>[^\S\n]*[^\s<]", re.DOTALL)
"""How web pages begin; a list with an HTML tag per line, as of tokens, is none."""

_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_ARCHIVES = {b"\x1f\x8b": ("gzip", "gunzip"), b"PK\x03\x04": ("zip", "unzip"), b"BZh": ("bzip2", "bunzip2"),
             b"\xfd7zXZ": ("xz", "unxz"), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd")}  # fmt: skip


def disguise(path: Path, text: bool = False) -> str | None:
    """What a file is instead of what its name says, and what to do; None if it may well be that.

    Args:
        path: A file, or a link to one that is not there.
        text: Whether the file is to hold text.
    """
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        if ANNEX in target:
            return "a git-annex link whose content is not here: run `git annex get` on it"
        return f"a link to {target}, which is not there: fetch that file"
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except PermissionError:
        return "a file that this user may not read: change its permissions"
    if head.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
    if head.startswith(ANNEX.encode()):
        return "a git-annex pointer, not the file itself: run `git annex get` on it"
    plain = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if PAGE.match(plain):
        return "a web page, such as a server's error message, saved under this name: download the file again"
    return no_utf8(head) if text else None


def unsound_weights(path: Path) -> str | None:
    """What is wrong with a file of weights, as far as can be told without reading it whole."""
    if problem := disguise(path):
        return problem
    size = path.stat().st_size
    if size == 0:
        return "empty: download or copy it again"
    if path.suffix == ".safetensors":
        return _unsound_safetensors(path, size)
    if path.suffix == ".bin":
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02"):
                return "no file that torch.save wrote: download or copy it again"
    return None


def _unsound_safetensors(path: Path, size: int) -> str | None:
    """The file says itself how long it is: 8 bytes, a header of that many bytes, and the tensors that it lists."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > 100_000_000:
            return "no safetensors file: download or copy it again"
        header = file.read(length)
    try:
        tensors = [about for name, about in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + length + max((about["data_offsets"][1] for about in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        cut = size < 8 + length
        return f"{'cut off in its header' if cut else 'no safetensors file'}: download or copy it again"
    if size != whole:
        return f"{size:,} bytes long, and its header says {whole:,}: download or copy it again"
    return None


def no_utf8(head: bytes) -> str | None:
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return f"{name} text, not UTF-8: convert it, with `iconv -f {name} -t UTF-8` for example"
    if (zeros := [not byte for byte in head[:4]]) in ([False, True] * 2, [True, False] * 2):
        name = "UTF-16BE" if zeros[0] else "UTF-16LE"
        return f"{name} text, not UTF-8: convert it, with `iconv -f {name} -t UTF-8` for example"
    if head.startswith(b"PAR1"):
        return "a Parquet file, not text: call it .parquet"
    for magic, (name, program) in _ARCHIVES.items():
        if head.startswith(magic):
            return f"compressed ({name}): unpack it first, with `{program}` for example"
    return None
