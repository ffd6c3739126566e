# SPDX-License-Identifier: MIT
"""Adopt: a worker takes over the device of another, and mends what died unseen."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from nbdd.errors import (
    NotAttached,
)
from tests.fakes.kernel import FakeKernel
from tests.fakes.servers import MIB, Server, offers
from tests.fakes.worker_process import (
    MULTI,
    BindBefore,
    WorkerDriver,
    until,
    wire,
)


def test_adopt_takes_over_device_with_its_connections(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        binding = bind_before(server, connections=2)
        one, two = socket.socketpair()
        three, four = socket.socketpair()
        reply, fds = worker.order_fds(
            "adopt", [one.fileno(), three.fileno()], definition=wire(server, connections=2), binding=binding
        )
        assert (reply["live"], len(fds)) == (2, 2)
        for fd in fds:
            os.close(fd)
        assert kernel.asked == [("adopt", [0, 7])]
        one.close()
        two.shutdown(socket.SHUT_RDWR)
        assert worker.event_with(live=1)["error"] == "ConnectFailed"
        for sock in (two, three, four):
            sock.close()


def test_adopt_of_device_gone_is_refused_and_leaves_no_socket(worker: WorkerDriver, bind_before: BindBefore) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server)
        for gone in (None, {**binding, "index": 9}, {**binding, "diskseq": 8}, {**binding, "pid": 12}):
            one, two = socket.socketpair()
            with pytest.raises(NotAttached):
                worker.order("adopt", [one.fileno()], definition=wire(server), binding=gone)
            one.close()
            assert two.recv(1) == b"", "the worker closed its copy too"
            two.close()


def test_reply_has_id_of_its_order_whatever_binding_holds(worker: WorkerDriver, bind_before: BindBefore) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server) | {"id": 4711}
        assert worker.order("adopt", definition=wire(server), binding=binding)["index"] == 0


def test_adopt_ignores_descriptors_that_are_no_sockets(
    worker: WorkerDriver, bind_before: BindBefore, tmp_path: Path
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server)
        one, two = socket.socketpair()
        with (tmp_path / "file").open("w") as file:
            order = {"definition": wire(server), "binding": binding}
            assert worker.order("adopt", [file.fileno(), one.fileno()], **order)["live"] == 1
        one.close()
        two.close()


def test_adopt_of_device_without_live_connection_mends_it(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server, live=0)
        assert worker.order("adopt", definition=wire(server), binding=binding)["live"] == 0
        assert worker.event_with(live=1)["reconnects"] == 1
    assert ("replace", 1) in kernel.asked


def test_adopt_without_sockets_watches_kernel_reports_and_mends(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server)
        assert worker.order("adopt", definition=wire(server), binding=binding)["live"] == 1
        worker.order("ping")
        # What died unseen is replaced by a connection offered at once; the kernel drops it where nothing had died.
        kernel.wait_for("replace")
        until(lambda: not worker.children())
        kernel.report(5)  # somebody else's
        kernel.report(0)
        assert worker.event_with(live=0)["error"] == "ConnectFailed"
        assert worker.event_with(live=1)["reconnects"] == 1
        assert kernel.listeners() == 0, "links that are ours again are watched by themselves"


def test_adopt_with_dead_socket_mends_it(worker: WorkerDriver, bind_before: BindBefore) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server)
        one, two = socket.socketpair()
        two.close()
        worker.order("adopt", [one.fileno()], definition=wire(server), binding=binding)
        one.close()
        assert worker.event_with(live=0)["error"] == "ConnectFailed"
        assert worker.event_with(live=1)["reconnects"] == 1


@pytest.mark.parametrize("held", [0, 1])
def test_adopt_with_unseen_deaths_offers_all_connections(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore, held: int
) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        binding = bind_before(server, connections=3, live=3)
        pairs = [socket.socketpair() for _ in range(3)]
        for _, far in pairs[held:]:
            far.close()
        fds = [near.fileno() for near, _ in pairs]
        worker.order("adopt", fds, definition=wire(server, connections=3), binding=binding)
        for near, _ in pairs:
            near.close()
        assert worker.event_with(live=held)["error"] == "ConnectFailed"
        # The predecessor may have replaced any of the dead ones, and said nothing any more.
        assert worker.event_with(live=3)["reconnects"] == 3 - held
        assert ("replace", 3) in kernel.asked
        # From here on the kernel says what dies, and what it is given is its own for certain.
        for _ in range(3 - held):
            kernel.report(0)
        assert worker.event_with(live=3, reconnects=2 * (3 - held))
        until(lambda: kernel.listeners() == 0)
        for _, far in pairs[:held]:
            far.close()


def test_adopt_mends_connection_that_dies_during_offer(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB})) as server:
        held = kernel.after["replace"] = threading.Event()
        worker.order("adopt", definition=wire(server), binding=bind_before(server))
        kernel.wait_for("replace")
        kernel.report(0)
        assert worker.event_with(live=0)
        held.set()
        assert worker.event_with(live=1)["reconnects"] == 1
        kernel.wait_for("replace", 2)
