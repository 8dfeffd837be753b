"""One rank's failure ends all, and its own message is what is seen: ranks are forked processes, no launcher helps."""

import ctypes
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from dsft.errors import UserError
from dsft.runtime import failure, failure_hub, failure_line
from dsft.runtime.place import Place, free_port
from dsft.runtime.signals import StopRequest

SOON = 6.0
"""Seconds until every rank has to be gone; 10 are promised."""


@pytest.fixture(scope="module")
def context():
    """Starts a process in a few milliseconds: torch is imported once, and forked from then on."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["pytest", "torch.distributed", "dsft.runtime.failure", "dsft.runtime.signals"])
    return made


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        codes: Exit code of each rank; negative where a signal ended it.
        seconds: From the first rank's end to the last one's.
        terminal: What all ranks wrote to stderr, in the order of writing.
        said: What each rank wrote.
    """

    codes: list[int]
    seconds: float
    terminal: str
    said: list[str]


def _rank(place: Place, behave: Callable[[], None], terminal: str, own: str, env: dict, met) -> None:
    os.environ.update(env)
    pipe_in, pipe_out = os.pipe()
    pid = os.fork()
    if pid == 0:  # tee: to the terminal that all share, and to a file of this rank
        os.close(pipe_out)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with open(terminal, "ab", buffering=0) as both, open(own, "ab", buffering=0) as mine:
            while data := os.read(pipe_in, 65536):
                both.write(data)
                mine.write(data)
        os._exit(0)
    os.dup2(pipe_out, 2)
    os.close(pipe_out)
    with failure.watched(place, lambda error: str(error) if isinstance(error, UserError) else None):
        line = next((thread for thread in threading.enumerate() if isinstance(thread, failure_line.Line)), None)
        if met and line:
            line._connected.wait(20)
            met.wait(20)
        behave()


@pytest.fixture
def run(context, tmp_path):
    """Run one behaviour per rank, to the end of all."""
    started, barriers = [], []

    def start(*behaviours, env=None, port=None, meet=True) -> tuple[list, Callable[[], Outcome]]:
        port = port or free_port()
        met = context.Barrier(len(behaviours)) if meet else None
        barriers.append(met)  # or its semaphore goes before the processes have found it
        number = len(started)
        files = [tmp_path / f"{number}-{rank}.err" for rank in ("all", *range(len(behaviours)))]
        for file in files:
            file.touch()
        processes = []
        for rank, behave in enumerate(behaviours):
            where = Place(rank, rank, len(behaviours), "127.0.0.1", port, "environment", len(behaviours))
            extra = {name: value.format(rank=rank) for name, value in (env or {}).items()}
            process = context.Process(
                target=_rank, args=(where, behave, str(files[0]), str(files[rank + 1]), extra, met)
            )
            process.start()
            processes.append(process)
        started.extend(processes)
        return processes, lambda: _outcome(processes, files)

    def to_the_end(*behaviours, **options) -> Outcome:
        return start(*behaviours, **options)[1]()

    to_the_end.start = start
    yield to_the_end
    for process in started:
        process.kill()
        process.join()


def _outcome(processes, files: list[Path]) -> Outcome:
    ends: dict[int, float] = {}
    deadline = time.monotonic() + 40
    while len(ends) < len(processes) and time.monotonic() < deadline:
        for number, process in enumerate(processes):
            if number not in ends and process.exitcode is not None:
                ends[number] = time.monotonic()
        time.sleep(0.01)
    assert len(ends) == len(processes), (
        f"still there: {set(range(len(processes))) - ends.keys()}\n{files[0].read_text()}"
    )
    time.sleep(0.05)  # the tee's last bytes
    terminal, *said = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Outcome([p.exitcode for p in processes], max(ends.values()) - min(ends.values()), terminal, said)


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("held by a lock")
        self.lock = threading.Lock()


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no")


def waits() -> None:
    """What a rank in a collective does: it comes back from nothing that Python could interrupt."""
    StopRequest()  # a launcher's TERM does not end it either
    read, _ = os.pipe()
    os.read(read, 1)


class Raises:
    """Wait a little, then raise what a function makes."""

    def __init__(self, make, after: float = 0.1):
        self.make, self.after = make, after

    def __call__(self) -> None:
        time.sleep(self.after)
        raise self.make()


def boom() -> Exception:
    return ValueError("the pump is dry")


def echo() -> Exception:
    return RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:36127")


def several_lines() -> Exception:
    return KeyError("first line\nsecond line\nlast line")


def huge() -> Exception:
    return RuntimeError("begin " + "x" * 5_000_000 + " end")


def chinese() -> Exception:
    return OSError("磁盘坏了")


def nothing_to_say() -> Exception:
    return AssertionError()


def leaves_with(code):
    return Raises(lambda: SystemExit(code))


def user_error() -> Exception:
    return UserError("data.train=x.jsonl: no such file")


def group() -> Exception:
    return ExceptionGroup("two at once", [ValueError("a"), OSError("b")])


def out_of_memory() -> Exception:
    return MemoryError()


def exit_3() -> BaseException:
    return SystemExit(3)


def exit_0() -> BaseException:
    return SystemExit(0)


def exit_text() -> BaseException:
    return SystemExit("gave up")


def interrupt() -> BaseException:
    return KeyboardInterrupt()


KINDS = [
    (boom, 1, "ValueError: the pump is dry"),
    (several_lines, 1, r"KeyError: 'first line\nsecond line\nlast line'"),
    (huge, 1, " end"),
    (chinese, 1, "OSError: 磁盘坏了"),
    (nothing_to_say, 1, "AssertionError"),
    (Unpicklable, 1, "Unpicklable: held by a lock"),
    (Speechless, 1, "Speechless"),
    (group, 1, "ExceptionGroup: two at once (2 sub-exceptions)"),
    (out_of_memory, 1, "MemoryError"),
    (exit_3, 3, "SystemExit: 3"),
    (exit_0, 1, "SystemExit: 0"),
    (exit_text, 1, "SystemExit: gave up"),
    (interrupt, 130, "KeyboardInterrupt"),
]


@pytest.mark.parametrize(
    ("who", "make", "code", "message"),
    [(number % 2, *kind) for number, kind in enumerate([KINDS[0], *KINDS])],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_exception_of_any_kind_ends_all_and_is_what_is_seen(run, who, make, code, message):
    behaviours = [waits, waits]
    behaviours[who] = Raises(make)
    outcome = run(*behaviours)
    assert outcome.codes == [code, code]
    assert outcome.seconds < SOON
    assert outcome.terminal.endswith(f"{message}\n")
    assert re.search(rf"\nerror: rank {who} on {re.escape(socket.gethostname())}: ", outcome.terminal)
    assert outcome.terminal.count("Traceback") == 1
    assert outcome.said[1 - who] == ""
    assert len(outcome.terminal) < 30_000


@pytest.mark.parametrize("who", [0, 2])
def test_a_mistake_is_told_alone_and_once(run, who):
    behaviours = [waits, waits, waits]
    behaviours[who] = Raises(user_error)
    outcome = run(*behaviours)
    assert outcome.codes == [2, 2, 2]
    assert outcome.terminal == "error: data.train=x.jsonl: no such file\n"


def chatters() -> None:
    """Shows progress, and is in no collective."""
    while True:
        print("evaluate: 1/3", file=sys.stderr, flush=True)
        time.sleep(0.001)


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_at_work_does_not_talk_over_the_message(run, who):
    behaviours = [chatters, chatters, chatters]
    behaviours[who] = Raises(boom)
    outcome = run(*behaviours)
    assert outcome.codes == [1, 1, 1]
    assert "evaluate" in outcome.terminal
    assert "evaluate" not in outcome.terminal[outcome.terminal.index("Traceback") :]


def test_the_same_exception_everywhere_is_told_once(run):
    outcome = run(*[Raises(boom)] * 3)
    assert outcome.codes == [1, 1, 1]
    assert outcome.terminal.count("Traceback") == 1
    assert outcome.terminal.endswith("ValueError: the pump is dry\n")


def in_a_thread() -> None:
    threading.Thread(target=Raises(boom)).start()
    waits()


def in_a_reporter_s_thread() -> None:
    code = "def sends(): raise ConnectionError('the server is away')"
    module = {"__name__": "wandb.sdk.sender"}
    exec(code, module)
    thread = threading.Thread(target=module["sends"])
    thread.start()
    thread.join()


def test_a_thread_that_ends_is_a_failure(run):
    outcome = run(waits, in_a_thread)
    assert outcome.codes == [1, 1] and outcome.seconds < SOON
    assert outcome.terminal.endswith("ValueError: the pump is dry\n")


def test_a_thread_of_a_reporter_may_end(run):
    outcome = run(passes, in_a_reporter_s_thread)
    assert outcome.codes == [0, 0]
    assert "the server is away" in outcome.said[1]


def passes() -> None:
    time.sleep(0.5)


def passes_sooner() -> None:
    time.sleep(0.1)


def killed() -> None:
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def crashes() -> None:
    time.sleep(0.1)
    ctypes.string_at(0)


def leaves_without_a_word() -> None:
    time.sleep(0.1)
    os._exit(0)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("behave", "code"), [(killed, -signal.SIGKILL), (crashes, -signal.SIGSEGV), (leaves_without_a_word, 0)]
)
def test_a_rank_that_is_gone_ends_the_others(run, behave, code, who):
    behaviours = [waits, waits, waits]
    behaviours[who] = behave
    outcome = run(*behaviours)
    assert outcome.codes[who] == code
    assert [c for rank, c in enumerate(outcome.codes) if rank != who] == [1, 1]
    assert outcome.seconds < SOON
    lines = outcome.terminal.splitlines()
    assert lines[-1].startswith(f"error: rank {who} on ") and "without a word" in lines[-1]
    assert outcome.terminal.count("error: ") - outcome.terminal.count("Fatal Python error: ") == 1
    if behave is crashes:
        assert "Segmentation fault" in outcome.said[who] and "in crashes" in outcome.said[who]


def leaves_a_child_behind() -> None:
    time.sleep(0.1)
    if os.fork() == 0:
        os.close(2)
        time.sleep(15)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_that_outlives_its_rank_does_not_hide_its_end(run):
    outcome = run(waits, leaves_a_child_behind)
    assert outcome.codes == [1, -signal.SIGKILL] and outcome.seconds < SOON


def test_a_broken_collective_is_not_taken_for_the_cause(run):
    outcome = run(Raises(echo), Raises(boom, after=0.8), Raises(echo, after=0.2))
    assert outcome.codes == [1, 1, 1]
    assert outcome.terminal.endswith("error: rank 1 on " + socket.gethostname() + ": ValueError: the pump is dry\n")
    assert "Connection closed" not in outcome.terminal


def test_a_broken_collective_after_a_kill_is_not_taken_for_the_cause(run):
    outcome = run(Raises(echo), killed)
    assert outcome.codes == [1, -signal.SIGKILL]
    assert "Connection closed" not in outcome.terminal and "rank 1" in outcome.terminal


def test_a_broken_collective_that_nobody_explains_is_shown(run):
    outcome = run(waits, Raises(echo))
    assert outcome.codes == [1, 1] and outcome.seconds < SOON
    assert "Connection closed by peer" in outcome.terminal.splitlines()[-1]


class Late:
    """Comes to the meeting only after some seconds; pickled, it delays the process's own start."""

    def __init__(self, behave, seconds: float):
        self.behave, self.seconds = behave, seconds

    def __setstate__(self, state):
        self.__dict__ = state
        time.sleep(self.seconds)

    def __call__(self):
        self.behave()


@pytest.mark.parametrize("who", [0, 1])
def test_a_failure_reaches_a_rank_that_comes_later(run, who):
    behaviours = [Late(waits, 1.5), Late(waits, 1.5)]
    behaviours[who] = Raises(boom, after=0)
    outcome = run(*behaviours, meet=False)
    assert outcome.codes == [1, 1] and outcome.seconds < 10
    assert outcome.terminal.endswith("ValueError: the pump is dry\n")
    assert outcome.terminal.count("error: ") == 1


def test_a_rank_whose_rank_0_never_comes_does_not_wait_forever(run):
    outcome = run(Late(leaves_without_a_word, 2), Impatient(waits), meet=False)
    assert outcome.codes[1] == 1
    assert outcome.said[1].startswith("error: rank 1 on ") and outcome.said[1].count("\n") == 1
    assert "rank 0 was not to be reached at 127.0.0.1:" in outcome.said[1]


class Impatient(Late):
    """Gives rank 0 half a second to come, and to speak first."""

    def __init__(self, behave):
        super().__init__(behave, 0)

    def __setstate__(self, state):
        super().__setstate__(state)
        failure_line.MEETING, failure_line.VERDICT = timedelta(seconds=0.5), 0.5


def suspended() -> None:
    time.sleep(0.1)
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)
    os.kill(pid, signal.SIGSTOP)


def keeps_the_interpreter() -> None:
    """A compiler, or an extension that does not release Python's lock."""
    time.sleep(0.1)
    ctypes.PyDLL(None).usleep(1_500_000)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("behave", [suspended, keeps_the_interpreter, passes_sooner])
def test_a_healthy_run_goes_on(run, behave, who):
    behaviours = [passes, passes]
    behaviours[who] = behave
    outcome = run(*behaviours)
    assert outcome.codes == [0, 0] and outcome.terminal == ""


def is_watched_for_nothing() -> None:
    """Its threads are not once woken up."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, failure_hub.Hub | failure_line.Line)]
    files = [Path(f"/proc/self/task/{thread.native_id}/status") for thread in threads]

    def switches() -> list[str]:
        return [line for file in files for line in file.read_text().splitlines() if "ctxt_switches" in line]

    time.sleep(0.3)
    before = switches()
    time.sleep(0.5)
    after = switches()
    time.sleep(0.5)  # until the other rank has looked too: the hub hears it take its leave
    assert before and after == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not count context switches")
def test_it_costs_nothing_while_all_is_well(run):
    outcome = run(is_watched_for_nothing, is_watched_for_nothing)
    assert outcome.codes == [0, 0], outcome.terminal


def fails_while_asked_to_stop() -> None:
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    assert stop.received == "SIGTERM"
    raise boom()


def test_a_failure_while_a_stop_is_under_way(run):
    outcome = run(waits, fails_while_asked_to_stop)
    assert outcome.codes == [1, 1] and outcome.terminal.endswith("the pump is dry\n")


def unread() -> None:
    """Nobody reads what this rank prints."""
    _read, write = os.pipe()
    os.dup2(write, 2)
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(2, True)
    failure_hub.PRINTING = failure_hub.ENDING = 0.5
    raise boom()


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_whose_output_is_stuck_ends_all_the_same(run, who):
    behaviours = [waits, waits]
    behaviours[who] = unread
    outcome = run(*behaviours)
    assert outcome.codes == [1, 1] and outcome.seconds < 10
    assert outcome.said[1 - who] == f"error: rank {who} on {socket.gethostname()}: ValueError: the pump is dry\n"


def test_torchrun_shows_the_cause(run, tmp_path):
    outcome = run(waits, Raises(boom), env={"TORCHELASTIC_ERROR_FILE": str(tmp_path / "{rank}.json")})
    assert outcome.codes == [1, 1]
    other, cause = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert cause["message"].endswith("ValueError: the pump is dry")
    assert other["message"].startswith("ended because of rank 1")
    assert other["timestamp"] > cause["timestamp"]


def test_a_port_in_use_names_the_setting(run):
    with socket.create_server(("", 0)) as server:
        outcome = run(waits, passes_sooner, port=server.getsockname()[1], meet=False)
    assert outcome.codes[0] == 2
    assert outcome.said[0].startswith("error: port ") and "in use" in outcome.said[0]


class Until:
    """Go on until a file is there."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self) -> None:
        while not self.file.exists():
            time.sleep(0.05)


def test_another_run_on_the_same_port_is_refused_and_disturbs_nobody(run, tmp_path):
    port = free_port()
    started, over = tmp_path / "started", tmp_path / "over"
    first, outcome = run.start(Until(over), Touches(started, Until(over)), port=port)
    Until(started)()
    second = run(waits, Impatient(waits), port=port, meet=False)
    assert second.codes == [2, 2]
    assert second.terminal.count("in use") == len(second.terminal.splitlines())
    assert [process.exitcode for process in first] == [None, None]
    over.touch()
    assert outcome().codes == [0, 0]


class Touches:
    """Make a file, then behave otherwise."""

    def __init__(self, file: Path, then: Callable[[], None]):
        self.file, self.then = file, then

    def __call__(self) -> None:
        self.file.touch()
        self.then()


def knocks() -> None:
    """A stranger: a port scanner, a health check."""
    import torch.distributed as dist

    port = int(os.environ["PORT"])
    about = json.loads(dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False).get(failure_line._key()))
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"hello": 0}\n', b"[]\n", b"\xff\n", b'{"failed": {}}\n'):
        with socket.create_connection(("127.0.0.1", about["port"])) as connection:
            connection.sendall(greeting)
            time.sleep(0.01)


def test_strangers_do_no_harm(run):
    port = free_port()
    outcome = run(passes, knocks, port=port, env={"PORT": str(port)})
    assert outcome.codes == [0, 0] and outcome.terminal == ""
    outcome = run(Raises(boom, after=1), knocks, port=port, env={"PORT": str(port)})
    assert outcome.codes == [1, 0]


def test_in_a_world_of_one_exceptions_pass():
    with pytest.raises(ValueError, match="dry"), failure.watched(Place(0, 0, 1, "127.0.0.1", 0, "single"), str):
        raise boom()


def test_in_a_world_of_one_a_thread_that_ends_is_a_failure(run):
    outcome = run(in_a_thread)
    assert outcome.codes == [1]
    assert "ValueError: the pump is dry" in outcome.terminal.splitlines()[-1]


@pytest.mark.parametrize("host, speakers", [("here", []), ("there", [0])])
def test_one_rank_of_every_other_host_repeats_the_cause(host, speakers):
    cause = failure_hub.Cause(5, 1, "here", "ValueError", 1)
    assert _speakers(host, cause) == speakers


@pytest.mark.parametrize("local_rank, speakers", [(0, [1]), (1, [0]), (2, [0])])
def test_where_a_rank_is_gone_another_speaks(local_rank, speakers):
    assert _speakers("here", failure_hub.gone(5, local_rank, "here")) == speakers


def _speakers(host: str, cause: failure_hub.Cause) -> list[int]:
    found = []
    for local_rank in range(3):
        watch = failure._Watch(Place(9, local_rank, 16, "here", 0, "environment"), str)
        watch._host = host
        if watch._speaks(cause):
            found.append(local_rank)
    return found


def test_the_end_of_another_rank_in_other_words_is_an_echo_too():
    """Or it would be taken for what ended the run."""
    try:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        except RuntimeError as problem:
            raise UserError("the model fails") from problem
    except UserError as error:
        assert failure._is_echo(error)
    assert not failure._is_echo(UserError("the model fails"))
