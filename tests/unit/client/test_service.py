# SPDX-License-Identifier: MIT
"""The service of a client without a kernel: why it ends, who may end it, and what its child has and leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdd.client.service import End, Reason, Service, Stop, watch
from nbdd.errors import Busy, ConnectFailed, KernelError, WorkerFailed
from nbdd.ipc.processes import close_all_but
from nbdd.kernel.sysfs import Node
from tests.fakes.worker import open_fds

SECONDS = 30.0
THIS = Node(4)

pytestmark = [
    # The threads are pytest's own, or execnet's; the children here do nothing that minds.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Reports:
    """The kernel's reports of dead connections; `report` is the kernel."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def report(self, index: int) -> None:
        self._writer.send(bytes([index]))

    def fileno(self) -> int:
        return self._reader.fileno()

    def read(self) -> list[int]:
        self._reader.setblocking(False)
        found: list[int] = []
        while True:
            try:
                found += self._reader.recv(16)
            except BlockingIOError:
                return found

    def wait(self, seconds: float) -> list[int]:
        time.sleep(min(seconds, 0.001))
        return self.read()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class Scene:
    """A device with two connections, and all that may end it."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.connections = [ours for ours, _ in pairs]
        self.servers = [theirs for _, theirs in pairs]
        self.reports = Reports()
        self.stop = Stop()
        self.ours = True

    def watch(self) -> End:
        return watch(THIS, lambda: self.ours, self.connections, self.reports, self.stop)  # type: ignore[arg-type]

    def close(self) -> None:
        for sock in (*self.connections, *self.servers):
            sock.close()
        self.reports.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    with scene.stop:
        yield scene
    scene.close()


# Why it ends


def test_watch_reports_server_died_if_connections_die_one_by_one(scene: Scene) -> None:
    for server in scene.servers:
        server.close()
        scene.reports.report(THIS.index)
    assert scene.watch() == End(Reason.SERVER_DIED)


def test_watch_reports_disconnected_if_connections_end_without_a_report(scene: Scene) -> None:
    scene.ours = False
    for sock in scene.connections:
        sock.shutdown(socket.SHUT_RDWR)
    assert scene.watch() == End(Reason.DISCONNECTED)


def test_watch_reports_disconnected_if_one_connection_had_died_before(scene: Scene) -> None:
    scene.ours = False
    scene.servers[0].close()
    scene.reports.report(THIS.index)
    # Another device's connections die as well.
    scene.reports.report(THIS.index + 1)
    scene.connections[1].shutdown(socket.SHUT_RDWR)
    assert scene.watch() == End(Reason.DISCONNECTED)


def test_watch_waits_for_a_late_report(scene: Scene) -> None:
    for server in scene.servers:
        server.close()

    def late() -> bool:
        scene.reports.report(THIS.index)
        return True

    assert watch(THIS, late, scene.connections, scene.reports, scene.stop) == End(Reason.SERVER_DIED)  # type: ignore[arg-type]


def test_watch_reports_disconnected_if_a_bound_device_gets_no_report(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdd.client.service.PATIENCE_SECONDS", 0.05)
    for sock in scene.connections:
        sock.shutdown(socket.SHUT_RDWR)
    assert scene.watch() == End(Reason.DISCONNECTED)


def test_watch_goes_on_with_one_connection_of_two(scene: Scene) -> None:
    scene.servers[0].close()
    scene.reports.report(THIS.index)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert scene.watch() == End(Reason.SIGNAL, signal.SIGTERM)
    timer.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_ends_once_upon_a_signal_and_restores_its_handler(number: signal.Signals) -> None:
    # Started by nohup, SIGHUP would be ignored.
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (number, signal.SIGHUP)}
    scene = Scene()
    try:
        with scene.stop:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGHUP)
            assert scene.watch() == End(Reason.SIGNAL, number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    scene.close()


def test_stop_leaves_signals_alone_that_the_program_handles() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: caught.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.end() == End(Reason.SIGNAL, signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)


def test_stop_in_a_thread_leaves_all_signals_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with Stop():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(SECONDS)
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_end_reads_as_its_reason_and_becomes_an_exit_status() -> None:
    assert [str(end) for end in (End(Reason.DISCONNECTED), End(Reason.SERVER_DIED), End(Reason.SIGNAL, 15))] == [
        "disconnected",
        "server died",
        "signal 15",
    ]
    assert [End(Reason.DISCONNECTED).status, End(Reason.SERVER_DIED).status, End(Reason.SIGNAL, 2).status] == [
        0,
        1,
        130,
    ]


# The child


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def start(serve: Callable[..., End], sockets: Sequence[socket.socket] = ()) -> Service:
    return Service.start("no device of this name", sockets, serve)


def waits(stop: Stop, bound: Callable[[Node], None]) -> End:
    """A device that is bound and never ends."""
    bound(THIS)
    assert stop.parent is not None
    stop.parent.receive()
    return End(Reason.DISCONNECTED)


def test_service_reports_when_its_device_is_bound_and_is_killed_and_reaped() -> None:
    before = open_fds()
    service = start(waits)
    node, diskseq, pid = service.bound()
    assert (node, diskseq, pid) == (THIS, THIS.diskseq, THIS.pid)
    assert not service.ended(0)
    assert service.end() == []
    with pytest.raises(ChildProcessError):
        os.waitpid(service.pid, 0)
    assert open_fds() == before


def test_service_error_of_the_child_is_raised_and_leaves_nothing() -> None:
    def serve(_stop: Stop, _bound: Callable[[Node], None]) -> End:
        raise Busy("/dev/nbd0 is taken: by a test.")

    before = open_fds()
    service = start(serve)
    with pytest.raises(Busy, match="by a test"):
        service.bound()
    service.end()
    assert open_fds() == before


def test_service_device_that_ends_before_it_can_be_used_is_an_error() -> None:
    service = start(lambda _stop, _bound: End(Reason.SERVER_DIED))
    with pytest.raises(ConnectFailed, match="server died"):
        service.bound()
    service.end()


def test_service_child_killed_before_its_report_is_an_error() -> None:
    def serve(_stop: Stop, _bound: Callable[[Node], None]) -> End:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    service = start(serve)
    with pytest.raises(WorkerFailed, match="killed"):
        service.bound()
    service.end()


def test_service_child_that_fails_in_an_unknown_way_says_so_and_ends_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    def serve(_stop: Stop, _bound: Callable[[Node], None]) -> End:
        raise KeyError("what nobody expected")

    service = start(serve)
    with pytest.raises(WorkerFailed):
        service.bound()
    assert os.waitstatus_to_exitcode(os.waitpid(service.pid, 0)[1]) == 2
    service.end()
    assert "what nobody expected" in capfd.readouterr().err


@pytest.mark.parametrize("end", [End(Reason.DISCONNECTED), End(Reason.SERVER_DIED), End(Reason.SIGNAL, 15)])
def test_service_exit_status_says_why_it_ended_and_the_program_may_read_it(end: End) -> None:
    def serve(_stop: Stop, bound: Callable[[Node], None]) -> End:
        bound(THIS)
        return end

    service = start(serve)
    service.bound()
    assert os.waitstatus_to_exitcode(os.waitpid(service.pid, 0)[1]) == end.status
    assert service.end() == []


def test_service_child_has_no_descriptor_but_those_it_needs() -> None:
    link, other = socket.socketpair()
    with link, other, Path(__file__).open("rb"):
        service = start(waits, [link])
        service.bound()
        held = {os.readlink(path) for path in Path(f"/proc/{service.pid}/fd").iterdir() if int(path.name) > 2}
        # The link, the parent's channel, the parent itself, and two by which a signal wakes it.
        assert len(held) == 5
        assert os.readlink(f"/proc/self/fd/{link.fileno()}") in held
        assert all(what.startswith("socket:") or "pidfd" in what for what in held)
        service.end()


def test_service_child_inherits_neither_handlers_nor_the_wakeup_descriptor() -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handler = signal.signal(signal.SIGUSR1, lambda _number, _frame: os.write(2, b"parent's"))
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        service = start(waits)
        service.bound()
        os.kill(service.pid, signal.SIGUSR1)
        assert service.ended(SECONDS)
        assert os.waitstatus_to_exitcode(os.waitpid(service.pid, 0)[1]) == -signal.SIGUSR1
        service.end()
        reader.setblocking(False)
        with pytest.raises(BlockingIOError):
            reader.recv(1)
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, handler)
        reader.close()
        writer.close()


def test_service_dropped_ends_by_itself_and_closes_its_sockets() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        service = start(waits, [ours])
        service.bound()
        service.drop()
        assert ours.fileno() == -1
        with pytest.raises(ChildProcessError):
            os.waitpid(service.pid, 0)


def test_service_in_a_forked_copy_of_the_parent_ends_nothing() -> None:
    service = start(waits)
    service.bound()
    pid = os.fork()
    if pid == 0:
        service.drop()
        os._exit(0 if service.end() == [] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not service.ended(0)
    service.end()


PARENT = """
import sys
sys.path.insert(0, ".")
from tests.unit.client.test_service import start, waits
service = start(waits)
service.bound()
print(service.pid, flush=True)
sys.stdin.read()
"""


def test_service_child_ends_with_a_parent_that_is_killed() -> None:
    tree = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_close_all_but_closes_all_descriptors_except_those_named() -> None:
    reader, writer = os.pipe()
    kept, lost = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            close_all_but(writer, kept)
            os.write(writer, " ".join(sorted(os.listdir("/proc/self/fd"), key=int)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    held = {int(word) for word in os.read(reader, 4096).split()}
    assert {writer, kept} <= held
    # One is the directory that is listed.
    assert len(held - {0, 1, 2, writer, kept}) <= 1
    for fd in (reader, kept, lost):
        os.close(fd)


def test_service_is_not_ended_by_a_signal_that_the_program_handles() -> None:
    # Ctrl-C on a terminal goes to the program and to the child.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        service = start(waits)
    finally:
        signal.signal(signal.SIGINT, before)
    service.bound()
    os.kill(service.pid, signal.SIGINT)
    assert not service.ended(0.3)
    assert service.end() == []


def test_service_end_that_was_interrupted_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    service = start(waits)
    service.bound()
    with monkeypatch.context() as patch:
        patch.setattr(service, "_free", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            service.end()
    assert service.end() == []
    with pytest.raises(ChildProcessError):
        os.waitpid(service.pid, os.WNOHANG)


def test_service_kernel_error_keeps_its_number() -> None:
    def fails(_stop: Stop, _bound: Callable[[Node], None]) -> End:
        raise KernelError("No.", errno.EINVAL)

    service = start(fails)
    with pytest.raises(KernelError) as caught:
        service.bound()
    assert caught.value.errno == errno.EINVAL
    service.end()


@pytest.mark.parametrize("before", [True, False])
def test_service_end_spares_devices_bound_under_the_identifier_before(
    monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    node = SimpleNamespace(bound=True, diskseq=1, pid=2)
    answers = iter([[node] if before else []])
    monkeypatch.setattr("nbdd.client.service.find", lambda _backend: next(answers, [node]))
    monkeypatch.setattr("nbdd.client.service.NetlinkNBD", contextlib.nullcontext)
    freed: list[object] = []

    def release(_netlink: object, freeing: object, *_: object, **_more: object) -> list[str]:
        freed.append(freeing)
        return []

    monkeypatch.setattr("nbdd.client.service.release", release)
    service = start(lambda stop, _bound: waits(stop, lambda _node: None))
    assert service.end() == []
    assert freed == ([] if before else [node])
