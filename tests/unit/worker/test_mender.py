# SPDX-License-Identifier: MIT
"""The mender: connections that die are replaced, and I/O that waits too long fails until a server is back."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

import pytest

from nbdd.errors import (
    Busy,
    ConnectFailed,
    KernelError,
    NotAttached,
)
from nbdd.protocol import Flags
from tests.fakes.kernel import FakeKernel
from tests.fakes.servers import HAS_FLAGS, MIB, Server, offers
from tests.fakes.worker_process import (
    MULTI,
    NAME,
    SILENT,
    BindBefore,
    Serve,
    WorkerDriver,
    cut,
    gone,
    in_turn,
    until,
    wire,
)


def test_mender_reports_and_replaces_dead_connection(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        for number in (1, 2, 3):
            cut(server)
            message, fds = worker.event()
            assert (message["event"], message["live"], message["error"], fds) == ("connections", 0, "ConnectFailed", 0)
            message, fds = worker.event()
            assert (message["live"], message["reconnects"], "error" in message, fds) == (1, number, False, 1)
    assert [detail for what, detail in kernel.asked if what == "replace"] == [1, 1, 1]


def test_mender_replaces_only_dead_connection_of_several(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        worker.order("attach", definition=wire(server, connections=3), resume=False)
        cut(server, 1)
        assert worker.event_with(live=2)
        message, fds = worker.event()
        assert (message["live"], message["reconnects"], fds) == (3, 1, 3)
        assert len(server._conns) == 4
    assert ("replace", 1) in kernel.asked


def test_mender_replaces_connections_that_die_together(worker: WorkerDriver) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        worker.order("attach", definition=wire(server, connections=4), resume=False)
        for number in range(4):
            cut(server, number)
        assert worker.event_with(reconnects=4)["live"] == 4


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (offers({b"": 2 * MIB}), "the size was 1048576 and is 2097152"),
        (offers({b"": MIB}, HAS_FLAGS | int(Flags.NBD_FLAG_READ_ONLY)), "the flags was"),
    ],
)
def test_mender_refuses_changed_export_until_it_is_the_same_again(
    worker: WorkerDriver, kernel: FakeKernel, other: Serve, what: str
) -> None:
    good = offers({b"": MIB})
    with Server(in_turn(good, other, other, other, good)) as server:
        worker.order("attach", definition=wire(server), resume=False)
        cut(server)
        message = worker.event_with(error="ExportChanged")
        assert "came back as something else, and is not used" in message["message"]
        assert what in message["message"]
        assert message["live"] == 0
        assert ("replace", 1) not in kernel.asked
        assert worker.event_with(live=1)["reconnects"] == 1
        assert kernel.asked.count(("replace", 1)) == 1


def test_mender_retries_and_orders_are_obeyed_meanwhile(worker: WorkerDriver) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
    for _ in range(5):
        message = worker.event_with(event="connections")
        assert (message["error"], message["live"]) == (ConnectFailed.__name__, 0)
    worker.order("set-timeout", seconds=4)
    worker.order("detach", binding=None, force=False)


def test_mender_waiting_for_silent_server_delays_no_order(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(in_turn(offers({b"": MIB}), SILENT)) as server:
        worker.order("attach", definition=wire(server), resume=False)
        worker.wait_idle()
        cut(server)
        mending = worker.child()
        assert worker.order("ping") == {}
        assert worker.order("statistics")["statistics"]["in-flight"] == 1
        worker.order("set-timeout", seconds=12)
        assert ("timeout", 12) in kernel.asked
        assert mending in worker.children()


def test_dead_timeout_warns_then_fails_io_until_server_is_back(worker: WorkerDriver, kernel: FakeKernel) -> None:
    mood = [offers({b"": MIB})]

    def serve(conn: socket.socket) -> None:
        mood[0](conn)

    with Server(serve) as server:
        worker.order("attach", definition=wire(server, dead_timeout=1), resume=False)
        good, mood[0] = mood[0], socket.socket.close
        cut(server)
        assert worker.event_with(error="ConnectFailed")["lost"] > 0
        assert "reads and writes that wait fail in " in worker.event_with(event="warning")["message"]
        report = worker.event_with(failing=True)
        assert (report["error"], report["live"]) == ("TimedOut", 0)
        assert report["message"].startswith("No server came back within 1 s")
        kernels = kernel.connections[NAME][0]
        kernels.settimeout(10)
        kernels.sendall(bytes.fromhex("25609513 0000 0000 1122334455667788 0000000000000000 00001000"))
        assert kernels.recv(100) == bytes.fromhex("67446698 00000005 1122334455667788"), "EIO, for that request"
        mood[0] = good
        # Our end closes first, or the kernel would not take another connection in its place.
        assert kernels.recv(1) == b""
        kernels.shutdown(socket.SHUT_RDWR)
        report = worker.event_with(live=1)
        assert (report["failing"], report["lost"]) == (False, 0)


def test_dead_timeout_goes_on_in_successor(worker: WorkerDriver, start_worker: Callable[[], WorkerDriver]) -> None:
    with Server(in_turn(offers({b"": MIB}), socket.socket.close)) as server:
        definition = wire(server, dead_timeout=3600)
        binding = worker.order("attach", definition=definition, resume=False)
        cut(server)
        lost = worker.event_with(error="ConnectFailed")["lost"]
        worker.disconnect()
        successor = start_worker()
        long_ago = {**binding, "live": 0, "lost": lost - 3600}
        successor.order("adopt", definition=definition, binding=long_ago)
        assert successor.event_with(failing=True)["error"] == "TimedOut"


def test_dead_timeout_shortened_holds_now_and_after_next_death(worker: WorkerDriver) -> None:
    good = offers({b"": MIB})
    with pytest.raises(NotAttached):
        worker.order("shorten-dead-timeout", seconds=1)
    with Server(in_turn(good, socket.socket.close)) as server:
        worker.order("attach", definition=wire(server, dead_timeout=3600), resume=False)
        assert worker.order("shorten-dead-timeout", seconds=600) == {"dead-timeout": 600}
        assert worker.order("shorten-dead-timeout", seconds=900) == {"dead-timeout": 600}, "never later"
        cut(server)
        assert worker.event_with(error="ConnectFailed")["lost"] > 0
        assert worker.order("shorten-dead-timeout", seconds=1) == {"dead-timeout": 1}
        assert worker.event_with(failing=True)["error"] == "TimedOut"
        assert worker.order("shorten-dead-timeout", seconds=1) == {"dead-timeout": 1}


def test_detach_ends_mending(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(in_turn(offers({b"": MIB}), SILENT)) as server:
        worker.order("attach", definition=wire(server), resume=False)
        worker.wait_idle()
        cut(server)
        mending = worker.child()
        worker.order("detach", binding=None, force=False)
        until(lambda: gone(mending))
        until(lambda: not worker.children())
    assert kernel.bound == {}
    assert [message["error"] for message, _ in worker.events] == ["ConnectFailed"]


def test_detach_refused_lets_mending_begin_again(start_worker: Callable[[], WorkerDriver], kernel: FakeKernel) -> None:
    kernel.settings["MEND_SECONDS"] = 1.0
    worker = start_worker()
    good = offers({b"": MIB})
    kernel.refusals["disconnect"] = Busy("in use")
    with Server(in_turn(good, SILENT, good)) as server:
        worker.order("attach", definition=wire(server), resume=False)
        worker.wait_idle()
        cut(server)
        worker.child()
        with pytest.raises(Busy):
            worker.order("detach", binding=None, force=False)
        assert worker.event_with(live=1)["reconnects"] == 1
    assert kernel.asked.count(("replace", 1)) == 1


def test_detach_does_not_mend_connections_that_it_ends(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        kernel.after["disconnect"] = threading.Event()
        number = worker.send("detach", binding=None, force=False)
        kernel.wait_for("disconnect")
        assert worker.order("ping") == {}
        kernel.after["disconnect"].set()
        worker.reply(number)
    assert worker.events == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_mender_child_killed_leaves_no_unwatched_connection(
    worker: WorkerDriver, kernel: FakeKernel, when: str
) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        held = getattr(kernel, when)["replace"] = threading.Event()
        cut(server)
        until(lambda: "replace" in kernel.askers)
        if when == "after":
            kernel.wait_for("replace")
        os.kill(kernel.askers["replace"], signal.SIGKILL)
        assert worker.event_with(error="WorkerFailed")["live"] == 0
        held.set()
        message, fds = worker.event()
        while "error" in message:
            message, fds = worker.event()
        assert (message["live"], message["reconnects"], fds) == (1, 1, 1)
        # The newest, which is watched, is the one that the kernel has.
        assert kernel.live(NAME) == 1
        assert kernel.connections[NAME][0].getsockname() == server._conns[-1].getpeername()
        cut(server)
        assert worker.event_with(live=0)
        assert worker.event_with(live=1)


def test_handover_during_detach_leaves_no_connection_behind(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.refusals["disconnect"] = Busy("in use")
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        held = kernel.before["replace"] = threading.Event()
        kernel.after["replace"] = threading.Event()
        cut(server)
        until(lambda: "replace" in kernel.askers)
        os.kill(worker.pid, signal.SIGSTOP)
        held.set()
        kernel.wait_for("replace")
        number = worker.send("detach", binding=None, force=False)
        os.kill(worker.pid, signal.SIGCONT)
        with pytest.raises(Busy):
            worker.reply(number)
        kernel.after["replace"].set()
        assert worker.event_with(live=1)
        assert kernel.live(NAME) == 1
        assert kernel.connections[NAME][0].getsockname() == server._conns[-1].getpeername()


def test_mender_kills_hung_child_and_tries_again(start_worker: Callable[[], WorkerDriver], kernel: FakeKernel) -> None:
    kernel.settings["MEND_DEADLINE"] = 0.3
    worker = start_worker()
    with Server(in_turn(offers({b"": MIB}), SILENT, offers({b"": MIB}))) as server:
        worker.order("attach", definition=wire(server), resume=False)
        worker.wait_idle()
        cut(server)
        os.kill(worker.child(), signal.SIGSTOP)
        assert worker.event_with(error="WorkerFailed")["live"] == 0
        assert worker.event_with(live=1)["reconnects"] == 1


def test_mender_goes_on_after_failed_forks(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server, live=0)
        kernel.settings.update(forks=2, forks_after=1)
        worker = start_worker()
        assert worker.order("adopt", definition=wire(server), binding=binding)["live"] == 0
        assert worker.event_with(error="WorkerFailed")["live"] == 0
        assert worker.event_with(error="WorkerFailed")["live"] == 0
        assert worker.event_with(live=1)["reconnects"] == 1


def test_mender_reports_why_connection_ended(worker: WorkerDriver) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert worker.event_with(live=0)["message"] == f"A connection to {server.uri()} ended: the server closed it."


def test_mender_reports_kernel_refusal_and_tries_again(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.refusals["replace"] = KernelError("no")
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert worker.event_with(error="KernelError")["live"] == 0
        kernel.refusals.clear()
        assert worker.event_with(live=1)


def test_worker_exits_0_if_device_was_ended_by_others(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.refusals["replace"] = NotAttached("gone")
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert worker.ended() == 0
