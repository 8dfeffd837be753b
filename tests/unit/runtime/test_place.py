"""Every launcher's environment, and what each process makes of it."""

import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsft.errors import UserError
from dsft.runtime import place
from dsft.runtime.place import Place, discover

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NODELIST": "node-[a,b]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node-[b,c]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}


def no_scontrol(*args, **kwargs):
    raise AssertionError("scontrol was asked, and is not needed")


@pytest.fixture
def scontrol(monkeypatch):
    """A `scontrol` that knows two nodes; gives the commands it was asked."""
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="node-b\nnode-c\n", stderr="")

    monkeypatch.setattr(place.subprocess, "run", run)
    return asked


class Communicator:
    """A stand-in for `MPI.COMM_WORLD`: rank 5 of 8, the second on its host."""

    def __init__(self, rank=5, size=8, local=1, from_rank_0=("node-a", 31000)):
        self.rank, self.size, self.local, self.from_rank_0 = rank, size, local, from_rank_0
        self.sent = None

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def Split_type(self, kind):
        assert kind == "shared"
        return Communicator(rank=self.local, size=4)

    def bcast(self, value):
        self.sent = value
        return value if self.rank == 0 else self.from_rank_0


@pytest.fixture
def mpi(monkeypatch):
    """Puts a communicator in the place of mpi4py's."""

    def use(world: Communicator) -> Communicator:
        fake = SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED="shared")
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))
        return world

    return use


def test_deepspeed_and_torchrun_tell_everything():
    assert discover(TORCHRUN) == Place(3, 1, 4, "node-a", 29500, "environment")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's and deepspeed's
        assert discover(TORCHRUN | {name: "2"}).local_size == 2


def test_a_launcher_inside_a_batch_job_comes_before_slurm(monkeypatch):
    monkeypatch.setattr(place.subprocess, "run", no_scontrol)
    assert discover(SRUN | TORCHRUN).launcher == "environment"


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_with_a_gap_is_refused_and_named(missing):
    gap = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(UserError, match=rf"{missing} is not\. Start through .*unset RANK and WORLD_SIZE"):
        discover(gap)


def test_a_world_of_one_needs_no_more_than_its_rank():
    found = discover({"RANK": "0", "WORLD_SIZE": "1"})
    assert (found.rank, found.local_rank, found.world_size, found.master_addr) == (0, 0, 1, "127.0.0.1")
    assert found.master_port > 0


@pytest.mark.parametrize("half", [{"RANK": "0"}, {"WORLD_SIZE": "4"}])
def test_half_a_launcher_is_none(half):
    assert discover(half).launcher == "single"


def test_nothing_at_all_is_a_world_of_one():
    found = discover({})
    assert (found.rank, found.local_rank, found.world_size, found.launcher) == (0, 0, 1, "single")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", found.master_port))


def test_a_task_of_srun_asks_slurm_for_the_first_node_of_its_step(scontrol):
    assert discover(SRUN) == Place(2, 1, 4, "node-b", 20000 + 41234 % 20000, "slurm")
    assert scontrol == [["scontrol", "show", "hostnames", "node-[b,c]"]]


@pytest.mark.parametrize(("tasks", "largest"), [("4", 4), ("4(x2),3", 4), ("1,3(x5)", 3), (None, 1)])
def test_slurm_tells_how_many_tasks_a_node_has(scontrol, tasks, largest):
    told = {"SLURM_STEP_TASKS_PER_NODE": tasks} if tasks else {}
    assert discover(SRUN | told).local_size == largest


def test_a_step_without_a_list_of_nodes_has_the_jobs(scontrol):
    discover({key: value for key, value in SRUN.items() if key != "SLURM_STEP_NODELIST"})
    assert scontrol[0][-1] == "node-[a,b]"


def test_a_batch_script_may_choose_address_and_port(monkeypatch):
    monkeypatch.setattr(place.subprocess, "run", no_scontrol)
    found = discover(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "12345"})
    assert (found.master_addr, found.master_port) == ("10.0.0.7", 12345)


def test_all_tasks_of_a_job_compute_the_same_port_and_two_jobs_another(scontrol):
    ports = {discover(SRUN | {"SLURM_PROCID": str(rank)}).master_port for rank in range(4)}
    assert len(ports) == 1
    other = discover(SRUN | {"SLURM_JOB_ID": "41235"}).master_port
    assert other not in ports and 1024 < other < 65536


def test_the_batch_script_itself_is_alone():
    """It has SLURM_PROCID=0 and SLURM_NTASKS=4 like a task, and would wait for three that never come."""
    assert discover(BATCH_SCRIPT).launcher == "single"


def test_a_step_of_one_task_is_alone(monkeypatch):
    """Such as an interactive shell, from which `deepspeed` or a single process is started."""
    monkeypatch.setattr(place.subprocess, "run", no_scontrol)
    assert discover(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}).launcher == "single"


@pytest.mark.parametrize("env", [{"OMPI_COMM_WORLD_SIZE": "8"}, {"PMI_SIZE": "8"}, {"PMIX_RANK": "5"}])
def test_mpi_is_asked_where_any_mpirun_has_left_its_mark(mpi, env):
    mpi(Communicator())
    assert discover(env) == Place(5, 1, 8, "node-a", 31000, "mpi", local_size=4)


def test_rank_0_of_mpi_tells_the_others_where_to_meet(mpi):
    world = mpi(Communicator(rank=0, local=0))
    found = discover({"OMPI_COMM_WORLD_SIZE": "8"})
    assert (found.master_addr, found.master_port) == world.sent
    assert world.sent[0] == socket.gethostname()


def test_the_other_ranks_send_nothing(mpi):
    world = mpi(Communicator(rank=5))
    discover({"OMPI_COMM_WORLD_SIZE": "8"})
    assert world.sent is None


def test_an_mpi4py_of_another_mpi_is_refused(mpi):
    """Otherwise 8 runs of one rank would write into one directory."""
    mpi(Communicator(rank=0, size=1, local=0))
    with pytest.raises(UserError, match="started 8 ranks but MPI sees a world of one"):
        discover({"OMPI_COMM_WORLD_SIZE": "8"})


def test_a_place_is_told_to_torch_by_the_environment(monkeypatch):
    for key in TORCHRUN:
        monkeypatch.setenv(key, "before")
    Place(2, 1, 4, "node-b", 31234, "slurm").export()
    told = {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node-b", "MASTER_PORT": "31234"}
    assert {key: os.environ[key] for key in told} == told
    assert discover() == Place(2, 1, 4, "node-b", 31234, "environment")


@pytest.mark.parametrize(
    ("launcher", "env", "remedy"),
    [
        ("environment", {"CROSS_SIZE": "1"}, r"deepspeed --master_port \d+ launch/train\.py"),
        ("environment", {"TORCHELASTIC_RUN_ID": "x"}, r"torchrun --master-port \d+ launch/train\.py"),
        ("environment", {}, r"export MASTER_PORT=\d+$"),
        ("slurm", {}, r"export MASTER_PORT=\d+$"),
        ("mpi", {}, "start it again"),
        ("single", {}, "start it again"),
    ],
)
def test_a_port_in_use_is_told_in_the_words_of_the_launcher(launcher, env, remedy):
    message = place.port_taken(Place(0, 0, 2, "node-a", 29500, launcher), env)
    assert re.match(rf"port 29500 of node-a, .* is in use, by another run perhaps: .*{remedy}", message), message


def test_a_world_of_one_on_a_port_in_use(monkeypatch):
    from dsft.runtime.world import join

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards: `join` sets them
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} of 127\.0\.0\.1, .*: export MASTER_PORT="):
            join(Place(0, 0, 1, "127.0.0.1", port, "environment"))


def test_a_free_port_can_be_taken():
    port = place.free_port()
    with socket.socket() as probe:
        probe.bind(("", port))
