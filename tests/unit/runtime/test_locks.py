"""A run directory is held by one run, and left as it was found."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from dsft.errors import UserError
from dsft.runtime import failure
from dsft.runtime.locks import hold


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_what_was_made_for_nothing_goes_away(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a/b/c"):
        assert names(tmp_path) == ["a", "a/b", "a/b/c", "a/b/c/.lock"]
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_what_was_put_in_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with hold(tmp_path / "a/b"):
        (tmp_path / "a/b/config.yaml").touch()
    assert names(tmp_path) == ["a", "a/b", "a/b/config.yaml"]


def test_a_lock_file_that_a_kill_left_is_taken_over_and_left(tmp_path):
    (tmp_path / ".lock").touch()
    with hold(tmp_path):
        pass
    assert names(tmp_path) == [".lock"]


def _try(directory, answers):
    try:
        with hold(directory):
            answers.put("held")
    except UserError as refusal:
        answers.put(str(refusal))


def test_a_second_run_is_refused_and_takes_nothing_from_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    for expected in ("another run is using run_dir=", "held"):
        if expected == "held":
            _alone(context, tmp_path, answers)
        else:
            with hold(tmp_path / "run"):
                _alone(context, tmp_path, answers)
                assert names(tmp_path) == ["run", "run/.lock"]
        assert answers.get(timeout=10).startswith(expected)
    assert names(tmp_path) == []


def _alone(context, tmp_path, answers):
    other = context.Process(target=_try, args=(tmp_path / "run", answers))
    other.start()
    other.join(20)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir=.*file/run cannot be written to"), hold(tmp_path / "file/run"):
        pass
    assert names(tmp_path) == ["file"]


def test_a_rank_that_is_ended_because_of_another_leaves_nothing_either(tmp_path):
    """`failure` ends a process from one of its threads, past every `finally`."""
    if (child := os.fork()) == 0:
        with hold(tmp_path / "run"):
            watch = failure._Watch(failure.Place(0, 0, 2, "127.0.0.1", 1, "environment"), lambda error: None)
            watch._end("", 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert names(tmp_path) == []
