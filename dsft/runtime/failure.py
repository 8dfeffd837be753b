"""A failure on one rank ends all ranks at once, and what that rank has to say is what is seen.

Rank 0 keeps a TCP connection to every rank, from before the data is read until the run is over. A rank that fails says
so there; rank 0 decides whose failure was first, lets that rank print, and then ends the others in silence. A process
that is killed or crashes says nothing, but the kernel closes its connection. It does not close that of a process which
is busy, suspended or compiling: there is no heartbeat, no polling and no timeout that a healthy run could miss, and
nothing is sent while all is well.

Here is what a rank does about a failure; `failure_line` is its connection to rank 0, and `failure_hub` is rank 0's end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from dsft.runtime import failure_hub
from dsft.runtime.failure_hub import LONGEST, Cause, Hub, describe
from dsft.runtime.failure_line import Line, publish
from dsft.runtime.place import Place

_ECHOES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_HARMLESS_THREADS = ("wandb", "tqdm")
_BEFORE_THE_END: list[Callable[[], None]] = []


@contextmanager
def given_back(give_back: Callable[[], None]) -> Iterator[None]:
    """Call `give_back` on leaving, and also where another rank's failure ends this process from within."""
    _BEFORE_THE_END.append(give_back)
    try:
        yield
    finally:
        _BEFORE_THE_END.remove(give_back)
        give_back()


class PeerFailed(RuntimeError):
    """Another rank failed; on this one nothing is wrong."""


@contextmanager
def watched(place: Place, explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Inside, an exception of any kind on any rank ends all ranks, and this process does not come back from it.

    The rank that failed prints: what `explain` makes of the exception, or else its traceback and a line that names
    rank, host and message. The others print nothing, but for one line on every other host. Exit codes: 2 where
    `explain` has an explanation, what SystemExit says, 130 for KeyboardInterrupt, else 1. In a world of one, exceptions
    pass.

    Args:
        place: This process's place.
        explain: What to tell a person who can fix an error, or None for an unexpected one.

    Raises:
        UserError: The port on which ranks meet is taken.
    """
    if sys.__stderr__ and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # a crash in native code shows where
    watch = _Watch(place, explain)
    previous, threading.excepthook = threading.excepthook, watch.thread_failed
    try:
        if place.world_size > 1:
            watch.begin()
        yield
    except BaseException as error:
        try:
            watch.failed(error)
        except BaseException:  # no memory left even for that: the others see the connection close
            if place.world_size > 1:
                os._exit(1)
        raise
    finally:
        threading.excepthook = previous
        watch.close()


class _Watch:
    """What this rank does when it fails, and when it hears that another one did; on rank 0 it also owns the hub."""

    def __init__(self, place: Place, explain: Callable[[Exception], str | None]):
        self._place = place
        self._explain = explain
        self._host = socket.gethostname()
        self._pid = os.getpid()
        self._hub: Hub | None = None
        self._store = None
        self._line: Line | None = None
        self._failing = threading.Lock()
        self._done = False
        self._terminal: TextIO | None = None  # what stderr was, once this rank has been silenced

    def begin(self) -> None:
        """Meet the other ranks, in the background but for rank 0."""
        if self._place.rank == 0:
            self._hub = Hub(self._place.world_size)
            self._store = publish(self._place, self._host, self._hub)
            self._hub.start()
        self._line = Line(self._place, self._host, self._hush, self._told, self._hub)
        self._line.start()

    def close(self) -> None:
        """This rank is done, and all is well."""
        self._done = True
        if self._line and os.getpid() == self._pid:
            self._line.close()

    def failed(self, error: BaseException) -> None:
        """End this process and all others because of `error`; returns in a world of one only."""
        if os.getpid() != self._pid:
            return  # a child that was forked inside
        self._failing.acquire()  # and never released: one failure is enough
        explanation = self._explain(error) if isinstance(error, Exception) else None
        message = describe(error) if explanation is None else explanation
        code = 2 if explanation is not None else _code(error)
        place = self._place
        cause = Cause(place.rank, place.local_rank, self._host, _short(message), code, echo=_is_echo(error))
        _write_error_file(cause, place)
        if place.world_size == 1:
            self._failing.release()
            return
        if self._line:
            self._line.report(cause)
        text = f"error: {message}\n" if explanation is not None else f"{_traceback(error)}error: {cause}\n"
        self._end(text, cause.code)

    def thread_failed(self, about: threading.ExceptHookArgs) -> None:
        """For `threading.excepthook`: a thread that ends leaves somebody waiting for it."""
        error = about.exc_value
        if error is None or _is_harmless(error):
            threading.__excepthook__(about)
            return
        self.failed(error)
        threading.__excepthook__(about)
        if os.getpid() == self._pid:
            self._end("", _code(error))  # a world of one: the main thread may wait for this one forever

    def _hush(self) -> None:
        """Another rank failed and is about to print: whatever this one still has to say comes to nothing."""
        self._terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)

    def _told(self, cause: Cause) -> None:
        """Another rank failed; returns only where this one is done."""
        if self._done:
            return
        _write_error_file(cause, self._place)
        self._end(f"error: {cause}\n" if self._speaks(cause) else "", cause.code)

    def _speaks(self, cause: Cause) -> bool:
        """Whether it is for this rank to repeat on its host what another has said."""
        if cause.rank == self._place.rank:
            return True
        if cause.host != self._host:
            return self._place.local_rank == 0
        return cause.silent and self._place.local_rank == (0 if cause.local_rank else 1)

    def _end(self, text: str, code: int) -> NoReturn:
        """Print, let the others end, and go without waiting for anything that may wait for a rank."""
        # where nobody reads what is printed
        late = threading.Timer(failure_hub.PRINTING + failure_hub.ENDING, os._exit, (code,))
        late.daemon = True
        late.start()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
            terminal = self._terminal or sys.stderr
            if text:
                terminal.write(("\n" if terminal.isatty() else "") + text)
            terminal.flush()
        with contextlib.suppress(BaseException):
            if self._line:
                self._line.send({"printed": True})
            if self._hub and self._hub.is_alive():
                late.cancel()
                self._hub.done.wait(failure_hub.PRINTING + failure_hub.ARRIVING)
        with contextlib.suppress(BaseException):
            for give_back in _BEFORE_THE_END:
                give_back()
        os._exit(code)


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code:
        return error.code & 0xFF or 1
    return 1


def _is_echo(error: BaseException) -> bool:
    """Whether this is what ranks see of the end of another: a collective that failed."""
    if isinstance(error, PeerFailed) or type(error).__module__ == "torch.distributed":
        return True
    if error.__cause__ is not None and _is_echo(error.__cause__):
        return True  # in other words
    return isinstance(error, RuntimeError) and any(word in describe(error) for word in _ECHOES)


def _is_harmless(error: BaseException) -> bool:
    """Whether it ended a thread of a library that only shows or sends what a run has to say."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.split(".")[0] in _HARMLESS_THREADS for name in modules)


def _traceback(error: BaseException) -> str:
    try:
        return _short("".join(traceback.format_exception(error)), 20_000)
    except BaseException:  # no memory left for it, or an exception whose own methods fail
        return ""


def _short(text: str, longest: int = LONGEST) -> str:
    left_out = len(text) - longest
    if left_out <= 0:
        return text
    return f"{text[: longest // 2]}\n[... {left_out:,} characters left out ...]\n{text[-longest // 2 :]}"


def _write_error_file(cause: Cause, place: Place) -> None:
    """What torchrun shows as a rank's failure at its end; the root cause is the earliest."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        own = cause.rank == place.rank
        message = str(cause) if own else f"ended because of {cause}"
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as stream:
            json.dump({"message": message, "timestamp": int(cause.time) + (not own)}, stream)
