# SPDX-License-Identifier: MIT
"""The children that do the work of a worker: one at a time, reaped, and what is left if one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdd.errors import (
    NbddError,
    NotAttached,
    WorkerFailed,
)
from tests.fakes.kernel import SECONDS, FakeKernel
from tests.fakes.servers import MIB, Server, offers
from tests.fakes.worker_process import (
    NAME,
    SILENT,
    ForkServerProcess,
    WorkerDriver,
    gone,
    until,
    wire,
)


def test_orders_are_answered_while_attach_waits_for_server(worker: WorkerDriver) -> None:
    with Server(SILENT) as server:
        worker.send("attach", definition=wire(server), resume=False)
        assert server.connected.wait(SECONDS)
        assert worker.order("ping") == {}
        with pytest.raises(NotAttached):
            worker.order("statistics")
        with pytest.raises(NbddError, match="no order 'dance'"):
            worker.order("dance")
        assert len(worker.children()) == 1


def test_orders_for_children_run_one_after_the_other(worker: WorkerDriver, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        kernel.before["bind"] = threading.Event()
        attach = worker.send("attach", definition=wire(server), resume=False)
        numbers = [worker.send("set-timeout", seconds=seconds) for seconds in (1, 2, 3)]
        kernel.before["bind"].set()
        _, fds = worker.reply(attach)
        for fd in fds:
            os.close(fd)
        for number in numbers:
            assert worker.reply(number) == ({}, [])
    assert [ask for ask in kernel.asked if ask[0] == "timeout"] == [("timeout", 1), ("timeout", 2), ("timeout", 3)]


def test_child_is_reaped_and_leaves_no_descriptor(worker: WorkerDriver) -> None:
    worker.order("ping")
    before = worker.descriptors()
    with Server(offers({b"": MIB})) as server:
        for _ in range(5):
            worker.order("list-exports", uri=str(server.uri()))
    until(lambda: not worker.children())
    worker.order("ping")
    assert worker.descriptors() == before


def test_child_title_says_what_it_is(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.before["find"] = threading.Event()
    number = worker.send("look")
    assert until(lambda: Path(f"/proc/{worker.child()}/comm").read_text().startswith("task:"))
    assert Path(f"/proc/{worker.pid}/comm").read_text() == f"nbdd:{NAME}\n"
    kernel.before["find"].set()
    worker.reply(number)


def test_child_that_can_not_be_forked_fails_only_its_order(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    kernel.settings["forks"] = 1
    worker = start_worker()
    worker.order("ping")
    before = worker.descriptors()
    with Server(offers({b"": MIB})) as server:
        with pytest.raises(
            WorkerFailed, match="No process could be started for 'disk': Resource temporarily unavailabl"
        ):
            worker.order("attach", definition=wire(server), resume=False)
        assert worker.descriptors() == before
        assert worker.order("attach", definition=wire(server), resume=False)["live"] == 1


@pytest.mark.parametrize("how", ["dismissed", "killed"])
def test_worker_that_ends_during_negotiation_binds_nothing(worker: WorkerDriver, kernel: FakeKernel, how: str) -> None:
    asked, over = threading.Event(), threading.Event()
    answer = offers({b"": MIB})

    def serve(conn: socket.socket) -> None:
        asked.set()
        assert over.wait(SECONDS)
        with contextlib.suppress(OSError):
            answer(conn)

    with Server(serve) as server:
        worker.send("attach", definition=wire(server), resume=False)
        assert asked.wait(SECONDS)
        child = worker.child()
        if how == "killed":
            os.kill(worker.pid, signal.SIGKILL)
        else:
            worker.sock.shutdown(socket.SHUT_RDWR)
        assert worker.ended() == (-signal.SIGKILL if how == "killed" else 0)
        until(lambda: gone(child))
        over.set()
    assert kernel.bound == {}


def test_child_that_is_stopped_dies_with_its_worker(worker: WorkerDriver, kernel: FakeKernel) -> None:
    kernel.before["find"] = threading.Event()
    worker.send("look")
    until(lambda: "find" in kernel.askers)
    child = worker.child()
    os.kill(child, signal.SIGSTOP)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.ended() == -signal.SIGKILL
    until(lambda: gone(child))


def test_worker_end_is_reported_when_its_child_has_left_the_kernel(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel, machine: tuple[FakeKernel, ForkServerProcess]
) -> None:
    kernel.settings["stuck"] = True
    kernel.before["stuck"] = kernel.before["bind"] = threading.Event()
    worker, other = start_worker(), start_worker()
    with Server(offers({b"": MIB})) as server:
        worker.send("attach", definition=wire(server), resume=False)
        until(lambda: {"stuck", "bind"} <= kernel.askers.keys())
        child = worker.child()
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: gone(child))
        # The end of another is reported meanwhile.
        other.disconnect()
        assert not machine[1].has_reported(worker.pid)
        kernel.before["stuck"].set()
        assert worker.ended() == -signal.SIGKILL
    assert kernel.bound == {}


@pytest.mark.parametrize("when", ["before", "after"])
def test_child_killed_during_bind_ends_worker_and_successor_finds_device(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel, when: str
) -> None:
    with Server(offers({b"": MIB})) as server:
        held = getattr(kernel, when)["bind"] = threading.Event()
        worker = start_worker()
        worker.send("attach", definition=wire(server), resume=False)
        until(lambda: "bind" in kernel.askers)
        if when == "after":
            kernel.wait_for("bind")
        os.kill(kernel.askers["bind"], signal.SIGKILL)
        assert worker.ended() == 1
        held.set()
        successor = start_worker()
        assert successor.order("attach", definition=wire(server), resume=True)["live"] == 1
        until(lambda: kernel.live(NAME) == 1)
        successor.order("detach", binding=None, force=False)
    assert kernel.bound == {}
    assert [what for what, _ in kernel.asked].count("bind") == 1


def test_attach_resumed_binds_unused_device_again_if_server_refuses(
    start_worker: Callable[[], WorkerDriver], kernel: FakeKernel
) -> None:
    # A server with a place for one client, which our own device takes.
    serve = offers({b"": MIB})
    turns = iter([serve, lambda conn: conn.close(), serve])

    def in_turn(conn: socket.socket) -> None:
        next(turns)(conn)

    with Server(in_turn) as server:
        kernel.after["bind"] = threading.Event()
        worker = start_worker()
        worker.send("attach", definition=wire(server), resume=False)
        kernel.wait_for("bind")
        os.kill(kernel.askers["bind"], signal.SIGKILL)
        assert worker.ended() == 1
        kernel.after["bind"].set()
        successor = start_worker()
        assert successor.order("attach", definition=wire(server), resume=True)["live"] == 1
        assert [what for what, _ in kernel.asked if what in ("bind", "disconnect")] == ["bind", "disconnect", "bind"]
        successor.order("detach", binding=None, force=False)
    assert kernel.bound == {}


@pytest.mark.parametrize("order", ["detach", "set-timeout"])
def test_child_killed_during_order_ends_worker(worker: WorkerDriver, kernel: FakeKernel, order: str) -> None:
    question = {"detach": "disconnect", "set-timeout": "timeout"}[order]
    kernel.before[question] = threading.Event()
    with Server(offers({b"": MIB})) as server:
        worker.order("attach", definition=wire(server), resume=False)
        worker.send(order, binding=None, force=False, seconds=3)
        until(lambda: question in kernel.askers)
        os.kill(kernel.askers[question], signal.SIGKILL)
        assert worker.ended() == 1
    assert NAME in kernel.bound
