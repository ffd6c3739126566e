# SPDX-License-Identifier: MIT
"""Real workers, forked by nbdd's fork server, to be driven, killed and stopped. The kernel is a fake."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nbdd.config.definition import Definition
from nbdd.errors import (
    NbddError,
)
from nbdd.ipc.channel import Channel, Message
from nbdd.protocol import Export, Flags
from nbdd.worker.binding import Binding
from tests.fakes.kernel import PLACE, SECONDS, FakeKernel
from tests.fakes.servers import HAS_FLAGS, MIB, Server, says

MULTI = HAS_FLAGS | int(Flags.NBD_FLAG_CAN_MULTI_CONN)
NAME = "disk"

Serve = Callable[[socket.socket], None]

BindBefore = Callable[..., Message]
"""Makes a device that another worker bound, and returns its binding."""


class ForkServerProcess:
    """A fork server with the fake kernel under it."""

    def __init__(self, kernel: FakeKernel) -> None:
        ours, theirs = Channel.pair()
        ours.settimeout(SECONDS)
        self._control = Channel(ours)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.kernel", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, PLACE: kernel.path},
                cwd=Path(__file__).parents[2],
            )
        self._codes: dict[int, int] = {}

    def spawn(self, channel: socket.socket) -> int:
        self._control.send({"order": "spawn", "id": 1, "name": NAME}, [channel.fileno()])
        while (message := self._hear())["event"] != "spawned":
            pass
        return int(message["pid"])

    def code(self, pid: int) -> int:
        """How a worker ended, once the fork server has reported it."""
        while pid not in self._codes:
            self._hear()
        return self._codes.pop(pid)

    def has_reported(self, pid: int) -> bool:
        """Whether it has reported this end by now."""
        with contextlib.suppress(BlockingIOError):
            self._control.setblocking(False)
            while True:
                self._hear()
        self._control._sock.settimeout(SECONDS)
        return pid in self._codes

    def _hear(self) -> Message:
        found = self._control.pop()
        if found is None:
            assert self._control.receive(), "the fork server ended"
            return self._hear()
        message, fds = found
        for fd in fds:
            os.close(fd)
        if message["event"] == "ended":
            self._codes[message["pid"]] = message["code"]
        return message

    def close(self) -> None:
        self._control.close()
        assert self._process.wait(SECONDS) == 0


class WorkerDriver:
    """A worker, driven from the manager's end of its channel."""

    def __init__(self, fork_server: ForkServerProcess) -> None:
        self._nursery = fork_server
        ours, theirs = Channel.pair()
        ours.settimeout(SECONDS)
        self.sock = ours
        self.channel = Channel(ours)
        self.events: list[tuple[Message, int]] = []
        """Events that it sent, with the number of descriptors."""
        self._ids = itertools.count(1)
        self._code: int | None = None
        with theirs:
            self.pid = fork_server.spawn(theirs)

    def send(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> int:
        """Give an order and do not wait; returns its number."""
        number = next(self._ids)
        self.channel.send({"order": order, "id": number, **arguments}, fds)
        return number

    def order(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> Message:
        reply, back = self.order_fds(order, fds, **arguments)
        for fd in back:
            os.close(fd)
        return reply

    def order_fds(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> tuple[Message, list[int]]:
        return self.reply(self.send(order, fds, **arguments))

    def reply(self, number: int) -> tuple[Message, list[int]]:
        """The next reply, which must be to that order."""
        while True:
            found = self.channel.wait()
            assert found is not None, "the worker ended"
            if "event" not in found[0]:
                break
            self._keep(*found)
        message, back = found
        assert message.pop("id") == number
        if "error" in message:
            assert back == []
            raise NbddError.from_wire(message)
        return message, back

    def event(self) -> tuple[Message, int]:
        """The next event."""
        if not self.events:
            found = self.channel.wait()
            assert found is not None, "the worker ended"
            self._keep(*found)
        return self.events.pop(0)

    def event_with(self, **fields: Any) -> Message:
        """The next event with such fields; others are passed over."""
        while True:
            message, _ = self.event()
            if fields.items() <= message.items():
                return message

    def _keep(self, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        self.events.append((message, len(fds)))

    def children(self) -> list[int]:
        """The worker's children, the dead that it has not reaped among them."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def child(self) -> int:
        """The one child, or the next."""
        (pid,) = until(lambda: [pid for pid in self.children() if not gone(pid)])
        return int(pid)

    def wait_idle(self) -> None:
        """Wait until it has no child left."""
        until(lambda: not self.children())

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def ended(self) -> int:
        """The exit code, once it has ended by itself, and its children too."""
        if self._code is None:
            self._code = self._nursery.code(self.pid)
        return self._code

    def disconnect(self) -> int:
        """Close the channel like a manager that goes away, and wait for the end."""
        self.channel.close()
        return self.ended()


def until(look: Callable[[], Any]) -> Any:
    """What `look` returns, as soon as that is something."""
    end = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
    return found


def gone(pid: int) -> bool:
    """Whether the process has ended; an orphan may have nobody to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def workers(kernel: FakeKernel, fork_server: ForkServerProcess) -> Iterator[Callable[[], WorkerDriver]]:
    """What starts workers; they are ended in the end, and the kernel cleaned."""
    drivers: list[WorkerDriver] = []

    def make() -> WorkerDriver:
        drivers.append(WorkerDriver(fork_server))
        return drivers[-1]

    yield make
    for worker in drivers:
        worker.disconnect()
    kernel.clean()


def wire(server: Server, **fields: Any) -> dict[str, Any]:
    return Definition(NAME, (server.uri(),), **fields).to_wire()


def binding_of(index: int = 0, diskseq: int = 7) -> Message:
    """A binding that a record holds, of a device that may be there no more."""
    export = Export("", MIB, Flags.NBD_FLAG_HAS_FLAGS)
    return Binding(index, "nbd://h", export, connections=1, live=1, diskseq=diskseq).to_wire()


def cut(server: Server, number: int = -1) -> None:
    """Kill a connection from the server's side."""
    server._conns[number].shutdown(socket.SHUT_RDWR)


def in_turn(*serves: Serve) -> Serve:
    """A server that is another one for each connection; the last one stays."""
    turns = itertools.chain(serves, itertools.repeat(serves[-1]))

    def serve(conn: socket.socket) -> None:
        next(turns)(conn)

    return serve


SILENT = says(b"")
"""A server that accepts, and says nothing."""
