# SPDX-License-Identifier: MIT
"""How the service of `nbdd.Client` ends, and what it leaves behind; put into a guest and run there as root.

python3 -m tests.system.in_guest.client_ends [NAME...]
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from nbdd import Client, End, Reason
from nbdd.errors import AlreadyAttached, ConnectFailed, InvalidArgs, NotAttached, WorkerFailed
from tests.system.in_guest.client_rig import (
    MIB,
    Elsewhere,
    a_client,
    bound,
    children,
    fds,
    geometry,
    in_flight,
    is_dead,
    main,
    name_of,
    refused,
    shutdown,
    sysfs,
    until,
    use,
)
from tests.system.in_guest.data_server import DISC, FLAGS, MULTI, DataServer

SERVICE_FDS = 3 + 1 + 2 + 2
"""0 to 2, the socket, two of netlink, two by which a signal wakes it."""

NBD_DISCONNECT = 0xAB08
"""The ioctl, _IO(0xab, 8)."""


def serve(server: DataServer, **keywords: Any) -> Callable[[], list[object]]:
    """`Client.run` for another process: why it returned, and what is bound then."""

    def run() -> list[object]:
        with a_client(server, device="/dev/nbd1", **keywords) as client:
            end = client.run()
            return [end.reason, end.signal, str(end), bound(), client.device(), client.socket() is None]

    return run


def after(reason: Reason, number: int = 0) -> list[object]:
    """What it must say: the device is free, and the socket gone."""
    return [reason, number, str(End(reason, number)), {}, "/dev/nbd1", True]


def is_usable() -> None:
    """Wait for another process's device."""
    until(lambda: sysfs("nbd1", "size") == str(MIB // 512), "it has its size")
    use("/dev/nbd1", b"used")


def run_returns_when_another_process_disconnects() -> None:
    with DataServer() as server, Elsewhere(serve(server)) as service:
        is_usable()
        assert geometry("nbd1") == (MIB, 512)
        with Client(device="/dev/nbd1") as other:
            other.disconnect()
        assert service.result() == after(Reason.DISCONNECTED)
        assert server.asked(DISC) == 1
    with DataServer() as server, Elsewhere(serve(server)) as service:
        is_usable()
        subprocess.run(["nbd-client", "-d", "/dev/nbd1"], check=True, stdout=subprocess.DEVNULL)
        assert service.result() == after(Reason.DISCONNECTED)


def run_returns_on_the_disconnect_of_old() -> None:
    with DataServer() as server, Elsewhere(serve(server)) as service:
        is_usable()
        fd = os.open("/dev/nbd1", os.O_RDONLY)
        fcntl.ioctl(fd, NBD_DISCONNECT)
        os.close(fd)
        assert service.result() == after(Reason.DISCONNECTED)


def run_returns_when_the_server_dies() -> None:
    for way in ("pair", "tcp"):
        with DataServer(way=way) as server, Elsewhere(serve(server)) as service:
            is_usable()
            server.kill()
            assert service.result() == after(Reason.SERVER_DIED)


def run_returns_when_the_last_of_several_connections_dies() -> None:
    with DataServer(connections=2, way="tcp") as server, Elsewhere(serve(server, flags=MULTI)) as service:
        is_usable()
        shutdown(server.sockets[0])
        use("/dev/nbd1", b"over the other connection")
        server.kill()
        assert service.result() == after(Reason.SERVER_DIED)
    with DataServer(connections=2, way="tcp") as server, Elsewhere(serve(server, flags=MULTI)) as service:
        is_usable()
        shutdown(server.sockets[0])
        use("/dev/nbd1", b"over the other connection")
        with Client(device="/dev/nbd1") as other:
            other.disconnect()
        assert service.result() == after(Reason.DISCONNECTED)


def run_returns_on_a_signal_and_says_which() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with DataServer() as server, Elsewhere(serve(server)) as service:
            is_usable()
            os.kill(service.pid, number)
            assert service.result() == after(Reason.SIGNAL, number)
            assert server.asked(DISC) == 1


def run_leaves_the_signals_that_the_program_handles() -> None:
    def work() -> list[object]:
        caught: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _frame: caught.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = [signal.getsignal(number) for number in range(1, 20)]
        with DataServer() as server:
            report = serve(server)()
        assert [signal.getsignal(number) for number in range(1, 20)] == before
        return [*report, caught]

    with Elsewhere(work) as service:
        is_usable()
        os.kill(service.pid, signal.SIGTERM)
        os.kill(service.pid, signal.SIGHUP)
        use("/dev/nbd1", b"still there")
        os.kill(service.pid, signal.SIGINT)
        assert service.result() == [*after(Reason.SIGNAL, signal.SIGINT), [signal.SIGTERM]]


def run_works_in_a_thread() -> None:
    ends: list[End] = []
    with DataServer() as server, a_client(server, device="/dev/nbd1") as client:
        thread = threading.Thread(target=lambda: ends.append(client.run()))
        thread.start()
        is_usable()
        with Client(device="/dev/nbd1") as other:
            other.disconnect()
        thread.join(30)
        assert ends == [End(Reason.DISCONNECTED)]


def run_closes_what_it_does_not_need_if_asked() -> None:
    assert "/etc/passwd" in _held_by_a_run(close_fds=False)
    held = _held_by_a_run(close_fds=True)
    assert all(what.startswith("socket:") for what in held[3:]), held


def _held_by_a_run(*, close_fds: bool) -> list[str]:
    with DataServer() as server, open("/etc/passwd", "rb"):

        def work() -> None:
            with a_client(server, device="/dev/nbd1") as client:
                client.run(close_fds=close_fds)

        with Elsewhere(work) as service:
            is_usable()
            # udev's socket goes when the device is settled.
            if close_fds:
                until(lambda: len(fds(service.pid)) == SERVICE_FDS, "all else is closed")
            held = fds(service.pid)
            server.kill()
            until(lambda: not bound(), "the end")
        assert {"0", "1", "2"} <= set(held)
        return [held[fd] for fd in sorted(held, key=int)]


def run_async_returns_a_usable_device_and_a_child_without_more_than_it_needs() -> None:
    with DataServer() as server, open("/etc/passwd", "rb"), a_client(server, backend="by-name") as client:
        pid = client.run_async()
        assert Path("/dev/disk/by-nbd/by-name").resolve() == Path(client.device())
        assert geometry(name_of(client)) == (MIB, 512)
        use(client.device(), b"at once")
        assert server.data(0, 7) == b"at once"
        assert children() == [server.pid, pid]
        held = fds(pid)
        # Two more: the parent's channel, and the parent itself.
        assert len(held) == SERVICE_FDS + 2, held
        kinds = ("socket:", "anon_inode:[pidfd]")
        assert all(what.startswith(kinds) for fd, what in held.items() if int(fd) > 2), held
        refused(AlreadyAttached, client.run_async, client.device())
        refused(AlreadyAttached, client.run, client.device())


def run_async_raises_what_its_child_met() -> None:
    with DataServer() as server, a_client(server, device="/dev/nbd1") as client:
        os.kill(server.pid, signal.SIGSTOP)
        with Elsewhere(partial(_kill_once_it_reads, server.pid)):
            refused(ConnectFailed, client.run_async, "before it could be used", "server died")
        assert children() == [server.pid]
        assert bound() == {}


def run_async_notices_a_child_that_is_killed_while_it_waits_for_the_server() -> None:
    with DataServer() as server, a_client(server, device="/dev/nbd1") as client:
        os.kill(server.pid, signal.SIGSTOP)
        with Elsewhere(partial(_kill_the_service_once_it_reads, os.getpid(), server.pid)) as killer:
            refused(WorkerFailed, client.run_async, "killed")
            assert children() == [server.pid, killer.pid]
        assert bound() == {}


def _kill_once_it_reads(pid: int) -> None:
    until(partial(in_flight, "nbd1"), "a request in flight")
    os.kill(pid, signal.SIGKILL)


def _kill_the_service_once_it_reads(parent: int, server: int) -> None:
    until(partial(in_flight, "nbd1"), "a request in flight")
    found = {int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()}
    (service,) = found - {server, os.getpid()}
    os.kill(service, signal.SIGKILL)


def run_async_says_by_its_exit_status_why_it_ended() -> None:
    for what, status in (("disconnect", 0), ("server", 1), ("signal", 128 + signal.SIGTERM)):
        with DataServer() as server, a_client(server) as client:
            pid = client.run_async()
            if what == "disconnect":
                with Client(device=client.device()) as other:
                    other.disconnect()
            elif what == "server":
                server.kill()
            else:
                os.kill(pid, signal.SIGTERM)
            # The program may wait for it itself.
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
            assert bound() == {}
            assert client.device() == ""
            client.kill_async()
            refused(InvalidArgs, client.run_async, "no socket")


def kill_async_ends_all_and_the_socket_is_to_be_set_again() -> None:
    with DataServer(way="unix") as server, a_client(server) as client:
        client.kill_async()
        assert client.socket() is server.sockets[0]
        for _ in range(2):
            pid = client.run_async()
            client.kill_async()
            assert not Path(f"/proc/{pid}").exists()
            assert bound() == {}
            assert client.socket() is None
            client.kill_async()
            refused(InvalidArgs, client.run_async, "no socket")
            client.socket(server.connect())
        until(lambda: server.asked(DISC) == 2, "the disconnect messages")


def kill_async_ends_a_device_whose_server_hangs() -> None:
    with DataServer() as server, a_client(server) as client:
        pid = client.run_async()
        name, path = name_of(client), client.device()
        os.kill(server.pid, signal.SIGSTOP)
        with Elsewhere(partial(use, path, b"never answered")) as writer:
            until(partial(in_flight, name), "a request in flight")
            client.kill_async()
            assert bound() == {}
            assert not Path(f"/proc/{pid}").exists()
            refused_by_the_kernel(writer)


def refused_by_the_kernel(writer: Elsewhere) -> None:
    """What it waited for has failed."""
    try:
        writer.result()
    except AssertionError as error:
        assert "Input/output error" in str(error), error  # noqa: PT017 - nothing is to be raised here
    else:
        raise AssertionError("the write succeeded")


def a_service_that_was_killed_leaves_a_device_that_can_be_freed() -> None:
    def by_kill_async(client: Client) -> None:
        client.kill_async()

    def by_disconnect(client: Client) -> None:
        client.disconnect()

    def by_another_process(client: Client) -> None:
        def work() -> None:
            with Client(device=client.device()) as other:
                other.disconnect()

        with Elsewhere(work) as process:
            process.result()

    def by_close(client: Client) -> None:
        client.close()

    for end in (by_kill_async, by_disconnect, by_another_process, by_close):
        with DataServer(way="unix") as server, a_client(server, device="/dev/nbd1") as client:
            pid = client.run_async()
            os.kill(pid, signal.SIGKILL)
            until(partial(is_dead, pid), "its death")
            assert list(bound()) == ["nbd1"]
            use("/dev/nbd1", b"the kernel serves on")
            end(client)
            assert bound() == {}, end
            client.socket(server.connect())
            client.run_async()
            assert list(bound()) == ["nbd1"]


def disconnect_of_the_parent_ends_the_service_too() -> None:
    with DataServer() as server, a_client(server) as client:
        pid = client.run_async()
        client.disconnect()
        assert not Path(f"/proc/{pid}").exists()
        assert bound() == {}
        assert client.socket() is None
        refused(NotAttached, client.disconnect)


def a_client_that_is_dropped_takes_its_service_along() -> None:
    with DataServer(way="unix") as server:
        client = Client(socket=server.connect(), size=MIB, flags=FLAGS)
        client.run_async()
        del client
        assert (children(), bound()) == ([server.pid], {})

        def fails() -> None:
            client = Client(socket=server.connect(), size=MIB, flags=FLAGS)
            client.run_async()
            raise KeyError(client.device())

        with suppress(KeyError):
            fails()
        assert (children(), bound()) == ([server.pid], {})
        with Client(socket=server.connect(), size=MIB, flags=FLAGS) as client:
            client.run_async()
        assert (children(), bound()) == ([server.pid], {})
        client.close()


PROGRAM = """
import os, sys, time
from nbdd import Client
from tests.system.in_guest.data_server import DataServer
server = DataServer()
client = Client(socket=server.sockets, size=server.size)
print(client.run_async(), flush=True)
if sys.argv[1] == "error": raise SystemExit("no")
if sys.argv[1] == "wait": sys.stdin.read()
if sys.argv[1] == "fork":
    if os.fork() == 0: sys.exit()
    os.wait()
    assert os.path.exists("/sys/block/" + client.node.name + "/pid")
"""


def a_program_that_ends_takes_its_service_along() -> None:
    for how in ("return", "error", "fork", "wait"):
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with program:
            assert program.stdout is not None
            assert program.stderr is not None
            pid = int(program.stdout.readline())
            if how == "wait":
                # It has no chance to do anything about it.
                program.kill()
            words = program.stderr.read()
        assert program.returncode == {"return": 0, "error": 1, "fork": 0, "wait": -9}[how], words
        until(partial(is_dead, pid), "the end of the service")
        assert bound() == {}
        for line in words.splitlines():
            assert line == b"no" or b"ResourceWarning" in line or b"unclosed" in line, words


def what_was_only_bound_stays_bound() -> None:
    with DataServer() as server:
        with Client("by-name", socket=server.sockets, size=MIB) as client:
            client.bind()
            assert client.device() == f"/dev/{next(iter(bound()))}"
        assert list(bound().values()) == ["by-name"]
        with Client("by-name") as heir:
            heir.adopt()
            use(heir.device(), b"adopted")
            heir.disconnect()
        assert bound() == {}


def a_bind_that_is_interrupted_leaves_nothing_bound() -> None:
    class Interrupt(Exception):
        pass

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for seconds in (0.02, 0.05, 0.1, 0.4):
            with DataServer() as server, a_client(server) as client:
                os.kill(server.pid, signal.SIGSTOP)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                try:
                    client.bind()
                    raise AssertionError("it was not interrupted")
                except Interrupt:
                    until(lambda: not bound(), "nothing is bound")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


CHECKS = {
    check.__name__: check
    for check in (
        run_returns_when_another_process_disconnects,
        run_returns_on_the_disconnect_of_old,
        run_returns_when_the_server_dies,
        run_returns_when_the_last_of_several_connections_dies,
        run_returns_on_a_signal_and_says_which,
        run_leaves_the_signals_that_the_program_handles,
        run_works_in_a_thread,
        run_closes_what_it_does_not_need_if_asked,
        run_async_returns_a_usable_device_and_a_child_without_more_than_it_needs,
        run_async_raises_what_its_child_met,
        run_async_notices_a_child_that_is_killed_while_it_waits_for_the_server,
        run_async_says_by_its_exit_status_why_it_ended,
        kill_async_ends_all_and_the_socket_is_to_be_set_again,
        kill_async_ends_a_device_whose_server_hangs,
        a_service_that_was_killed_leaves_a_device_that_can_be_freed,
        disconnect_of_the_parent_ends_the_service_too,
        a_client_that_is_dropped_takes_its_service_along,
        a_program_that_ends_takes_its_service_along,
        what_was_only_bound_stays_bound,
        a_bind_that_is_interrupted_leaves_nothing_bound,
    )
}

if __name__ == "__main__":
    main(CHECKS)
