"""The process group and every collective of the project.

Collectives move small host values (a few numbers, a string); gradients and weights are DeepSpeed's business.
"""

from __future__ import annotations

import itertools
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from dsft.errors import UserError
from dsft.runtime.failure import PeerFailed
from dsft.runtime.failure_hub import describe as describe_error
from dsft.runtime.place import Place, port_taken

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the slowest rank: as long as saving or evaluating may keep one busy."""


_MEETINGS = itertools.count()
"""Numbers the exchanges of a process, which all ranks go through in the same order."""


SHOWN = 32
"""Characters of the longest value that ranks disagree on and a message shows."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them.

    Attributes:
        place: This rank's place.
        device: The device that this rank computes on.
    """

    place: Place
    device: torch.device

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.world_size

    @property
    def is_main(self) -> bool:
        return self.place.rank == 0

    @property
    def store(self) -> torch._C._distributed_c10d.Store:
        """Where ranks met: texts by key, that any of them can write and read."""
        return dist.distributed_c10d._get_default_store()

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's row of numbers, in the order of ranks; float64, so that counts stay exact."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; anything that pickles."""
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Rank 0's result of `make`, on every rank; its failure is everyone's, so that nobody waits for rank 0."""
        made = failure = None
        if self.is_main:
            try:
                made = make()
            except Exception as problem:
                failure = problem
        self.all_succeed(failure)
        return self.broadcast(made)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def exchange(self, message: str, seconds: float | None = None) -> list[str]:
        """Every rank's message, in the order of ranks, by way of the store at which ranks met and not a collective.

        Args:
            message: This rank's.
            seconds: How long to wait for the others; as long as for a collective if not given.

        Raises:
            TimeoutError: Some rank said nothing in time.
        """
        store, meeting = self.store, next(_MEETINGS)
        keys = [f"dsft/{meeting}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], message)
        try:
            store.wait(keys, TIMEOUT if seconds is None else timedelta(seconds=seconds))
        except RuntimeError as silence:
            raise TimeoutError(f"a rank said nothing for {seconds or TIMEOUT.total_seconds():.0f} s") from silence
        return [store.get(key).decode() for key in keys]

    def agree(self, what: str, value: str) -> None:
        """Make sure that every rank has the same value.

        Args:
            what: What it is, with the setting that decides it.
            value: Any text; shown where it is short, and not where it is a digest.

        Raises:
            UserError: Some rank differs; the message names what, which and where.
        """
        everyone = self.gather_objects((value, socket.gethostname()))
        for rank, (theirs, host) in enumerate(everyone):
            if theirs != everyone[0][0]:
                first, main_host = everyone[0]
                shown = f" ({first} and {theirs})" if max(len(first), len(theirs)) <= SHOWN else ""
                raise UserError(
                    f"{what} differs between rank 0 on {main_host} and rank {rank} on {host}{shown}. Give every rank "
                    "the same settings, and every host the same files."
                )

    def all_succeed(self, failure: Exception | None) -> None:
        """Turn one rank's failure into every rank's, so that nobody waits for a rank that has given up.

        Raises:
            UserError: The first one that any rank passed in, on all ranks.
            Exception: On a rank that passed in another exception, that one.
            PeerFailed: On the other ranks then.
        """
        explained = isinstance(failure, UserError)
        said = None if failure is None else (explained, str(failure) if explained else describe_error(failure))
        everyone = self.gather_objects(said)
        if failure is not None and not explained:
            raise failure
        for rank, theirs in enumerate(everyone):
            if theirs:
                explained, message = theirs
                raise (UserError if explained else PeerFailed)(f"rank {rank}: {message}")


def join(place: Place, timeout: timedelta = TIMEOUT) -> World:
    """Join the process group: NCCL on CUDA devices, gloo on CPUs.

    Raises:
        UserError: There are more ranks on this host than devices, or the port on which they meet is in use.
    """
    place.export()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        visible = torch.cuda.device_count()
        if visible > 1 and place.local_rank >= visible:
            raise UserError(f"local rank {place.local_rank} has no GPU: {visible} are visible. Start fewer ranks.")
        # a scheduler may show each task only its own GPU, which is then number 0 for all of them
        device = torch.device("cuda", place.local_rank if visible > 1 else 0)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # ranks that each take all cores only get into each other's way
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))
        # serves DeepSpeed's inference only, and would be compiled for a minute first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout
        )
    except dist.DistNetworkError as problem:  # a world of one meets here first
        if "EADDRINUSE" not in str(problem):
            raise
        raise UserError(port_taken(place)) from None
    return World(place, device)


def leave() -> None:
    """Leave the process group, if there is one; another can be joined after it."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


def describe(world: World) -> dict[str, Any]:
    """What a result may depend on: hosts, devices and the world's shape."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "world_size": world.size,
        "launcher": world.place.launcher,
        "hosts": sorted(set(world.gather_objects(socket.gethostname()))),
        "device": f"{world.device.type}: {name}",
        "threads_per_rank": torch.get_num_threads(),
    }


def computes_bf16() -> bool:
    """Whether the hardware has bf16 arithmetic, so that bf16 is fast and not emulated."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def computes_fp16() -> bool:
    """Whether DeepSpeed can train in fp16 here: any GPU, and CPUs with fp16 arithmetic."""
    return get_accelerator().is_fp16_supported()


def peak_memory(device: torch.device) -> int:
    """Most memory this rank has held, in bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
