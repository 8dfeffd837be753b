"""A directory that one process at a time works in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from dsft.errors import UserError
from dsft.runtime.failure import given_back

LOCK = ".lock"


@contextmanager
def hold(directory: Path, name: str = "run_dir") -> Iterator[None]:
    """Hold a directory for this process alone, and leave it as if it had never been held; messages call it `name`.

    The directory is made where it is missing. On leaving, the lock file and whatever was made goes away again, unless
    something has been put into it meanwhile.

    Raises:
        UserError: Another run holds it, or it cannot be written to.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]  # innermost first
    file = directory / LOCK
    lock = filelock.FileLock(file, timeout=0, thread_local=False)
    left_by_a_kill = file.exists()

    def leave() -> None:
        if lock.is_locked:
            if not left_by_a_kill:
                file.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile finds it gone, and retries
            lock.release()
        for path in made:
            with suppress(OSError):
                path.rmdir()

    with given_back(leave):
        with _wording(directory, name):
            directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        yield


@contextmanager
def _wording(directory: Path, name: str) -> Iterator[None]:
    try:
        yield
    except filelock.Timeout:
        raise UserError(f"another run is using {name}={directory}; wait for it, or choose another {name}") from None
    except NotImplementedError:
        raise UserError(f"{name}={directory} is on a file system without locks; choose another place") from None
    except OSError as problem:
        raise UserError(f"{name}={directory} cannot be written to: {problem.strerror}") from None
