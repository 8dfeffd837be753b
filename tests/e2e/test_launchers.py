"""Every way to start ranks, and what happens when one of them fails."""

import json
import subprocess
import sys
from pathlib import Path

import faults
import helpers
import psutil
import pytest

SHORT = ["train.max_steps=3", "train.samples=0", "train.export=false"]
ENDLESS = ["train.max_steps=100000", "train.eval_every=0", "train.save_every=0", "train.samples=0"]


def environment(run_dir: Path) -> dict:
    return json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(base, scratch, tmp_path_factory) -> Path:
    """The run directory of a run that no launcher started."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    size = ["batch.gradient_accumulation_steps=4"]
    result = helpers.train([f"run_dir={run_dir}", *base, *SHORT, *size], scratch, ranks=1, fresh=True)
    assert result.code == 0, result.err
    return run_dir


def assert_agrees(run_dir: Path, alone: Path) -> None:
    """The same global batches give the same losses, whoever started the ranks."""
    for row, expected in zip(helpers.numbers(run_dir), helpers.numbers(alone), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_without_a_launcher_it_is_a_world_of_one(alone):
    assert environment(alone)["world_size"] == 1
    assert environment(alone)["launcher"] == "single"


def test_torchrun(base, alone, scratch, tmp_path):
    launcher = [helpers.BIN / "torchrun", "--nproc_per_node", "2", "--master_port", helpers.free_port()]
    result = helpers.run([*launcher, "launch/train.py", f"run_dir={tmp_path / 'run'}", *base, *SHORT], scratch)
    assert result.code == 0, result.err
    assert environment(tmp_path / "run")["launcher"] == "environment"
    assert_agrees(tmp_path / "run", alone)


def test_mpirun(base, alone, scratch, tmp_path):
    if not faults.mpirun():
        pytest.skip("there is no mpirun")
    launcher = [*faults.mpirun(), "-np", "2", sys.executable]
    result = helpers.run([*launcher, "launch/train.py", f"run_dir={tmp_path / 'run'}", *base, *SHORT], scratch)
    assert result.code == 0, result.err
    assert environment(tmp_path / "run")["launcher"] == "mpi"
    assert_agrees(tmp_path / "run", alone)


def test_a_mistake_is_told_once_and_ends_all_ranks(base, scratch, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [{"role": "user"}]}\n', encoding="utf-8")
    result = helpers.train([f"run_dir={tmp_path / 'run'}", *base, f"data.train={broken}"], scratch)
    assert result.code == 2, result.err
    assert result.err.count("error: ") == 1 and f"{broken}:1" in result.err
    assert "Traceback" not in result.err


@pytest.fixture(scope="module")
def endless(base, scratch, tmp_path_factory):
    """A run of two ranks in the middle of training, with its run directory; begun anew after a test that ended it."""
    begun = []

    def get() -> tuple[helpers.Command, Path]:
        if not begun or begun[-1][0].popen.poll() is not None:
            run_dir = tmp_path_factory.mktemp("endless") / "run"
            begun.append((helpers.start([f"run_dir={run_dir}", *base, *ENDLESS], scratch, fresh=True), run_dir))
            begun[-1][0].until(helpers.reached(run_dir, 2))
        return begun[-1]

    yield get
    for running, _ in begun:
        running.kill()


def test_two_runs_do_not_share_a_run_directory(endless, base, scratch):
    running, run_dir = endless()
    result = helpers.train([f"run_dir={run_dir}", *base, *ENDLESS], scratch, ranks=1)
    assert result.code == 2
    assert "another run is using" in result.err
    assert running.popen.poll() is None


def test_a_second_run_on_the_same_port_is_told_to_choose_another(endless, base, scratch, tmp_path):
    running, run_dir = endless()
    arguments = [str(argument) for argument in running.popen.args]
    port = arguments[arguments.index("--master_port") + 1]
    launcher = [helpers.BIN / "deepspeed", "--num_accelerators", "2", "--master_port", port]
    result = helpers.run([*launcher, "launch/train.py", f"run_dir={tmp_path / 'run'}", *base, *SHORT], scratch)
    assert result.code == 2, result.err
    (line,) = [line for line in result.err.splitlines() if "error: " in line]
    assert line.startswith(f"error: port {port} of ") and "choose another one: deepspeed --master_port " in line
    assert "Traceback" not in result.err
    # the run that was there first goes on
    running.until(helpers.reached(run_dir, helpers.rows(run_dir)[-1]["step"] + 2))


def test_a_killed_rank_ends_the_others(endless):
    running, _ = endless()
    running.ranks()[1].kill()
    result = running.wait(10)
    assert result.code != 0
    assert "error: rank 1 on " in result.err and "without a word" in result.err
    assert "Traceback" not in result.err and "gloo" not in result.err
    assert not running.ranks()


@pytest.mark.parametrize(
    "fault",
    [
        faults.Fault("export", 1, 3, "deepspeed", "unpicklable"),
        faults.Fault("saving", 0, 0, "torchrun", "several lines"),
        faults.Fault("evaluation", 1, 3, "mpirun", "ValueError"),
    ],
    ids=lambda fault: f"{fault.launcher}-{fault.place}",
)
def test_an_exception_that_nobody_expects_ends_all_ranks(fault, base, scratch):
    if fault.launcher == "mpirun" and not faults.mpirun():
        pytest.skip("there is no mpirun")
    ending = faults.run(fault, [*base, "train.max_steps=2", "train.save_every=1", "train.samples=0"], scratch)
    assert ending.seconds is not None and ending.seconds < 10, ending.output
    assert ending.code == 1, ending.output
    assert ending.heard, ending.output
    # torchrun, which is Python too, ends with an exception of its own
    assert ending.output.count("Traceback (most recent call last)") == 1 + (fault.launcher == "torchrun")


def test_a_sweep_without_a_launcher_trains_each_job(base, scratch, tmp_path):
    arguments = ["-m", "optim.lr=1e-4,1e-3", f"run_dir={tmp_path / 'sweep'}"]
    result = helpers.train([*arguments, *(a for a in base if not a.startswith("optim.lr")), *SHORT], scratch, ranks=1)
    assert result.code == 0, result.err
    jobs = sorted(path.parent for path in tmp_path.rglob("metrics.jsonl"))
    assert len(jobs) == 2
    first, second = (helpers.numbers(job) for job in jobs)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    assert first[0] == second[0]  # the evaluation before any step
    assert first[-1]["eval/loss"] != second[-1]["eval/loss"]


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="another process's limits cannot be set here")
def test_one_rank_that_cannot_write_ends_both(base, scratch, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [f"run_dir={run_dir}", *base, *ENDLESS, "train.save_every=50", "deepspeed=zero3"]
    with helpers.start(arguments, scratch) as running:
        running.until(helpers.reached(run_dir, 2))
        running.ranks()[1].rlimit(psutil.RLIMIT_FSIZE, (200_000, 200_000))
        result = running.wait(90)
    assert result.code == 2, result.err
    assert f"rank 1: cannot write the checkpoint {run_dir}/checkpoints/step-000050" in result.err
    assert "Traceback" not in result.err
    assert not list((run_dir / "checkpoints").iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint and half of another; `grow()` gives it more."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(place)], capture_output=True, check=False).returncode == 0

    if not mount("-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        pytest.skip("mounting a file system is not permitted")
    yield place, lambda: mount("-o", "remount,size=100m")
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_spoils_nothing(base, small_disk, scratch):
    place, grow = small_disk
    run_dir = place / "run"
    arguments = [f"run_dir={run_dir}", *base, "train.max_steps=6", "train.save_every=2", "train.eval_every=0"]
    result = helpers.train(arguments, scratch, ranks=1)
    assert result.code == 2, result.err
    assert f"cannot write the checkpoint {run_dir}/checkpoints/step-000004" in result.err
    assert "(0 MiB are free there)" in result.err and "Traceback" not in result.err
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert grow()
    result = helpers.train(arguments, scratch, ranks=1)
    assert result.code == 0, result.err
    assert "at step 2" in result.err
    steps = [row["step"] for row in helpers.rows(run_dir)]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6]
