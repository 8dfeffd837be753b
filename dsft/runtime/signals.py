"""Being asked to stop: a signal sets a flag, and the loop acts on it between two steps."""

from __future__ import annotations

import itertools
import signal
import sys
from types import FrameType

from dsft.runtime.world import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""TERM from schedulers and launchers, USR1 from Slurm's `--signal`, INT from a keyboard."""

REQUEUE_CODE = 85
"""Exit code of a run that saved and stopped because it was asked to: start it again and it goes on."""


class StopRequest:
    """A flag that the stop signals raise. A second SIGINT ends the process at once, as people expect."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            signal.default_int_handler(number, _frame)
        self.received = signal.Signals(number).name


class StopTogether:
    """How all ranks stop after the same step, though only some were asked to, and at different times.

    A rank that was asked writes into the store at which ranks met, and every rank looks there after each step: no
    collective, nothing on the device. What is written is the step after the one that this rank has just done. No other
    rank can have done that step yet: its gradient is the sum of all ranks' gradients, and DeepSpeed (or
    `Engine._update_plain`) looks at its norm before a step is over, while this rank has not begun it. So whoever does
    it looks after it was written. The first to write decides; two ranks that are asked at once write the same step, or
    one reads what the other wrote.

    Args:
        request: This rank's.
        world: The ranks; alone, a rank stops at once.
    """

    _runs = itertools.count()

    def __init__(self, request: StopRequest, world: World):
        self._request, self._world = request, world
        self._key = f"dsft/stop/{next(self._runs)}"  # the runs of a process are the same on all ranks

    def after(self, step: int) -> str | None:
        """The signal for which all ranks stop after `step`, which this one has just done, or None; by the store."""
        asked = self._request.received
        if self._world.size == 1:
            return asked
        store = self._world.store
        if not store.check([self._key]):
            if asked is None:
                return None
            store.compare_set(self._key, "", f"{step + 1} {asked}")
        last, name = store.get(self._key).decode().split()
        return name if step >= int(last) else None

    def now(self) -> str | None:
        """The signal for which some rank was asked to stop, or None; a collective, for where all ranks meet anyway."""
        names = [number.name for number in STOP_SIGNALS]
        asked = self._request.received
        ranks = self._world.gather([0 if asked is None else 1 + names.index(asked)])
        return next((names[int(code) - 1] for (code,) in ranks if code), None)


def exit_when_terminated() -> None:
    """Let SIGTERM end the process in an orderly way, so that what it holds is given back; for before a StopRequest."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
