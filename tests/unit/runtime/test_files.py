"""Files that are whole under their final name."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from contextlib import contextmanager

import pytest

from dsft.runtime.files import write_bytes, write_json, write_text


@contextmanager
def largest_file(size: int):
    """Let the operating system refuse every byte of a file beyond `size`, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_text_is_utf8_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old and longer")
    write_text(path, "新\n")
    assert path.read_bytes() == "新\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_is_unescaped_and_strict(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"名": [1, None, 2.5]})
    assert path.read_text(encoding="utf-8") == '{\n  "名": [\n    1,\n    null,\n    2.5\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"名": [1, None, 2.5]}


def test_half_a_surrogate_pair_survives_json(tmp_path):
    """A record may hold one: JSON can escape it, UTF-8 cannot encode it."""
    write_json(tmp_path / "a.json", {"text": "cut \ud83d here"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"text": "cut \ud83d here"}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with largest_file(1000), pytest.raises(OSError, match="too large"):
        write_bytes(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path):
    """Others who may read the directory may read the file: `tempfile` would have made it private."""
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
