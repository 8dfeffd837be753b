"""What every rank of a host needs to know and one of them can find out, before any process group exists."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from dsft.runtime.files import write_json

BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESS = Path("/proc/self/stat")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def once_per_host(file: Path, state: Callable[[], Any], find_out: Callable[[], Any]) -> Any:
    """What `find_out` gives, found out by one process of this host while the others wait at a lock and take its answer.

    An answer is taken only if the work on it began after this process did, on this boot of this host, and `state` has
    stayed as it was. So it is worth as much as this process's own: every start of a command finds out anew, and what
    went wrong with a file meanwhile, even without a trace in its times, is seen by the first rank to look.

    Args:
        file: Where the answer is left for the others; hosts and users that share the directory each have their own.
        state: What the answer holds for, in JSON types: sizes, times and inodes of files. It must be cheap.
        find_out: Gives the answer, in JSON types.

    Returns:
        The answer. Where `file` or its lock cannot be written, every process finds out by itself.
    """
    file = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getuid()}.json")
    with _locked(file) as locked:
        before = state()
        if locked and (kept := _read(file, before)) is not None:
            return kept[0]
        since = _now()
        answer = find_out()
        if locked and state() == before:
            # without the note, the others find out by themselves
            with contextlib.suppress(OSError):
                write_json(file, {"boot": _boot(), "since": since, "state": before, "answer": answer})
        return answer


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Hold the lock of `file`; False where there can be none, as in a directory that others may only read."""
    lock = FileLock(f"{file}.lock", thread_local=False)
    with contextlib.suppress(NotImplementedError):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as problem:
            if problem.errno not in UNWRITABLE:
                raise
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _read(file: Path, state: Any) -> list[Any] | None:
    """The answer in a list of its own, since it may be None; None if there is no answer to trust."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        trusted = note["boot"] == _boot() and note["since"] >= _started() and note["state"] == state
        return [note["answer"]] if trusted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _boot() -> str:
    return BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""


def _now() -> float:
    """Seconds since this host was booted; nobody can set this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else 0.0


def _started() -> float:
    """When this process began, by the same clock; infinity, so that no answer is trusted, where nothing says it."""
    try:
        fields = PROCESS.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return (int(fields[19]) + 1) / os.sysconf("SC_CLK_TCK") if _boot() else math.inf
    except OSError:
        return math.inf
