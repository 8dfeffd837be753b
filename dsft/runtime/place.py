"""Where this process stands among the ranks, found out from whichever launcher started it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from dsft.errors import UserError


@dataclass(frozen=True)
class Place:
    """This process's place in the world.

    Attributes:
        rank: 0 to world_size - 1.
        local_rank: Number among the ranks of this host.
        world_size: How many ranks there are.
        master_addr: Host of rank 0.
        master_port: Port on which ranks meet.
        launcher: Who said so: `environment`, `slurm`, `mpi` or `single`.
        local_size: How many ranks this host has, as far as the launcher says.
    """

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    launcher: str
    local_size: int = 1

    def export(self) -> None:
        """Put the place into the environment, where torch and DeepSpeed look for it."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def discover(env: Mapping[str, str] = os.environ) -> Place:
    """Find this process's place: the environment of `deepspeed` or torchrun, then Slurm, then MPI, else alone.

    Raises:
        UserError: The launcher's variables contradict each other.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_environment(env)
    # a batch script itself also has SLURM_PROCID=0; only a task started by srun has a step
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _from_slurm(env)
    if any(key in env for key in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        return _from_mpi(env)
    return Place(0, 0, 1, "127.0.0.1", free_port(), "single")


def _from_environment(env: Mapping[str, str]) -> Place:
    missing = [key for key in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in env]
    if missing and int(env["WORLD_SIZE"]) > 1:
        raise UserError(
            f"RANK and WORLD_SIZE are set but {', '.join(missing)} is not. Start through `deepspeed launch/train.py`, "
            "torchrun, srun or mpirun, or unset RANK and WORLD_SIZE to run alone."
        )
    return Place(
        int(env["RANK"]),
        int(env.get("LOCAL_RANK", 0)),
        int(env["WORLD_SIZE"]),
        env.get("MASTER_ADDR", "127.0.0.1"),
        int(env.get("MASTER_PORT") or free_port()),
        "environment",
        int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or 1),
    )


def _from_slurm(env: Mapping[str, str]) -> Place:
    if "MASTER_ADDR" in env:
        master = env["MASTER_ADDR"]
    else:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        master = listing.stdout.split()[0]
    # every task computes the same port, and two jobs on one host rarely the same one
    port = int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)
    return Place(
        int(env["SLURM_PROCID"]),
        int(env["SLURM_LOCALID"]),
        int(env["SLURM_STEP_NUM_TASKS"]),
        master,
        port,
        "slurm",
        # "4(x2),3" for two nodes of 4 tasks and one of 3
        max(int(part.split("(")[0]) for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")),
    )


def _from_mpi(env: Mapping[str, str]) -> Place:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    size = world.Get_size()
    said = int(env.get("OMPI_COMM_WORLD_SIZE") or env.get("PMI_SIZE") or size)
    if size == 1 and said > 1:
        raise UserError(
            f"The launcher started {said} ranks but MPI sees a world of one: mpi4py was built for another MPI than "
            "the mpirun that was used. Install mpi4py with the cluster's MPI, or start with `deepspeed` or torchrun."
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    host, port = world.bcast((socket.gethostname(), free_port()) if world.Get_rank() == 0 else None)
    return Place(world.Get_rank(), local.Get_rank(), size, host, port, "mpi", local.Get_size())


def port_taken(place: Place, env: Mapping[str, str] = os.environ) -> str:
    """What to do where another program holds the port on which ranks meet, in the words of the launcher."""
    port = free_port()
    if place.launcher in ("mpi", "single"):
        change = "start it again, for a free port is chosen at each start"
    elif "TORCHELASTIC_RUN_ID" in env:
        change = f"choose another one: torchrun --master-port {port} launch/train.py ..."
    elif "CROSS_SIZE" in env:  # by deepspeed's launcher alone
        change = f"choose another one: deepspeed --master_port {port} launch/train.py ..."
    else:
        change = f"choose another one: export MASTER_PORT={port}"
    return (
        f"port {place.master_port} of {place.master_addr}, on which the ranks were to meet, is in use, by another run "
        f"perhaps: {change}"
    )


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
