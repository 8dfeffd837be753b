"""Files that are whole under their final name, whatever stops the process or fills the disk."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import xxhash


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: a reader finds the old file or the new one, never a part.

    The bytes go to a temporary file beside `path`, reach the disk, and take the name over. If any of this fails
    (a full disk, say) the old file stays as it was and the temporary file is taken away.

    Args:
        path: Its directory exists, and one process at a time writes it.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text; a lone surrogate, which UTF-8 cannot hold, is written as its escape `\\udXXX`."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON with its text unescaped.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
        TypeError: A value is of no JSON type.
    """
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    # Some network file systems refuse to sync a directory; the rename has happened all the same.
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def describe(path: Path) -> list[Any]:
    """Path, size, times and inode of a file; no program can write into it and leave all of these as they were."""
    about = path.stat()
    return [str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def hash_file(hasher: xxhash.xxh3_128, path: Path) -> None:
    """Go on hashing with a file's content, of which a few MiB at a time are in memory."""
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
