"""Being asked to stop: a signal sets a flag, and the loop acts on it between two steps."""

from __future__ import annotations

import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""TERM from schedulers and launchers, USR1 from Slurm's `--signal`, INT from a keyboard."""

REQUEUE_CODE = 85
"""Exit code of a run that saved and stopped because it was asked to: start it again and it goes on."""


class StopRequest:
    """A flag that the stop signals raise. A second SIGINT ends the process at once, as people expect."""

    def __init__(self):
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received:
            signal.default_int_handler(number, _frame)
        self.received = signal.Signals(number).name


def exit_when_terminated() -> None:
    """Let SIGTERM end the process in an orderly way, so that what it holds is given back; for before a StopRequest."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
