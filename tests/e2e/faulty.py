"""launch/train.py in which one rank fails: `FAULT=PLACE:RANK:CALL:KIND python tests/e2e/faulty.py [arguments]`.

The function of PLACE fails on RANK at its CALL-th call, counted from 1, with one of KINDS. FAULT_STAMP names a file
that then holds the time, so that others can tell how long the end took.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

MESSAGE = "the pump is dry (水泵干了)"

PLACES = {
    "tokenising": "dsft.data.dataset:prepare",
    "building": "dsft.model.load:load_model",
    "step": "dsft.tasks.causal_lm:CausalLM.forward",
    "evaluation": "dsft.engine:Engine.evaluate",
    "sampling": "transformers:GenerationMixin.generate",
    "saving": "torch:save",
    "export": "dsft.engine:Engine.gathered",
    "logging": "dsft.tracking:Tracker.write",
}
"""Where a fault can be put: module and attribute of what fails."""


class Locked(Exception):
    """It does not pickle."""

    def __init__(self, message: str):
        super().__init__(message)
        self.lock = threading.Lock()


def _raising(make: Callable[[str], BaseException]) -> Callable[[], None]:
    def fail() -> None:
        raise make(MESSAGE)

    return fail


def _in_a_thread() -> None:
    threading.Thread(target=_raising(ValueError)).start()
    time.sleep(3600)


KINDS: dict[str, Callable[[], None]] = {
    "ValueError": _raising(ValueError),
    "KeyError": _raising(KeyError),
    "RuntimeError": _raising(RuntimeError),
    "MemoryError": _raising(MemoryError),
    "SystemExit": _raising(SystemExit),
    "unpicklable": _raising(Locked),
    "huge": _raising(lambda message: AssertionError("x" * 3_000_000 + message)),
    "several lines": _raising(lambda message: TypeError("first\n" * 30 + message)),
    "thread": _in_a_thread,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: ctypes.string_at(0),
}
"""How it fails."""


def _rank() -> int:
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def _inject(place: str, call: int, fail: Callable[[], None]) -> None:
    module, _, path = PLACES[place].partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            Path(os.environ["FAULT_STAMP"]).write_text(str(time.time()))
            fail()
        return original(*args, **kwargs)

    setattr(owner, name, failing)


if __name__ == "__main__":
    place, rank, call, kind = os.environ["FAULT"].split(":")
    if int(rank) == _rank():
        _inject(place, int(call), KINDS[kind])
    script = Path(__file__).parents[2] / "launch" / "train.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
