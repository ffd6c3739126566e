# SPDX-License-Identifier: MIT
"""A kernel for real workers and their children: it lives in the test, and they call it over a socket.

As a program, ``python -m tests.fakes.kernel FD``, this is nbdd's own fork server with that kernel under it.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import nbdd.worker.attached
import nbdd.worker.forkserver
import nbdd.worker.mender
import nbdd.worker.operations
import nbdd.worker.replacement
import nbdd.worker.request
import nbdd.worker.worker
from nbdd.errors import NbddError, NotAttached
from nbdd.ipc.channel import Channel, Message
from nbdd.kernel.sockets import hung_up

SECONDS = 30.0
PLACE = "NBDD_FAKE_KERNEL"
"""The environment variable that says where it listens."""

COUNTED = {
    "read-requests": 10, "write-requests": 20, "read-sectors": 30, "write-sectors": 40,
    "busy-milliseconds": 50, "in-flight": 1, "read-milliseconds": 60, "write-milliseconds": 70,
}  # fmt: skip


class FakeKernel:
    """What is bound, what was asked, and what shall go wrong. Names of questions: bind, adopt, replace and so on."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="nbd-")
        self.path = str(Path(self._directory.name, "kernel"))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._calls: set[socket.socket] = set()
        self.reset()
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """Forget everything, as after a boot."""
        self.bound: dict[str, Message] = {}
        """Name to what its node says."""
        self.connections: dict[str, list[socket.socket]] = defaultdict(list)
        """The kernel's own hold of the sockets."""
        self.asked: list[tuple[str, Any]] = []
        self.askers: dict[str, int] = {}
        """Who asked last: question to process id."""
        self.refusals: dict[str, NbddError] = {}
        self.claims: list[str] = []
        self.reports: list[socket.socket] = []
        self.before: dict[str, threading.Event] = {}
        """A question is answered, and acted upon, when its event is set ..."""
        self.after: dict[str, threading.Event] = {}
        """... or acted upon, and answered when it is set."""
        self.settings: dict[str, Any] = {}
        """Module constants for workers that begin now. `forks` fails so many of their forks, after the first
        `forks_after`; `stuck`: see `FakeKernelDevice.bind`."""

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._directory.cleanup()

    def clean(self) -> None:
        """Let go of all sockets, once the workers are gone."""
        for event in (*self.before.values(), *self.after.values()):
            event.set()
        for thread in self._threads:
            thread.join(SECONDS)
        self._threads.clear()
        for sock in (*self.reports, *(sock for connections in self.connections.values() for sock in connections)):
            sock.close()
        self.reset()

    # For the test

    def wait_for(self, what: str, times: int = 1) -> None:
        """Wait until it was asked for, and acted upon, so often."""
        with self._news:
            enough = self._news.wait_for(lambda: [name for name, _ in self.asked].count(what) >= times, SECONDS)
        assert enough, what

    def report(self, index: int) -> None:
        """Report to all listeners that a connection of this device died."""
        for sock in list(self.reports):
            with suppress(OSError):  # nobody listens there any more
                sock.send(bytes([index]))

    def listeners(self) -> int:
        """How many listen for reports."""
        return len([sock for sock in self.reports if not hung_up(sock)])

    def live(self, name: str) -> int:
        """How many connections of the device live."""
        return len([sock for sock in self.connections[name] if not hung_up(sock)])

    # For the workers

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(conn,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, conn: socket.socket) -> None:
        found = Channel(conn).wait()
        if found is None:
            conn.close()  # It was killed before it asked.
            return
        question, fds = found
        what = question["what"]
        self.askers[what] = question["pid"]
        sockets = [socket.socket(fileno=fd) for fd in fds]
        if what == "reports":
            self.reports.append(conn)
            conn.send(b"+")
            return
        if what in self.before:
            self.before[what].wait(SECONDS)
        if hung_up(conn):
            # Nobody asks any more: it was killed over it.
            answer: Message = {}
            for sock in sockets:
                sock.close()
        else:
            answer = self._answer(what, question, sockets)
        if what in self.after:
            self.after[what].wait(SECONDS)
        with suppress(OSError):
            Channel(conn).send(answer)
        conn.close()

    def _answer(self, what: str, question: Message, sockets: list[socket.socket]) -> Message:
        try:
            if what in self.refusals:
                raise self.refusals[what]
            answer: Message = {"answer": getattr(self, f"_{what}")(question, sockets)}
        except NbddError as error:
            for sock in sockets:
                sock.close()
            answer = error.to_wire()
        with self._news:
            if "detail" in question:
                self.asked.append((what, question["detail"]))
            self._news.notify_all()
        return answer

    def _settings(self, _question: Message, _sockets: list[socket.socket]) -> Any:
        return self.settings

    def _find(self, question: Message, _sockets: list[socket.socket]) -> Any:
        return [self.bound[question["name"]]] if question["name"] in self.bound else []

    def _users(self, _question: Message, _sockets: list[socket.socket]) -> Any:
        return self.claims

    def _statistics(self, question: Message, _sockets: list[socket.socket]) -> Any:
        return next((node["counted"] for node in self.bound.values() if node["index"] == question["index"]), {})

    def _bind(self, question: Message, sockets: list[socket.socket]) -> Any:
        asked = question["detail"]
        self.connections[question["name"]] = sockets
        self.bound[question["name"]] = node = {
            "index": asked["index"] or 0,
            "path": f"/dev/nbd{asked['index'] or 0}",
            "size": asked["size"],
            "block_size": asked["block_size"],
            "read_only": asked["read_only"],
            "diskseq": 7,
            "pid": question["pid"],
            "counted": dict(COUNTED),
        }
        return node

    def _adopt(self, question: Message, _sockets: list[socket.socket]) -> Any:
        node = self.bound.get(question["name"])
        index, diskseq = question["detail"]
        same = node is not None and diskseq in (None, node["diskseq"]) and question["bound_by"] in (None, node["pid"])
        if node is None or node["index"] != index or not same:
            raise NotAttached(f"/dev/nbd{index} is not bound any more.")
        return node

    def _replace(self, question: Message, sockets: list[socket.socket]) -> Any:
        connections = self.connections[question["name"]]
        for number, connection in enumerate(connections):
            if sockets and hung_up(connection):
                connection.close()
                connections[number] = sockets.pop(0)
        for sock in sockets:
            sock.close()  # The kernel throws away what it needs not.

    def _stuck(self, _question: Message, _sockets: list[socket.socket]) -> Any:
        return None

    def _size(self, question: Message, _sockets: list[socket.socket]) -> Any:
        self.bound[question["name"]]["size"] = question["detail"]

    def _dead_timeout(self, _question: Message, _sockets: list[socket.socket]) -> Any:
        return None

    def _timeout(self, _question: Message, _sockets: list[socket.socket]) -> Any:
        return None

    def _disconnect(self, question: Message, _sockets: list[socket.socket]) -> Any:
        if self.bound.pop(question["name"], None) is None:
            raise NotAttached("gone")
        for sock in self.connections.pop(question["name"], []):
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        return ["blkid (5)"] if question["detail"]["force"] else []


def node(index: int, size: int, block_size: int, *, read_only: bool = False) -> Message:
    """What `FakeKernel.bound` holds for a device."""
    return {
        "index": index, "path": f"/dev/nbd{index}", "size": size, "block_size": block_size, "read_only": read_only,
        "diskseq": 7, "pid": 11, "counted": dict(COUNTED),
    }  # fmt: skip


# On the other side: what workers and children have instead of nbdd.kernel.


def ask(what: str, fds: Sequence[int] = (), **question: Any) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(os.environ[PLACE])
        channel = Channel(sock)
        channel.send({"what": what, "pid": os.getpid(), **question}, fds)
        found = channel.wait()
    assert found is not None
    answer, _ = found
    if "error" in answer:
        raise NbddError.from_wire(answer)
    return answer["answer"]


def shown(said: Message) -> SimpleNamespace:
    """What `nbdd.kernel.sysfs.Node` says of a device."""
    return SimpleNamespace(**said, statistics=lambda: said["counted"])


def find(backend: str) -> list[SimpleNamespace]:
    return [shown(said) for said in ask("find", name=backend)]


class FakeNode:
    """`nbdd.kernel.sysfs.Node`, as far as it is made of an index."""

    def __init__(self, index: int) -> None:
        self._index = index

    def statistics(self) -> dict[str, int]:
        return cast(dict[str, int], ask("statistics", index=self._index))


class FakeUsage:
    """`nbdd.kernel.usage.Usage`."""

    def users(self, node: Any) -> list[str]:
        return cast(list[str], ask("users", index=node.index))


class FakeReports:
    """`nbdd.kernel.LinkDeadMonitor`."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(os.environ[PLACE])
        Channel(self._sock).send({"what": "reports", "pid": os.getpid()})
        assert self._sock.recv(1) == b"+"

    def fileno(self) -> int:
        return self._sock.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> list[int]:
        return list(self._sock.recv(64))

    def wait(self, seconds: float) -> list[int]:
        self._sock.settimeout(seconds)
        with suppress(TimeoutError):
            return self.read()
        return []

    def close(self) -> None:
        self._sock.close()


class FakeKernelDevice:
    """`nbdd.kernel.binding.KernelDevice`."""

    stuck = False

    def __init__(self, backend: str, *, sockets: Sequence[socket.socket] = (), **arguments: Any) -> None:
        self._name = backend
        self._sockets = list(sockets)
        self._arguments = arguments

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()

    def bind(self, index: int | None) -> SimpleNamespace:
        if self.stuck and os.fork() == 0:
            # A thread in the kernel that no signal reaches: it has all that its process had open, and outlives it.
            ask("stuck")
            os._exit(0)
        return shown(self._ask("bind", {**self._arguments, "index": index}, self._sockets))

    def adopt(
        self, index: int, *, diskseq: int | None = None, pid: int | None = None, sockets: Sequence[socket.socket] = ()
    ) -> SimpleNamespace:
        self._sockets = list(sockets)
        return shown(ask("adopt", name=self._name, detail=(index, diskseq), bound_by=pid))

    def replace_connections(self, sockets: Sequence[socket.socket]) -> None:
        self._ask("replace", len(sockets), sockets)

    def set_timeout(self, seconds: int) -> None:
        self._ask("timeout", seconds)

    def pace(self) -> None:
        pass

    def set_dead_timeout(self, seconds: int) -> None:
        self._ask("dead_timeout", seconds)

    def set_size(self, size: int) -> None:
        self._ask("size", size)

    def disconnect(self, *, seconds: float, force: bool = False) -> list[str]:
        return cast(list[str], self._ask("disconnect", {"force": force, "seconds": seconds}))

    def claims(self) -> list[str]:
        return cast(list[str], ask("users"))

    def watch_connections(self) -> FakeReports:
        return FakeReports()

    def _ask(self, what: str, detail: Any, sockets: Sequence[socket.socket] = ()) -> Any:
        return ask(what, [sock.fileno() for sock in sockets], name=self._name, detail=detail)


MODULES = (
    nbdd.worker.operations,
    nbdd.worker.replacement,
    nbdd.worker.request,
    nbdd.worker.attached,
    nbdd.worker.mender,
    nbdd.worker.worker,
)
"""Where workers and their children have names and constants that are replaced here."""


FAKES: dict[str, Any] = {"KernelDevice": FakeKernelDevice, "find": find, "Usage": FakeUsage, "Node": FakeNode}
"""By the names that they replace in those modules."""


def main() -> None:
    work = nbdd.worker.worker.main

    def prepared(channel: Channel, name: str) -> int:
        settings = ask("settings")
        failures, first = settings.pop("forks", 0), settings.pop("forks_after", 0)
        FakeKernelDevice.stuck = settings.pop("stuck", False)
        for key, value in settings.items():
            owners = [module for module in MODULES if hasattr(module, key)]
            assert owners, key
            for module in owners:
                setattr(module, key, value)
        fork = os.fork

        def failing() -> int:
            nonlocal failures, first
            first -= 1
            if first < 0 < failures:
                failures -= 1
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return fork()

        os.fork = failing
        return work(channel, name)

    for module in MODULES:
        for name, fake in FAKES.items():
            if hasattr(module, name):
                setattr(module, name, fake)
    for module, name, value in (
        (nbdd.worker.mender, "MEND_WAITS", (0.0, 0.01)),
        (nbdd.worker.replacement, "LATE_SECONDS", 0.01),
        (nbdd.worker.replacement, "_look_same", lambda *_: None),
        (nbdd.worker.forkserver, "work", prepared),
    ):
        setattr(module, name, value)
    nbdd.worker.forkserver.main()


if __name__ == "__main__":
    main()
