# SPDX-License-Identifier: MIT
"""Connections, if the worker and the kernel do not agree about them: the number reported is right in the end.

The fake kernel here keeps its slots as drivers/block/nbd.c does: one is free for a new connection only once the kernel
itself has seen the old one die, which it reports, and what finds no free slot is dropped without an error.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from nbdd.config.definition import Definition
from nbdd.errors import Busy
from nbdd.ipc.channel import Message
from nbdd.server.connect import Deadline
from nbdd.server.connections import open_connections
from nbdd.worker import replacement
from nbdd.worker.binding import Binding
from nbdd.worker.request import Request
from tests.fakes.kernel import SECONDS, FakeKernel
from tests.fakes.servers import MIB, Server, offers
from tests.fakes.worker_process import (
    MULTI,
    NAME,
    SILENT,
    ForkServerProcess,
    WorkerDriver,
    cut,
    in_turn,
    until,
    wire,
    workers,
)


class SlotKernel(FakeKernel):
    """`lag` is how many seconds after a connection's death it sees that."""

    def reset(self) -> None:
        super().reset()
        self.lag = 0.0
        self.dead: set[socket.socket] = set()
        self._over = False

    def clean(self) -> None:
        self._over = True
        super().clean()

    def living(self) -> int:
        """How many slots have a connection that lives, as far as it has seen."""
        return len([sock for sock in self.connections[NAME] if sock not in self.dead])

    def _bind(self, question: Message, sockets: list[socket.socket]) -> Any:
        node = super()._bind(question, sockets)
        for sock in sockets:
            self._receive(sock)
        return node

    def _replace(self, question: Message, sockets: list[socket.socket]) -> Any:
        connections = self.connections[question["name"]]
        for number, connection in enumerate(connections):
            if sockets and connection in self.dead:
                connection.close()
                connections[number] = sockets.pop(0)
                self._receive(connections[number])
        for sock in sockets:
            sock.close()

    def _receive(self, sock: socket.socket) -> None:
        """recv_work: until the connection ends."""

        def work() -> None:
            poll = select.poll()
            with suppress(ValueError, OSError):
                poll.register(sock, select.POLLRDHUP)
                while not self._over and not poll.poll(50):
                    pass
            time.sleep(self.lag)
            self.dead.add(sock)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            if not self._over:
                self.report(0)

        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()


@pytest.fixture
def kernel() -> Iterator[SlotKernel]:
    kernel = SlotKernel()
    kernel.settings.update(QUIET_SECONDS=0.01, RESEND_SECONDS=0.01, LATE_SECONDS=0.3)
    yield kernel
    kernel.close()


@pytest.fixture
def start_worker(kernel: SlotKernel) -> Iterator[Callable[[], WorkerDriver]]:
    fork_server = ForkServerProcess(kernel)
    with workers(kernel, fork_server) as make:
        yield make
    fork_server.close()


def settled(worker: WorkerDriver, kernel: SlotKernel, live: int) -> Message:
    """Wait until so many connections are reported and there, and no child is left; returns the last report."""
    report: Message = {"live": None}
    end = time.monotonic() + SECONDS
    while report["live"] != live or kernel.living() != live or worker.children():
        assert time.monotonic() < end, (report, kernel.living())
        worker.sock.settimeout(0.2)
        with suppress(TimeoutError):
            message, _ = worker.event()
            report = message if message["event"] == "connections" else report
    worker.sock.settimeout(SECONDS)
    return report


def known(binding: Message, report: Message) -> Message:
    """The manager's copy of the binding, with the last report."""
    return {**binding, **{key: report[key] for key in ("live", "reconnects", "uri", "lost", "size", "export")}}


@pytest.mark.parametrize("lag", [0.0, 0.05, 0.2])
def test_death_seen_late_by_kernel_costs_one_more_attempt(
    start_worker: Callable[[], WorkerDriver], kernel: SlotKernel, lag: float
) -> None:
    worker = start_worker()
    kernel.lag = lag
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        cut(server)
        settled(worker, kernel, 1)
        cut(server)
        assert worker.event_with(live=0), "the one that the kernel has is the one that is watched"
        settled(worker, kernel, 1)


@pytest.mark.parametrize("slow", [0.0, 1.6])
def test_error_server_of_successor_is_not_counted_as_connection(
    start_worker: Callable[[], WorkerDriver], kernel: SlotKernel, slow: float
) -> None:
    good, away = offers({b"": MIB}), threading.Event()

    def serve(conn: socket.socket) -> None:
        if away.is_set():
            conn.close()
            return
        time.sleep(slow)
        good(conn)

    first = start_worker()
    with Server(serve) as server:
        definition = wire(server, dead_timeout=2)
        binding = first.order("attach", definition=definition, resume=False)
        away.set()
        cut(server)
        assert first.event_with(failing=True)
        first.disconnect()
        worker = start_worker()
        worker.order("adopt", definition=definition, binding={**binding, "live": 0, "lost": time.monotonic() - 100})
        assert worker.event_with(failing=True)
        away.clear()
        assert settled(worker, kernel, 1)["lost"] == 0


def test_error_server_dropped_by_kernel_shows_that_it_has_connections(
    start_worker: Callable[[], WorkerDriver], kernel: SlotKernel
) -> None:
    worker = start_worker()
    # A server for one client at a time, as qemu-nbd is by default: the successor gets no connection to offer.
    with Server(in_turn(offers({b"": MIB}), offers({b"": MIB}), SILENT)) as server:
        definition = wire(server, dead_timeout=2)
        binding = worker.order("attach", definition=definition, resume=False)
        held = kernel.after["replace"] = threading.Event()
        cut(server)
        report = worker.event_with(live=0)
        kernel.wait_for("replace")
        os.kill(worker.pid, signal.SIGKILL)
        worker.ended()
        held.set()
        del kernel.after["replace"]
        successor = start_worker()
        successor.order("adopt", definition=definition, binding=known(binding, report))
        report = successor.event_with(live=1)
        assert (report["lost"], report["failing"], kernel.living()) == (0, False, 1)


def test_handover_cancelled_is_not_counted_as_connection(
    start_worker: Callable[[], WorkerDriver], kernel: SlotKernel
) -> None:
    first = start_worker()
    with Server(offers({b"": MIB}, MULTI)) as server:
        definition = wire(server, connections=2)
        binding = first.order("attach", definition=definition, resume=False)
        first.disconnect()
        worker = start_worker()
        worker.order("adopt", definition=definition, binding=binding)
        kernel.wait_for("replace")
        until(lambda: not worker.children())
        held = kernel.after["replace"] = threading.Event()
        kernel.refusals["disconnect"] = Busy("in use")
        kernel.connections[NAME][0].shutdown(socket.SHUT_RDWR)
        kernel.wait_for("replace", 2)
        number = worker.send("detach", binding=None, force=False)
        with pytest.raises(Busy):
            worker.reply(number)
        held.set()
        del kernel.after["replace"]
        settled(worker, kernel, 2)
        kernel.connections[NAME][1].shutdown(socket.SHUT_RDWR)
        assert worker.event_with(live=1), "it is watched"
        settled(worker, kernel, 2)


def test_resize_killed_while_size_is_set_leaves_known_connections(
    start_worker: Callable[[], WorkerDriver], kernel: SlotKernel
) -> None:
    worker = start_worker()
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}), SILENT)) as server:
        definition = wire(server, dead_timeout=2)
        binding = worker.order("attach", definition=definition, resume=False)
        held = kernel.after["size"] = threading.Event()
        worker.send("resize")
        kernel.wait_for("size")
        assert worker.event_with(live=0)
        report, connections = worker.event()
        assert (report["live"], report["lost"], connections) == (1, 0, 1), "the manager has them before the size is set"
        os.kill(worker.pid, signal.SIGKILL)
        worker.ended()
        held.set()
        assert known(binding, report)["export"]["size"] == 2 * MIB


def test_exchange_raises_short_dead_timeout_meanwhile(
    start_worker: Callable[[], WorkerDriver], kernel: SlotKernel
) -> None:
    worker = start_worker()
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server, dead_timeout=0), resume=False)
        worker.order("reconnect")
    asked = [asked for asked in kernel.asked if asked[0] not in ("bind", "adopt")]
    assert asked == [("dead_timeout", replacement.EXCHANGE_PATIENCE), ("replace", 1), ("dead_timeout", 0)]


def test_mend_does_not_take_refused_server_because_next_can_not_be_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Server(offers({b"": MIB})) as other, Server(offers({b"": MIB})) as unseen:

        def look(_node: object, connections: Any, _size: int) -> None:
            if str(connections.uri) == str(other.uri()):
                raise replacement._changed(connections, "the UUID of its filesystem was one and is two")
            raise replacement._CannotCompare(connections.uri, "It is slow.")

        monkeypatch.setattr(replacement, "_look_same", look)
        definition = Definition(NAME, (other.uri(), unseen.uri()))
        with open_connections(definition, Deadline(SECONDS)) as connections:
            binding = Binding(0, "", connections.export, connections=1, live=0)
        warnings: list[Message] = []
        request = Request({}, NAME, definition, binding, ())
        with replacement._open_same(
            request, definition, report=lambda message, _: warnings.append(message)
        ) as connections:
            assert str(connections.uri) == str(unseen.uri())
        assert [warning["event"] for warning in warnings] == ["warning"]
