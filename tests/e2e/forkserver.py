"""A process that has imported what training needs and forks ranks on demand: they start in milliseconds.

Importing torch, DeepSpeed and the rest takes seconds of each rank, and a test of a stopped run starts ranks several
times. Forked ranks are processes like any others: with a session, signals, limits and files of their own. Only their
imports are shared, and with them the seed of their hashes; so some tests go on starting fresh interpreters, through
`deepspeed`, `torchrun`, `mpirun` and alone.

Nothing here ends the peers of a dead rank, as some launchers do: a run has to see to that itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

IMPORTED = (
    "dsft.commands.train",
    "dsft.commands.export",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles at its import, and so imports all of inductor
    "matplotlib.backends.backend_svg",
)


class Server:
    """The server, seen from the tests. It ends when this side's socket is closed, by whatever; so do its ranks.

    Args:
        imported: Modules that no rank has to import again.
    """

    def __init__(self, imported: tuple[str, ...] = IMPORTED):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *imported],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            )

    def start(self, command: list[str], ranks: int, port: int, cwd: Path, env: dict, out: IO, err: IO) -> Forked:
        """Fork ranks that run a script, in a session of their own.

        Args:
            command: Path of a Python file and its arguments.
            ranks: How many; one alone finds no rank in its environment.
            port: Where ranks meet.
            cwd: Their directory.
            env: Their environment. What is read when modules are imported is as the server found it.
            out: File for their stdout.
            err: File for their stderr.

        Raises:
            AssertionError: The server is gone; the message holds what it wrote.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job = {"command": command, "ranks": ranks, "port": port, "cwd": str(cwd), "env": env}
        with theirs, contextlib.suppress(BrokenPipeError):
            files = [out.fileno(), err.fileno(), theirs.fileno()]
            socket.send_fds(self._socket, [json.dumps(job).encode()], files)
        pids = ours.recv(4096)
        if not pids:
            self._errors.seek(0)
            raise AssertionError(f"the fork server has ended:\n{self._errors.read().decode(errors='replace')}")
        return Forked(command, ours, *json.loads(pids))

    def close(self) -> None:
        """End the server."""
        self._socket.close()
        self._process.wait(30)
        self._errors.close()


class Forked:
    """As much of `subprocess.Popen` as the tests use, for ranks and the process that waits for them.

    Attributes:
        pid: The waiting process, leader of the session.
        ranks: Process ids in the order of ranks.
        returncode: The first that was not 0 of any rank; None as long as one is running.
    """

    def __init__(self, args: list[str], status: socket.socket, pid: int, *ranks: int):
        self.args, self._status, self.pid, self.ranks, self.returncode = args, status, pid, ranks, None

    def poll(self) -> int | None:
        """The exit code, if all have ended."""
        self._look(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when all have ended.

        Raises:
            subprocess.TimeoutExpired: Some have not.
        """
        self._look(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _look(self, timeout: float | None) -> None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            said = self._status.recv(64)
            self.returncode = int(said) if said else -signal.SIGKILL
            self._status.close()


def serve(requests: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request; returns in the child alone, with the job and its files."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            return json.loads(message), files
        for file in files:
            os.close(file)


def split(job: dict, files: list[int]) -> None:
    """Become the session of a job and fork its ranks; returns in the ranks alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, file in enumerate(files[:2], start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    for name in set(INHERITED) - set(job["env"]):
        os.environ.pop(name, None)
    os.environ.update(job["env"])
    status = socket.socket(fileno=files[2])
    running = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            status.close()
            return become(rank, job)
        running.append(pid)
    status.send(json.dumps([os.getpid(), *running]).encode())
    watch(running, status)


def watch(running: list[int], status: socket.socket) -> None:
    """Wait for all ranks and tell the first bad end; end them if nobody is left to be told."""
    first = 0
    while running:
        if select.select([status], [], [], 0.01)[0]:
            os.killpg(0, signal.SIGKILL)
        for pid in list(running):
            ended, how = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                first = first or os.waitstatus_to_exitcode(how)
    status.send(str(first).encode())
    os._exit(0)


def become(rank: int, job: dict) -> None:
    """Take what a fresh interpreter would have: its place in the world, its arguments, its own random numbers."""
    if job["ranks"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_SIZE": job["ranks"]}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = job["command"]
    sys.path[0] = str(Path(job["command"][0]).absolute().parent)
    tempfile.tempdir = None
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


if __name__ == "__main__":
    INHERITED = dict(os.environ)
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    job, files = serve(socket.socket(fileno=int(sys.argv[1])))
    split(job, files)
    runpy.run_path(job["command"][0], run_name="__main__")
