"""Real ranks over gloo that stay up for the whole test session.

Starting ranks costs many seconds, a case inside a running world about one. A case is a function
`case(world, **arguments)` of `cases.py`; every rank runs it and every rank's result comes back.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Pool:
    """A world of `size` processes.

    Args:
        size: How many ranks.
    """

    def __init__(self, size: int):
        from dsft.runtime.place import free_port

        context = multiprocessing.get_context("spawn")
        self._stacks = [Path(tempfile.mkstemp(suffix=f"-rank{rank}.stack")[1]) for rank in range(size)]
        self._pipes, self._processes = [], []
        port = free_port()
        for rank, stack in enumerate(self._stacks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, size, port, theirs, str(stack)), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable, seconds: float = 120, **arguments: Any) -> list[Any]:
        """Run `case(world, **arguments)` on every rank.

        Returns:
            What each rank returned, in the order of ranks.

        Raises:
            AssertionError: A rank failed, with its traceback; or did not finish, with every rank's stack.
        """
        for pipe in self._pipes:
            pipe.send((case, arguments))
        deadline = time.monotonic() + seconds
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                stacks = self._dump()
                self.close()
                raise AssertionError(f"rank {rank} did not finish within {seconds} s\n{stacks}")
            ok, value = pipe.recv()
            (results if ok else failures).append(value if ok else f"rank {rank}:\n{value}")
        if failures:
            self.close()  # ranks may have parted in the middle of a collective
            raise AssertionError("\n".join(failures))
        return results

    @property
    def alive(self) -> bool:
        """Whether the ranks can take another case."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End all ranks."""
        for process in self._processes:
            process.kill()
            process.join()
        for stack in self._stacks:
            stack.unlink(missing_ok=True)

    def _dump(self) -> str:
        for process in self._processes:
            os.kill(process.pid, signal.SIGUSR2)
        time.sleep(1)
        return "\n".join(f"--- rank {rank}\n{stack.read_text()}" for rank, stack in enumerate(self._stacks))


def _rank(rank: int, size: int, port: int, pipe, stack: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Muon would be compiled for a minute
    file = Path(stack).open("w")  # noqa: SIM115 - lives as long as the process
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    import torch
    import toy
    from deepspeed.accelerator import get_accelerator

    from dsft.runtime.place import Place
    from dsft.runtime.world import join
    from dsft.tasks import TASKS

    TASKS["toy"] = toy.TASK  # here alone: whoever counts the tasks there are counts without it
    torch.set_num_threads(1)
    world = join(Place(rank, rank, size, "127.0.0.1", port, "environment"))
    # torch computes fp16 on every CPU, if slowly; DeepSpeed wants one that is built for it
    get_accelerator().is_fp16_supported = lambda: True
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, case(world, **arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
