# SPDX-License-Identifier: MIT
"""Reconnect and resize: all connections are exchanged, and none is lost on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest

from nbdd.errors import (
    Busy,
    KernelError,
    NegotiationFailed,
    NotAttached,
    TimedOut,
    WorkerFailed,
)
from tests.fakes.kernel import FakeKernel
from tests.fakes.servers import MIB, Server, offers
from tests.fakes.worker_process import (
    MULTI,
    NAME,
    SILENT,
    BindBefore,
    WorkerDriver,
    cut,
    in_turn,
    until,
    wire,
)


def _report_deaths(kernel: FakeKernel, connections: int = 1) -> None:
    """As the kernel does when its connections are shut down."""
    until(lambda: kernel.connections[NAME] and kernel.live(NAME) == 0)
    for _ in range(connections):
        kernel.report(0)


@pytest.fixture
def _short_waits(kernel: FakeKernel) -> None:
    kernel.settings["QUIET_SECONDS"] = 0.01
    kernel.settings["DEAD_SECONDS"] = 1.0


@pytest.mark.usefixtures("_short_waits")
def test_reconnect_opens_new_connections_before_old_ones_end(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    worker = start_worker()
    with Server(offers({b"": MIB}, MULTI)) as server:
        worker.order("attach", definition=wire(server, connections=2), resume=False)
        number = worker.send("reconnect")
        _report_deaths(kernel, 2)
        assert len(server._conns) == 4
        assert worker.event_with(live=0)["lost"]
        report, fds = worker.event()
        assert (report["live"], report["reconnects"], report["lost"], fds) == (2, 2, 0, 2)
        worker.reply(number)
        assert kernel.asked[-1] == ("replace", 2)
        assert kernel.live(NAME) == 2
        cut(server)
        assert worker.event_with(live=1)
        assert worker.event_with(live=2), "the new ones are watched"


@pytest.mark.usefixtures("_short_waits")
def test_reconnect_takes_first_server_with_same_data(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    worker = start_worker()
    with Server(offers({b"": 2 * MIB})) as other, Server(offers({b"": MIB})) as first:
        with Server(offers({b"": MIB})) as second:
            servers = [str(server.uri()) for server in (other, first, second)]
            worker.order("attach", definition={**wire(second), "uri": servers[2:]}, resume=False)
            number = worker.send("reconnect")
            _report_deaths(kernel)
            worker.reply(number)
        assert worker.event_with(live=1)["uri"] == servers[2], "the definition names no other"


@pytest.mark.usefixtures("_short_waits")
def test_reconnect_to_changed_server_keeps_connections(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    worker = start_worker()
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}), SILENT)) as server:
        worker.order("attach", definition=wire(server), resume=False)
        with pytest.raises(NegotiationFailed, match="came back as something else"):
            worker.order("reconnect")
        assert kernel.live(NAME) == 1
        assert worker.events == []
        cut(server, 0)
        assert worker.event_with(live=0), "it is watched on"


@pytest.mark.usefixtures("_short_waits")
def test_reconnect_with_connection_kept_by_kernel_is_mended(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    worker = start_worker()
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        with pytest.raises(TimedOut, match="did not let go of the old connections"):
            worker.order("reconnect")
        assert worker.event_with(live=1)["reconnects"] == 1
        assert kernel.live(NAME) == 1


@pytest.mark.usefixtures("_short_waits")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_exchange_child_killed_leaves_device_that_is_mended(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel, moment: str
) -> None:
    worker = start_worker()
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        held = getattr(kernel, moment)["replace"] = threading.Event()
        number = worker.send("reconnect")
        _report_deaths(kernel)
        until(lambda: "replace" in kernel.askers)
        if moment == "after":
            kernel.wait_for("replace")
        os.kill(kernel.askers["replace"], signal.SIGKILL)
        with pytest.raises(WorkerFailed):
            worker.reply(number)
        held.set()
        assert worker.event_with(live=1)["reconnects"] == 1
        assert kernel.live(NAME) == 1


@pytest.mark.usefixtures("_short_waits")
def test_resize_takes_grown_size_and_mending_goes_by_it(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    worker = start_worker()
    grown = offers({b"": 3 * MIB + 100})
    with Server(in_turn(offers({b"": MIB}), offers({b"": MIB}), grown, grown, offers({b"": MIB}))) as server:
        worker.order("attach", definition=wire(server), resume=False)
        assert worker.order("resize")["size"] == MIB
        assert "replace" not in dict(kernel.asked), "nothing to do"
        number = worker.send("resize")
        _report_deaths(kernel)
        reply, _ = worker.reply(number)
        assert reply["size"] == 3 * MIB
        assert kernel.asked[-2:] == [("replace", 1), ("size", 3 * MIB)]
        assert worker.event_with(live=1)["export"]["size"] == 3 * MIB + 100
        assert worker.event_with(live=1)["size"] == 3 * MIB
        cut(server)
        assert worker.event_with(live=0)
        assert worker.event_with(live=1)["reconnects"] == 2
        with pytest.raises(NegotiationFailed, match="has 1048576 bytes now, less than the 3145828"):
            worker.order("resize")


@pytest.mark.usefixtures("_short_waits")
def test_resize_takes_server_that_came_back_grown(start_worker: Callable[[], WorkerDriver]) -> None:
    worker = start_worker()
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}))) as server:
        worker.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert worker.event_with(error="ExportChanged")
        assert worker.order("resize")["size"] == 2 * MIB
        assert worker.event_with(live=1, size=2 * MIB)


@pytest.mark.usefixtures("_short_waits")
def test_resize_refused_by_kernel_keeps_new_connections(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    worker = start_worker()
    kernel.refusals["size"] = KernelError("no")
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}))) as server:
        worker.order("attach", definition=wire(server), resume=False)
        number = worker.send("resize")
        _report_deaths(kernel)
        with pytest.raises(KernelError):
            worker.reply(number)
        report = worker.event_with(live=1)
        assert (report["size"], report["reconnects"], kernel.live(NAME)) == (MIB, 1, 1)


def test_reconnect_is_refused_if_connections_are_the_kernels_alone(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("adopt", definition=wire(server), binding=bind_before(server))
        kernel.wait_for("replace")
        with pytest.raises(Busy, match="are the kernel's alone"):
            worker.order("reconnect")


@pytest.mark.parametrize("order", ["reconnect", "resize"])
def test_exchange_without_device_is_refused(worker: WorkerDriver, order: str) -> None:
    with pytest.raises(NotAttached):
        worker.order(order)


@pytest.mark.usefixtures("_short_waits")
def test_reconnect_is_not_cancelled_by_end_of_dead_timeout(start_worker: Callable[[], WorkerDriver]) -> None:
    worker = start_worker()
    good, slow = offers({b"": MIB}), threading.Event()

    def serve(conn: socket.socket) -> None:
        if slow.is_set():
            time.sleep(1.5)
        with contextlib.suppress(OSError):  # the mender's connection, which is cancelled
            good(conn)

    with Server(serve) as server:
        worker.order("attach", definition=wire(server, dead_timeout=1), resume=False)
        slow.set()
        cut(server)
        assert worker.event_with(live=0)
        worker.order("reconnect")
        report = worker.event_with(live=1)
    assert (report["lost"], report["failing"]) == (0, False)


def test_exchange_that_can_not_fork_leaves_a_whole_device_alone(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    kernel.settings.update(forks=1, forks_after=1)
    worker = start_worker()
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        with pytest.raises(WorkerFailed):
            worker.order("reconnect")
        # What it does of itself has begun when it reads the next order.
        worker.order("set-timeout", seconds=3)
        worker.wait_idle()
        assert "replace" not in dict(kernel.asked), "nothing is missing that could be mended"
