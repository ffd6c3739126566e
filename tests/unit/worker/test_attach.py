# SPDX-License-Identifier: MIT
"""Attach and detach: what the server and the kernel are asked, and what is left when either refuses."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import pytest

from nbdd.errors import (
    Busy,
    ConnectionNotServiced,
    KernelError,
    NbddError,
    NegotiationFailed,
    NoSuchExport,
)
from nbdd.ipc.channel import Message
from nbdd.worker.operations import DETACH_SECONDS, FORCE_SECONDS
from tests.fakes.kernel import SECONDS, FakeKernel, node
from tests.fakes.servers import MIB, Server, offers, says
from tests.fakes.worker_process import (
    MULTI,
    NAME,
    BindBefore,
    Serve,
    WorkerDriver,
    binding_of,
    cut,
    until,
    wire,
)


def test_attach_binds_what_server_offers_and_describes_it(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": 4 * MIB}, MULTI)) as server:
        definition = wire(server, connections=2, timeout=3, dead_timeout=4, device=5, read_only=True, block_size=4096)
        reply, fds = worker.order_fds("attach", definition=definition, resume=False)
        assert len(fds) == 2, "the connections, for a successor"
        for fd in fds:
            os.close(fd)
        assert kernel.asked == [
            (
                "bind",
                {
                    "index": 5, "size": 4 * MIB, "block_size": 4096, "flags": MULTI, "read_only": True, "timeout": 3,
                    "dead_timeout": 4, "io_timeout": None,
                },
            )
        ]  # fmt: skip
        report = {
            key: reply[key] for key in ("index", "node", "size", "block-size", "read-only", "connections", "live")
        }
        assert report == {
            "index": 5, "node": "/dev/nbd5", "size": 4 * MIB, "block-size": 4096, "read-only": True, "connections": 2,
            "live": 2,
        }  # fmt: skip
        assert (reply["diskseq"], reply["reconnects"], reply["uri"]) == (7, 0, str(server.uri()))


def test_attach_warns_of_what_server_can_not_give(worker: WorkerDriver) -> None:
    with Server(offers({b"": MIB})) as server:
        assert worker.order("attach", definition=wire(server, connections=3), resume=False)["connections"] == 1
        assert "one is used instead of 3" in worker.event()[0]["message"]


def test_attach_connects_again_for_each_connection_not_serviced(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.refusals["bind"] = ConnectionNotServiced("not read")
    with Server(offers({b"": MIB}, MULTI)) as server:
        with pytest.raises(ConnectionNotServiced):
            worker.order("attach", definition=wire(server, connections=3), resume=False)
        assert len(server._conns) == 9
    assert [event["message"] for event, _ in worker.events] == 2 * ["not read Connecting again."]


def test_attach_refuses_name_bound_by_others(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = node(3, MIB, 512)
    with Server(offers({b"": MIB})) as server, pytest.raises(Busy, match="/dev/nbd3 is bound under the name 'disk'"):
        worker.order("attach", definition=wire(server), resume=False)


def test_attach_resumed_takes_over_bound_device(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = node(3, MIB, 512)
    with Server(offers({b"": MIB}, MULTI)) as server:
        reply, fds = worker.order_fds("attach", definition=wire(server, connections=2), resume=True)
        worker.order("ping")
    assert (reply["index"], reply["connections"], reply["live"]) == (3, 2, 2)
    assert fds == []
    assert "bind" not in dict(kernel.asked)


def test_attach_resumed_without_device_binds(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=True)
    assert [what for what, _ in kernel.asked] == ["bind"]


@pytest.mark.parametrize(
    ("serve", "kind"),
    [(offers({b"": 0}), NegotiationFailed), (offers({b"x": MIB}), NoSuchExport), (says(b"HTTP/1.1"), NbddError)],
)
def test_attach_refused_by_server_reports_error_class_and_worker_lives(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel, serve: Serve, kind: type[NbddError]
) -> None:
    kernel.settings["CONNECT_SECONDS"] = 1.0
    worker = start_worker()
    with Server(serve) as server, pytest.raises(kind):
        worker.order("attach", definition=wire(server), resume=False)
    assert worker.order("ping") == {}


def test_attach_refused_by_kernel_leaves_no_socket(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.refusals["bind"] = KernelError("no")
    hung_up = threading.Event()

    def serve(conn: socket.socket) -> None:
        offers({b"": MIB})(conn)
        hung_up.set()

    with Server(serve) as server:
        with pytest.raises(KernelError):
            worker.order("attach", definition=wire(server), resume=False)
        assert hung_up.wait(SECONDS)


def test_detach_frees_device_and_closes_connections(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        held = worker.descriptors()
        worker.order("detach", binding=None, force=False)
        worker.order("ping")
        until(lambda: worker.descriptors() < held)
    assert kernel.bound == {}
    assert worker.events == [], "its connections died on purpose"


def test_detach_of_busy_device_is_refused_and_watching_goes_on(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.refusals["disconnect"] = Busy("in use")
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        with pytest.raises(Busy):
            worker.order("detach", binding=None, force=False)
        cut(server)
        assert worker.event_with(live=1)


def test_detach_by_force_warns_of_who_has_the_node(worker: WorkerDriver) -> None:
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        worker.order("detach", binding=None, force=True)
    assert "blkid (5)" in worker.event()[0]["message"]


def test_detach_by_force_waits_briefly_for_users(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        for force in (False, True):
            worker.order("attach", definition=wire(server), resume=False)
            worker.order("detach", binding=None, force=force)
    asked = [detail for what, detail in kernel.asked if what == "disconnect"]
    assert asked == [{"force": False, "seconds": DETACH_SECONDS}, {"force": True, "seconds": FORCE_SECONDS}]
    assert FORCE_SECONDS <= 5


def test_detach_by_new_worker_goes_by_binding_or_name(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB})) as server:
        for known in (True, False):
            binding = bind_before(server)
            worker.order("detach", definition=wire(server), binding=binding if known else None, force=False)
            assert kernel.bound == {}


def test_detach_by_new_worker_adopts_busy_device(
    worker: WorkerDriver, kernel: FakeKernel, bind_before: BindBefore
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = bind_before(server)
        kernel.refusals["disconnect"] = Busy("in use")
        for _ in range(3):
            with pytest.raises(Busy):
                worker.order("detach", definition=wire(server), binding=binding, force=False)
        assert worker.order("statistics")["statistics"]["in-flight"] == 1


@pytest.mark.parametrize("binding", [None, binding_of(index=9)])
def test_detach_of_device_gone_succeeds(worker: WorkerDriver, binding: Message | None) -> None:
    with Server(offers({b"": MIB})) as server:
        assert worker.order("detach", definition=wire(server), binding=binding, force=False) == {}


def test_detach_leaves_other_disk_of_same_name_alone(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = node(0, MIB, 512)
    with Server(offers({b"": MIB})) as server:
        worker.order("detach", definition=wire(server), binding=binding_of(diskseq=6), force=True)
    assert NAME in kernel.bound
