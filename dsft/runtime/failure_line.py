"""A rank's connection to the hub: how it finds rank 0, says that it failed, and hears that another one did."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from dsft.errors import UserError
from dsft.runtime import failure_hub
from dsft.runtime.failure_hub import Cause, Channel, Hub, describe, gone
from dsft.runtime.place import Place, port_taken

MEETING = timedelta(minutes=10)
"""How long a rank waits for rank 0 to be there: for the slowest host to start its first process."""
HANDSHAKE = timedelta(seconds=5)
"""How long the store may take to answer before it is looked for anew."""
VERDICT = 5.0
"""Seconds that a rank waits for rank 0's word before it prints its own failure regardless."""


class Line(threading.Thread):
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
        hub: Hub | None,
    ):
        super().__init__(name="dsft-failure-line", daemon=True)
        self._place, self._host, self._hush, self._told, self._hub = place, host, hush, told, hub
        self._channel: Channel | None = None
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
        assert self._channel is not None, "it has connected"
        while (messages := self._channel.receive()) is not None:
            for message in messages:
                self._hear(message)
                if "bye" in message:
                    self._mine.set()  # should this rank fail now, it need not ask
                    return
        self._told(gone(0, 0, self._main_host))

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
            self._hub.done.wait(failure_hub.ENDING)

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
        about: dict[str, Any] | None
        if self._hub:
            about = {"port": self._hub.port, "token": self._hub.token}
            addresses = "localhost", self._host
        else:
            try:
                about = _published(self._place)
            except OSError as error:
                return self._alone(error)
            if about is None:
                return gone(0, 0, self._host)
            self._main_host = about["host"]
            addresses = self._place.master_addr, about["host"]
        channel = Channel(_dial(*addresses, about["port"]))
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


def publish(place: Place, host: str, hub: Hub) -> Any:
    """Put the hub's address into the rendezvous store, and return the store, which is open while it is referred to.

    Raises:
        UserError: The port on which ranks meet is taken.
    """
    store = _store(place, hosts=True)
    store.set(_key(), json.dumps({"port": hub.port, "host": host, "token": hub.token}))
    return store


def _store(place: Place, hosts: bool) -> Any:
    """The rendezvous store of torch.distributed; in rank 0's process, `join` will find and use the same."""
    from torch import distributed

    dist: Any = distributed
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


def _dial(first: str, second: str, port: int) -> socket.socket:
    """A connection to the first address that answers."""
    try:
        connection = socket.create_connection((first, port), 10)
    except OSError:
        connection = socket.create_connection((second, port), 10)
    connection.settimeout(None)
    return connection
