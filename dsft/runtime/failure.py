"""A failure on one rank ends all ranks at once, and what that rank has to say is what is seen.

Rank 0 keeps a TCP connection to every rank, from before the data is read until the run is over. A rank that fails says
so there; rank 0 decides whose failure was first, lets that rank print, and then ends the others in silence. A process
that is killed or crashes says nothing, but the kernel closes its connection. It does not close that of a process which
is busy, suspended or compiling: there is no heartbeat, no polling and no timeout that a healthy run could miss, and
nothing is sent while all is well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn

from dsft.errors import UserError
from dsft.runtime.place import Place, port_taken

MEETING = timedelta(minutes=10)
"""How long a rank waits for rank 0 to be there: for the slowest host to start its first process."""
HANDSHAKE = timedelta(seconds=5)
"""How long the store may take to answer before it is looked for anew."""
GRACE = 2.0
"""Seconds that a failed collective waits for the failure of another rank, which is likely its cause."""
HUSHING = 0.5
"""Seconds that the other ranks have to fall silent before the rank that failed prints."""
PRINTING = 3.0
"""Seconds that the rank which failed has for its message before the others are ended."""
VERDICT = 5.0
"""Seconds that a rank waits for rank 0's word before it prints its own failure regardless."""
ENDING = 2.0
"""Seconds that rank 0 waits for the others to be gone before it goes itself."""
ARRIVING = 5.0
"""The same, where some rank has not come yet and would wait for rank 0 in vain."""
LONGEST = 2_000
"""Characters of a message that travel; of a longer one the beginning and the end are kept."""

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


@dataclass(frozen=True)
class Cause:
    """Why a run ends.

    Attributes:
        rank: Who failed.
        local_rank: Its number on its host.
        host: Its host's name.
        message: What it said.
        code: Exit code of every rank.
        echo: Whether it may be no more than the consequence of another rank's end.
        silent: Whether the rank is gone and could not print anything itself.
        time: When, in seconds since 1970.
    """

    rank: int
    local_rank: int
    host: str
    message: str
    code: int
    echo: bool = False
    silent: bool = False
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.message}"


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


def describe(error: BaseException) -> str:
    """Type and message of an exception; its type alone where the message is empty or cannot be had."""
    name = type(error).__name__
    try:
        text = str(error).strip()
    except Exception:
        text = ""
    return f"{name}: {text}" if text else name


class _Watch:
    """This rank's end of the watch, and on rank 0 the hub of all ranks."""

    def __init__(self, place: Place, explain: Callable[[Exception], str | None]):
        self._place = place
        self._explain = explain
        self._host = socket.gethostname()
        self._pid = os.getpid()
        self._hub: _Hub | None = None
        self._store = None
        self._line: _Line | None = None
        self._failing = threading.Lock()
        self._done = False
        self._terminal = None  # what stderr was, once this rank has been silenced

    def begin(self) -> None:
        """Meet the other ranks, in the background but for rank 0."""
        if self._place.rank == 0:
            self._hub = _Hub(self._place.world_size)
            self._store = _store(self._place, hosts=True)
            about = {"port": self._hub.port, "host": self._host, "token": self._hub.token}
            self._store.set(_key(), json.dumps(about))
            self._hub.start()
        self._line = _Line(self._place, self._host, self._hush, self._told, self._hub)
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
        late = threading.Timer(PRINTING + ENDING, os._exit, (code,))  # where nobody reads what is printed
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
                self._hub.done.wait(PRINTING + ARRIVING)
        with contextlib.suppress(BaseException):
            for give_back in _BEFORE_THE_END:
                give_back()
        os._exit(code)


class _Channel:
    """JSON objects, one a line, over a socket."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._rest = b""
        self._sending = threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # a host that lost its power is noticed after two minutes; a shorter gap in the network is none
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        # a forked child that outlives this process must not keep the connection open
        os.register_at_fork(after_in_child=self._close_fork)

    def send(self, message: dict[str, Any]) -> None:
        """Send one object; a peer that is gone is no error, as its end is noticed elsewhere."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for bytes; the objects that are complete with them, or None at the end.

        Raises:
            ValueError: What came is no JSON, or too long for one of these objects.
        """
        try:
            data = self.socket.recv(65536)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > 16 * LONGEST:
            raise ValueError("a line without an end")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _close_fork(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.socket.detach())


class _Hub(threading.Thread):
    """On rank 0: knows every rank's connection, decides whose failure counts, and ends the others.

    Args:
        size: How many ranks there are; rank 0 itself is one of them.
    """

    def __init__(self, size: int):
        super().__init__(name="dsft-failure-hub", daemon=True)
        self._size = size
        self.token = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=max(128, size))
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._ranks: dict[int, tuple[_Channel, dict[str, Any]]] = {}
        self._came: set[int] = set()
        self._loud: set[int] = set()
        self._held: Cause | None = None
        self._cause: Cause | None = None
        self._printing = self._ending = False
        self._deadline: float | None = None
        self.done = threading.Event()
        """The others have been ended, as far as they can be."""

    def run(self) -> None:
        """Listen until rank 0 is done or all are ended."""
        while not self.done.is_set():
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            for key, _ in self._selector.select(left):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.data)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._too_late()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            channel = _Channel(self._server.accept()[0])
            self._selector.register(channel.socket, selectors.EVENT_READ, channel)

    def _read(self, channel: _Channel) -> None:
        rank = next((rank for rank, (known, _) in self._ranks.items() if known is channel), None)
        try:
            messages = channel.receive()
            if messages is None:
                self._hung_up(channel, rank)
            for message in messages or ():
                if rank is None:
                    rank = self._greet(channel, message)
                else:
                    self._heard(rank, message)
        except (ValueError, TypeError, KeyError, AttributeError):
            self._hung_up(channel, None)  # a stranger who does not speak this language

    def _greet(self, channel: _Channel, message: dict[str, Any]) -> int:
        rank = message["hello"]
        if message["token"] != self.token or message["size"] != self._size or rank in self._ranks:
            channel.send({"refused": True})
            raise ValueError(rank)
        self._ranks[rank] = channel, message
        self._came.add(rank)
        channel.send({"welcome": True})
        if self._ending:
            channel.send({"cause": asdict(self._cause)})
        return rank

    def _heard(self, rank: int, message: dict[str, Any]) -> None:
        if "failed" in message:
            self._offer(Cause(**message["failed"]))
        elif "hushed" in message:
            self._is_silent(rank)
        elif "printed" in message:
            if self._cause and rank == self._cause.rank:
                self._end_others()
        elif "bye" in message:
            self._hung_up(self._ranks.pop(rank)[0], None)
            if rank == 0:
                for channel, _ in self._ranks.values():
                    channel.send({"bye": True})
                self.done.set()

    def _hung_up(self, channel: _Channel, rank: int | None) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(channel.socket)
        channel.close()
        if rank is None:
            return
        _, about = self._ranks.pop(rank)
        self._is_silent(rank)
        if self._cause is None:
            self._offer(_gone(rank, about["local_rank"], about["host"]))
        elif rank == self._cause.rank and not self._ending:
            self._speak_for_it()
        self._look_round()

    def _look_round(self) -> None:
        """Nothing is left to do where every rank has come and is gone again."""
        if self._ending and len(self._came) == self._size and not self._ranks.keys() - {0}:
            self.done.set()

    def _offer(self, cause: Cause) -> None:
        """A failure; the first counts, but for an echo, which may be the consequence of one not heard of yet."""
        if self._cause is not None:
            return
        if cause.echo:
            self._held = self._held or cause
            self._deadline = self._deadline or time.monotonic() + GRACE
            return
        self._cause = cause
        self._loud = self._ranks.keys() - {cause.rank}
        for rank in self._loud:
            self._ranks[rank][0].send({"hush": True})
        self._deadline = time.monotonic() + HUSHING
        if not self._loud:
            self._let_print()

    def _is_silent(self, rank: int) -> None:
        if rank in self._loud:
            self._loud.remove(rank)
            if not self._loud:
                self._let_print()

    def _let_print(self) -> None:
        """The others are silent, or cannot be: now the rank that failed has the terminal to itself."""
        if self._printing:
            return
        self._printing = True
        if self._cause.rank in self._ranks:
            self._ranks[self._cause.rank][0].send({"cause": asdict(self._cause)})
            self._deadline = time.monotonic() + PRINTING
        else:
            self._end_others()

    def _speak_for_it(self) -> None:
        """The rank that failed could not print, or was killed before it could: another one repeats its message."""
        self._cause = replace(self._cause, silent=True)
        self._end_others()

    def _end_others(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._deadline = time.monotonic() + (ENDING if len(self._came) == self._size else ARRIVING)
        for rank, (channel, _) in self._ranks.items():
            if rank != self._cause.rank:
                channel.send({"cause": asdict(self._cause)})
        self._look_round()

    def _too_late(self) -> None:
        self._deadline = None
        if self._cause is None:
            self._offer(replace(self._held, echo=False))
        elif not self._printing:
            self._let_print()
        elif not self._ending:
            self._speak_for_it()
        else:
            self.done.set()


class _Line(threading.Thread):
    """A rank's connection to the hub.

    Args:
        place: This rank's place.
        host: This host's name.
        hush: Called from this thread when another rank is about to print why the run ends.
        told: Called from this thread with another rank's failure.
        hub: On rank 0, the hub itself.
    """

    def __init__(
        self,
        place: Place,
        host: str,
        hush: Callable[[], None],
        told: Callable[[Cause], None],
        hub: _Hub | None,
    ):
        super().__init__(name="dsft-failure-line", daemon=True)
        self._place, self._host, self._hush, self._told, self._hub = place, host, hush, told, hub
        self._channel: _Channel | None = None
        self._connected, self._mine = threading.Event(), threading.Event()
        self._closed = False
        self._main_host = host

    def run(self) -> None:
        """Connect, then listen until the run ends."""
        try:
            problem = self._connect()
        except Exception as error:  # the run itself may well work
            if not self._closed:
                print(
                    f"warning: rank {self._place.rank} cannot tell rank 0 of a failure, nor hear of one "
                    f"({describe(error)}); it may then wait in vain, until its launcher ends it",
                    file=sys.stderr,
                )
            return
        if problem:
            self._told(problem)
            return
        while (messages := self._channel.receive()) is not None:
            for message in messages:
                self._hear(message)
                if "bye" in message:
                    self._mine.set()  # should this rank fail now, it need not ask
                    return
        self._told(_gone(0, 0, self._main_host))

    def report(self, cause: Cause) -> None:
        """Say that this rank failed; returns when it is for this rank to print, for else the process ends here."""
        if self._connected.wait(VERDICT):
            self.send({"failed": asdict(cause)})
            self._mine.wait(VERDICT)

    def send(self, message: dict[str, Any]) -> None:
        """Tell the hub, if there is a connection."""
        if self._channel:
            self._channel.send(message)

    def close(self) -> None:
        """Take leave of the hub; on rank 0, of all ranks."""
        self._closed = True
        self.send({"bye": True})
        if self._hub:
            self._hub.done.wait(ENDING)

    def _hear(self, message: dict[str, Any]) -> None:
        if "hush" in message:
            self._hush()
            self.send({"hushed": True})
        elif "cause" in message:
            cause = Cause(**message["cause"])
            if cause.rank == self._place.rank:
                self._mine.set()
            else:
                self._told(cause)

    def _connect(self) -> Cause | None:
        """Find the hub and greet it; what stands in the way of the run, if rank 0 is gone or the hub another run's."""
        if self._hub:
            about = {"port": self._hub.port, "host": "localhost", "token": self._hub.token}
            addresses = ["localhost", self._host]
        else:
            try:
                about = _published(self._place)
            except OSError as error:
                return self._alone(error)
            if about is None:
                return _gone(0, 0, self._host)
            self._main_host = about["host"]
            addresses = [self._place.master_addr, about["host"]]
        channel = _Channel(_dial(addresses, about["port"]))
        me = {"hello": self._place.rank, "local_rank": self._place.local_rank, "host": self._host}
        channel.send(me | {"size": self._place.world_size, "token": about["token"]})
        self._channel = channel
        answer = channel.receive()
        if answer and "refused" in answer[0]:
            return self._taken()
        self._connected.set()
        for message in (answer or [])[1:]:
            self._hear(message)
        return None

    def _alone(self, error: OSError) -> Cause:
        """Rank 0 never came: nothing but this ends a rank whose host started after rank 0 had failed."""
        place = self._place
        message = (
            f"rank 0 was not to be reached at {place.master_addr}:{place.master_port} for "
            f"{MEETING.total_seconds() / 60:.3g} minutes ({describe(error)}): it failed before, or never started"
        )
        return Cause(place.rank, place.local_rank, self._host, message, 1, silent=True)

    def _taken(self) -> Cause:
        time.sleep(VERDICT)  # rank 0 says the same, and where it is on this host, its launcher ends this rank by now
        place = self._place
        return Cause(place.rank, place.local_rank, self._host, port_taken(place), 2, silent=True)


def _store(place: Place, hosts: bool):
    """The rendezvous store of torch.distributed; in rank 0's process, `join` will find and use the same."""
    import torch.distributed as dist

    agents = dist.is_torchelastic_launched() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            place.master_addr,
            place.master_port,
            None,
            is_master=hosts and not agents,
            timeout=MEETING if hosts else HANDSHAKE,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as problem:
        if "EADDRINUSE" in str(problem):
            raise UserError(port_taken(place)) from None
        raise


def _key() -> str:
    """Where the hub's address stands in the store; a restart by torchrun meets in the same store."""
    return f"dsft/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _published(place: Place) -> dict[str, Any] | None:
    """What rank 0 has put into the store about its hub; None if rank 0 was there and is gone.

    The store's own client writes pages of complaint while nobody listens, so it comes after a bare connection.
    """
    deadline, was_there = time.monotonic() + MEETING.total_seconds(), False
    while True:
        try:
            socket.create_connection((place.master_addr, place.master_port), 5).close()
            was_there = True
            return json.loads(_store(place, hosts=False).get(_key()))
        except (OSError, RuntimeError) as error:
            if was_there and isinstance(error, ConnectionRefusedError):
                return None
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _dial(addresses: list[str], port: int) -> socket.socket:
    """A connection to the first address that answers."""
    for number, address in enumerate(addresses, 1):
        try:
            connection = socket.create_connection((address, port), 10)
        except OSError:
            if number == len(addresses):
                raise
        else:
            connection.settimeout(None)
            return connection
    raise AssertionError("no address")


def _gone(rank: int, local_rank: int, host: str) -> Cause:
    message = "the process ended without a word: killed (for lack of memory? see dmesg), or crashed (see above)"
    return Cause(rank, local_rank, host, message, 1, silent=True)


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
