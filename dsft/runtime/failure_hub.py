"""Where all ranks' failures meet: the hub on rank 0, and what is said to it and by it.

A `Cause` is why a run ends, a `Channel` carries it, and the `Hub` decides whose failure was first, lets that rank
print, and then ends the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

GRACE = 2.0
"""Seconds that a failed collective waits for the failure of another rank, which is likely its cause."""
HUSHING = 0.5
"""Seconds that the other ranks have to fall silent before the rank that failed prints."""
PRINTING = 3.0
"""Seconds that the rank which failed has for its message before the others are ended."""
ENDING = 2.0
"""Seconds that rank 0 waits for the others to be gone before it goes itself."""
ARRIVING = 5.0
"""The same, where some rank has not come yet and would wait for rank 0 in vain."""
LONGEST = 2_000
"""Characters of a message that travel; of a longer one the beginning and the end are kept."""


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


def gone(rank: int, local_rank: int, host: str) -> Cause:
    """The cause where a rank's connection ended before the rank had said anything."""
    message = "the process ended without a word: killed (for lack of memory? see dmesg), or crashed (see above)"
    return Cause(rank, local_rank, host, message, 1, silent=True)


def describe(error: BaseException) -> str:
    """Type and message of an exception; its type alone where the message is empty or cannot be had."""
    name = type(error).__name__
    try:
        text = str(error).strip()
    except Exception:
        text = ""
    return f"{name}: {text}" if text else name


class Channel:
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


class Hub(threading.Thread):
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
        self._ranks: dict[int, tuple[Channel, dict[str, Any]]] = {}
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
            channel = Channel(self._server.accept()[0])
            self._selector.register(channel.socket, selectors.EVENT_READ, channel)

    def _read(self, channel: Channel) -> None:
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

    def _greet(self, channel: Channel, message: dict[str, Any]) -> int:
        rank = message["hello"]
        if message["token"] != self.token or message["size"] != self._size or rank in self._ranks:
            channel.send({"refused": True})
            raise ValueError(rank)
        self._ranks[rank] = channel, message
        self._came.add(rank)
        channel.send({"welcome": True})
        if self._ending and self._cause is not None:
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

    def _hung_up(self, channel: Channel, rank: int | None) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(channel.socket)
        channel.close()
        if rank is None:
            return
        _, about = self._ranks.pop(rank)
        self._is_silent(rank)
        if self._cause is None:
            self._offer(gone(rank, about["local_rank"], about["host"]))
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
        assert self._cause is not None, "somebody prints what has failed"
        if self._cause.rank in self._ranks:
            self._ranks[self._cause.rank][0].send({"cause": asdict(self._cause)})
            self._deadline = time.monotonic() + PRINTING
        else:
            self._end_others()

    def _speak_for_it(self) -> None:
        """The rank that failed could not print, or was killed before it could: another one repeats its message."""
        assert self._cause is not None, "its rank has gone"
        self._cause = replace(self._cause, silent=True)
        self._end_others()

    def _end_others(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._deadline = time.monotonic() + (ENDING if len(self._came) == self._size else ARRIVING)
        for rank, (channel, _) in self._ranks.items():
            if self._cause is not None and rank != self._cause.rank:
                channel.send({"cause": asdict(self._cause)})
        self._look_round()

    def _too_late(self) -> None:
        self._deadline = None
        if self._cause is None:
            assert self._held is not None, "a deadline waits for a better cause than the held one"
            self._offer(replace(self._held, echo=False))
        elif not self._printing:
            self._let_print()
        elif not self._ending:
            self._speak_for_it()
        else:
            self.done.set()
