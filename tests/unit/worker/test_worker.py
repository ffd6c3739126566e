# SPDX-License-Identifier: MIT
"""The worker: its orders, its replies, and how it ends. A real process on a fake kernel."""

from __future__ import annotations

import array
import socket

import pytest

from nbdd.errors import (
    NbddError,
    NotAttached,
)
from tests.fakes.kernel import FakeKernel
from tests.fakes.servers import MIB, Server, offers
from tests.fakes.worker_process import (
    NAME,
    WorkerDriver,
    wire,
)


def test_ping_is_answered_without_events(worker: WorkerDriver) -> None:
    assert worker.order("ping") == {}
    assert worker.events == []


def test_order_unknown_is_an_error_and_the_next_is_obeyed(worker: WorkerDriver) -> None:
    with pytest.raises(NbddError, match="no order 'dance'"):
        worker.order("dance", [worker.sock.fileno()])
    assert worker.order("ping") == {}


def test_worker_exits_0_when_manager_goes(worker: WorkerDriver) -> None:
    worker.order("ping")
    assert worker.disconnect() == 0


def test_worker_exits_0_when_manager_goes_without_reading(worker: WorkerDriver) -> None:
    worker.send("ping")
    assert worker.disconnect() == 0


@pytest.mark.parametrize("rubbish", [b"rubbish\n", b"[]\n", b'{"order":"ping"}\n'])
def test_worker_exits_1_on_invalid_message(worker: WorkerDriver, rubbish: bytes) -> None:
    worker.sock.send(rubbish)
    assert worker.ended() == 1


def test_worker_that_exits_leaves_device_bound(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        assert worker.disconnect() == 0
    assert NAME in kernel.bound
    assert "disconnect" not in dict(kernel.asked)


def test_order_that_needs_a_device_is_refused_without_one(worker: WorkerDriver) -> None:
    with pytest.raises(NotAttached):
        worker.order("set-timeout", seconds=1)
    with pytest.raises(NotAttached):
        worker.order("statistics")


def test_list_exports_reports_in_pieces(worker: WorkerDriver) -> None:
    names = [f"export{number}".encode() for number in range(1200)]
    with Server(offers(dict.fromkeys(names, MIB))) as server:
        worker.order("list-exports", uri=str(server.uri()))
    pieces = [message["exports"] for message, _ in worker.events]
    assert [len(exports) for exports in pieces] == [500, 500, 200]
    assert [export["name"].encode() for exports in pieces for export in exports] == names


def test_set_timeout_reaches_kernel(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        worker.order("set-timeout", seconds=12)
    assert ("timeout", 12) in kernel.asked


def test_statistics_count_from_the_attach(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        counted = kernel.bound[NAME]["counted"]
        counted["read-requests"] += 3
        counted["write-sectors"] += 2
        counted["in-flight"] = 9
        counted["write-milliseconds"] += 5
        report = worker.order("statistics")["statistics"]
        assert (report["read-time"], report["write-time"]) == (0, 5)
        assert (report["reads"], report["writes"], report["written-bytes"], report["in-flight"]) == (3, 0, 1024, 9)
        counted.clear()
        with pytest.raises(NotAttached):
            worker.order("statistics")


def test_order_without_descriptors_closes_those_that_come(worker: WorkerDriver) -> None:
    one, two = socket.socketpair()
    worker.order("ping", [one.fileno()])
    one.close()
    assert two.recv(1) == b""
    two.close()


def test_descriptors_without_an_order_are_harmless(worker: WorkerDriver) -> None:
    worker.sock.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    assert worker.order("ping") == {}
