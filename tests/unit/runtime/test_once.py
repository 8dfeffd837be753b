"""One process of a host finds out, the others of the same start take its answer; a later start trusts nothing."""

import math
import multiprocessing
import time

import pytest

from dsft.runtime import once
from dsft.runtime.once import once_per_host

FORK = multiprocessing.get_context("fork")
TICK = 0.03
"""The kernel counts the beginnings of processes in hundredths of a second."""


@pytest.fixture
def log(tmp_path):
    """Counts how often something was found out, by any process."""
    file = tmp_path / "log"
    file.touch()
    return file


def find_out(log, answer=None):
    with log.open("a") as out:
        out.write("x")
    time.sleep(0.05)
    return answer


def _rank(file, state, log, barrier, answers):
    barrier.wait()
    time.sleep(TICK)
    answers.put(once_per_host(file, lambda: state, lambda: find_out(log, [state, None])))


def start(file, state, log, ranks=4):
    """A start of some ranks; what each was answered."""
    barrier, answers = FORK.Barrier(ranks), FORK.Queue()
    processes = [FORK.Process(target=_rank, args=(file, state, log, barrier, answers)) for _ in range(ranks)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    return found


def test_one_of_a_start_finds_out_and_the_next_start_does_so_again(tmp_path, log):
    file = tmp_path / "notes" / "file"
    for starts in (1, 2, 3):
        assert start(file, "a", log) == [["a", None]] * 4
        time.sleep(TICK)
        assert log.read_text() == "x" * starts


def test_an_answer_to_another_state_is_not_taken(tmp_path, log):
    file = tmp_path / "file"
    assert once_per_host(file, lambda: [1], lambda: find_out(log, "one")) == "one"
    assert once_per_host(file, lambda: [2], lambda: find_out(log, "two")) == "two"
    assert once_per_host(file, lambda: [2], lambda: find_out(log, "three")) == "two"
    assert len(log.read_text()) == 2


def test_what_changes_meanwhile_is_found_out_again(tmp_path, log):
    states = iter([1, 2, 2, 2])
    file = tmp_path / "file"
    for answer in ("torn", "whole"):
        assert once_per_host(file, lambda: next(states), lambda answer=answer: find_out(log, answer)) == answer


def test_nothing_and_false_are_answers_too(tmp_path, log):
    for name, answer in (("none", None), ("false", False)):
        for _ in range(2):
            assert once_per_host(tmp_path / name, list, lambda answer=answer: find_out(log, answer)) is answer
    assert len(log.read_text()) == 2


@pytest.mark.parametrize(("name", "value"), [("_boot", "another boot"), ("_started", math.inf)])
def test_an_answer_of_another_time_is_not_taken(tmp_path, log, monkeypatch, name, value):
    once_per_host(tmp_path / "file", list, lambda: find_out(log))
    monkeypatch.setattr(once, name, lambda: value)
    once_per_host(tmp_path / "file", list, lambda: find_out(log))
    assert len(log.read_text()) == 2


@pytest.mark.parametrize("torn", ["", "{", "{}", "[]"])
def test_an_answer_that_cannot_be_read_is_found_out_again(tmp_path, log, torn):
    once_per_host(tmp_path / "file", list, lambda: find_out(log))
    (note,) = tmp_path.glob("file.*.json")
    note.write_text(torn)
    once_per_host(tmp_path / "file", list, lambda: find_out(log))
    assert len(log.read_text()) == 2


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(30, "read-only"), NotImplementedError()])
def test_where_nothing_can_be_left_everybody_finds_out(tmp_path, log, monkeypatch, error):
    def refuse(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(once.FileLock, "acquire", refuse)
    assert once_per_host(tmp_path / "file", list, lambda: find_out(log, 1)) == 1
    assert not list(tmp_path.glob("file*"))


def test_a_failure_is_the_callers_and_leaves_the_lock_free(tmp_path, log):
    with pytest.raises(ZeroDivisionError):
        once_per_host(tmp_path / "file", list, lambda: 1 // 0)
    assert once_per_host(tmp_path / "file", list, lambda: find_out(log, 1)) == 1
