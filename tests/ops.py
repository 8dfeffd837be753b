"""DeepSpeed's optimizers in C++: each is compiled for a minute where that was never done, so it begins early."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

BUILDERS = ("CPUAdamBuilder", "CPULionBuilder")
SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # torch then removes its lock, for which others would wait
os.nice(5)  # other tests come first, but some wait for this
from deepspeed.ops import op_builder
for name in sys.argv[1:]:
    getattr(op_builder, name)().load()
"""


class Compilation:
    """The compilation, in a process of its own; a moment's work where it was done before."""

    def __init__(self):
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, "-c", SCRIPT, *BUILDERS]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, start_new_session=True
        )

    def wait(self, seconds: float = 500) -> None:
        """Wait until all are compiled.

        Raises:
            AssertionError: They cannot be; the message holds the compiler's.
        """
        if self._process.wait(seconds):
            self._output.seek(0)
            raise AssertionError(self._output.read().decode(errors="replace"))

    def stop(self) -> None:
        """Give up what has not ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(60)
        self._output.close()
