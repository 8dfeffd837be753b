"""Forked ranks are to the tests what fresh interpreters are."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import psutil
import pytest

TELL = """
import json, os, random, sys, tempfile, threading
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
told = {"argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "main": __name__, "tmp": tempfile.gettempdir(),
        "place": [os.environ.get(name) for name in names], "threads": threading.active_count(), "session": os.getsid(0),
        "random": random.random(), "children": os.environ.get("SET_BY_A_TEST")}
print(json.dumps(told))
"""
FAIL = """
import atexit, os, sys
atexit.register(print, "the end")
if os.environ["RANK"] == "1":
    raise KeyError("the pump is dry")
sys.exit("nobody home" if os.environ["RANK"] == "2" else 0)
"""
SLEEP = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "script.py"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_a_rank_finds_what_a_fresh_interpreter_would(script, scratch, monkeypatch):
    monkeypatch.setenv("SET_BY_A_TEST", "春")
    file = script(TELL)
    with helpers.Command([file, "a=1", "b c"], scratch, forked=2) as running:
        result = running.wait()
        session = running.popen.pid
    assert result.code == 0, result.err
    ranks = sorted(map(json.loads, result.out.splitlines()), key=lambda told: told["place"])
    assert len({told.pop("random") for told in ranks}) == 2
    for rank, told in enumerate(ranks):
        assert told.pop("place") == [str(rank), str(rank), "2", "127.0.0.1"]
        assert told == {
            "argv": [str(file), "a=1", "b c"],
            "path": str(file.parent),
            "cwd": str(helpers.ROOT),
            "main": "__main__",
            "tmp": str(scratch),
            "threads": 1,
            "session": session,
            "children": "春",
        }
    alone = helpers.script([file], scratch)
    assert json.loads(alone.out)["place"] == [None] * 4


def test_each_rank_ends_as_it_would_alone(script, scratch):
    with helpers.Command([script(FAIL)], scratch, forked=3) as running:
        result = running.wait()
    assert result.code == 1
    assert "KeyError: 'the pump is dry'" in result.err and "nobody home" in result.err
    assert result.out == "the end\n" * 3


def test_a_killed_rank_ends_no_other(script, scratch):
    with helpers.Command([script(SLEEP)], scratch, forked=2) as running:
        first, second = running.ranks()
        second.kill()
        second.wait(10)
        assert running.ranks() == [first] and running.popen.poll() is None
        first.send_signal(signal.SIGTERM)
        assert running.wait().code == -signal.SIGKILL


def test_nothing_is_left_of_what_is_killed(script, scratch):
    with helpers.Command([script(SLEEP)], scratch, forked=2) as running:
        ranks = running.ranks()
        assert len(ranks) == 2
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert running.popen.returncode == -signal.SIGKILL


def test_ranks_end_with_the_tests_that_wanted_them(script, tmp_path):
    """However those end: the server and its ranks see the sockets close."""
    program = f"""
import os, sys
sys.path[:0] = {[str(Path(helpers.__file__).parent)]!r}
import forkserver
with open(os.devnull, "w") as nothing:
    server = forkserver.Server(imported=())
    forked = server.start([{str(script(SLEEP))!r}], 2, 0, "/", dict(os.environ), nothing, nothing)
print(server._process.pid, forked.pid, *forked.ranks)
os.abort()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGABRT, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
