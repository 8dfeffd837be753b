"""Real commands in processes of their own: started, watched, stopped and cleared away.

Ranks are forked from a server that has done the imports; `fresh=True` and `run` start new interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from forkserver import Server

from dsft.runtime.place import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 180
"""Hard limit of one command; a fresh start takes 8 s alone and 15 s with two ranks where nobody else is at work."""


@dataclass
class Result:
    """How a command ended.

    Attributes:
        code: Exit code; negative where a signal ended it.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
    """

    code: int
    out: str
    err: str


class Command:
    """A command in a session of its own, so that whatever it starts can be found and ended.

    Args:
        command: Program and arguments.
        scratch: Existing directory for temporary files and output.
        forked: How many ranks are forked to run `command`, a Python file and its arguments; None starts a program.
        cwd: Where it is started.
    """

    def __init__(self, command: list[str], scratch: Path, forked: int | None = None, cwd: Path = ROOT):
        command = [str(part) for part in command]
        self._number = len(list(scratch.glob("*.err")))
        self._files = [scratch / f"{self._number}.{kind}" for kind in ("out", "err")]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR")}
        env |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "PYTHONFAULTHANDLER": "1", "WANDB_MODE": "offline"}
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            if forked is None:
                self.popen = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err, start_new_session=True)
            else:
                self.popen = server().start(command, forked, free_port(), cwd, env, out, err)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return self._files[1].read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = SECONDS) -> Result:
        """Wait for the end.

        Raises:
            AssertionError: It did not end in time; the message holds every process's stack.
        """
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self._fail(f"did not end within {seconds} s")
        return Result(code, self._files[0].read_text(encoding="utf-8", errors="replace"), self.err)

    def until(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Look every millisecond until `condition` holds.

        Raises:
            AssertionError: It did not, in time or before the command ended.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if self.popen.poll() is not None:
                raise AssertionError(f"{self.popen.args} ended with {self.popen.returncode} too soon\n{self.err}")
            if time.monotonic() > deadline:
                self._fail(f"showed nothing of what was waited for within {seconds} s")
            time.sleep(0.001)

    def ranks(self) -> list[psutil.Process]:
        """The training processes that are alive, in the order of ranks."""
        found = {}
        forked = getattr(self.popen, "ranks", ())
        for process in self._processes():
            if process.pid in forked:
                found[forked.index(process.pid)] = process
            arguments = process.cmdline()
            local = [a for a in arguments if a.startswith("--local_rank=")]
            if local and "deepspeed.launcher.launch" not in arguments:
                found[int(local[0].partition("=")[2])] = process
        return [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """SIGKILL to all of it at once; what has moved to another process group of the session follows.

        Returns when all are gone, and their locks with them.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        while left := self._processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.01)
        self.popen.wait()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == self.popen.pid:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def _fail(self, why: str) -> None:
        for process in self._processes():
            process.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
        time.sleep(2)
        self.kill()
        raise AssertionError(f"{self.popen.args} {why}\n{self.err[-20_000:]}")


@functools.cache
def server() -> Server:
    """The session's fork server, started when it is first wanted."""
    made = Server()
    atexit.register(made.close)
    return made


def start(arguments: list[str], scratch: Path, ranks: int = 2, fresh: bool = False) -> Command:
    """Start training.

    Args:
        arguments: Of `launch/train.py`.
        scratch: As in Command.
        ranks: How many.
        fresh: Whether in new interpreters under `deepspeed`, or with `ranks=1` under no launcher at all.
    """
    script = ["launch/train.py", *arguments]
    if not fresh:
        return Command(script, scratch, forked=ranks)
    launcher = [BIN / "deepspeed", "--num_accelerators", ranks, "--master_port", free_port()]
    return Command([*(launcher if ranks > 1 else [sys.executable]), *script], scratch)


def run(command: list[str], scratch: Path, seconds: float = SECONDS) -> Result:
    """Any command from beginning to end."""
    with Command(command, scratch) as running:
        return running.wait(seconds)


def train(arguments: list[str], scratch: Path, ranks: int = 2, seconds: float = SECONDS, fresh: bool = False) -> Result:
    """`start`, to its end."""
    with start(arguments, scratch, ranks, fresh) as running:
        return running.wait(seconds)


def script(command: list[str], scratch: Path, seconds: float = SECONDS, cwd: Path = ROOT) -> Result:
    """A Python file with its arguments in one forked process, to its end."""
    with Command(command, scratch, forked=1, cwd=cwd) as running:
        return running.wait(seconds)


def rows(run_dir: Path) -> list[dict]:
    """The whole rows of `metrics.jsonl`, as far as they are written."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def reached(run_dir: Path, step: int) -> Callable[[], bool]:
    """A condition: `metrics.jsonl` shows training's step or a later one."""
    return lambda: any(row["step"] >= step and "train/loss" in row for row in rows(run_dir))


def numbers(run_dir: Path) -> list[dict]:
    """The rows without what differs between two runs on the same machine: time and memory."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows(run_dir)]
