# SPDX-License-Identifier: MIT
"""The worker: its orders, its replies, and links that die under it; and the errands that do its work.

Workers and errands are real processes, forked by nbdd's own fork server, that are killed and stopped. The servers are
scripted, the kernel is a fake.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdd.config.definition import Definition
from nbdd.errors import (
    Busy,
    ConnectFailed,
    ConnectionNotServiced,
    KernelError,
    NbddError,
    NegotiationFailed,
    NoSuchExport,
    NotAttached,
    TimedOut,
    WorkerFailed,
)
from nbdd.ipc.channel import Channel, Message
from nbdd.protocol import Export, Flags
from nbdd.worker.binding import Binding
from nbdd.worker.operations import DETACH_SECONDS, FORCE_SECONDS
from tests.fakes.kernel import PLACE, SECONDS, FakeKernel, node
from tests.fakes.servers import HAS_FLAGS, MIB, Server, offers, says
from tests.fakes.worker import open_fds

MULTI = HAS_FLAGS | int(Flags.NBD_FLAG_CAN_MULTI_CONN)
NAME = "disk"

Serve = Callable[[socket.socket], None]


class Nursery:
    """A fork server on the fake kernel."""

    def __init__(self, kernel: FakeKernel) -> None:
        ours, theirs = Channel.pair()
        ours.settimeout(SECONDS)
        self._control = Channel(ours)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.kernel", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, PLACE: kernel.path},
                cwd=Path(__file__).parents[3],
            )
        self._codes: dict[int, int] = {}

    def spawn(self, channel: socket.socket) -> int:
        self._control.send({"order": "spawn", "id": 1, "name": NAME}, [channel.fileno()])
        while (message := self._hear())["event"] != "spawned":
            pass
        return int(message["pid"])

    def code(self, pid: int) -> int:
        """How a worker ended, once the fork server has told."""
        while pid not in self._codes:
            self._hear()
        return self._codes.pop(pid)

    def told(self, pid: int) -> bool:
        """Whether it has told of this end by now."""
        with contextlib.suppress(BlockingIOError):
            self._control.setblocking(False)
            while True:
                self._hear()
        self._control._sock.settimeout(SECONDS)
        return pid in self._codes

    def _hear(self) -> Message:
        found = self._control.pop()
        if found is None:
            assert self._control.receive(), "the fork server ended"
            return self._hear()
        message, fds = found
        for fd in fds:
            os.close(fd)
        if message["event"] == "ended":
            self._codes[message["pid"]] = message["code"]
        return message

    def close(self) -> None:
        self._control.close()
        assert self._process.wait(SECONDS) == 0


class Boss:
    """The manager's end of a worker."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        ours, theirs = Channel.pair()
        ours.settimeout(SECONDS)
        self.sock = ours
        self.channel = Channel(ours)
        self.events: list[tuple[Message, int]] = []
        """What it said unasked, with the number of descriptors."""
        self._ids = itertools.count(1)
        self._code: int | None = None
        with theirs:
            self.pid = nursery.spawn(theirs)

    def send(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> int:
        """Give an order and do not wait; returns its number."""
        number = next(self._ids)
        self.channel.send({"order": order, "id": number, **arguments}, fds)
        return number

    def order(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> Message:
        reply, back = self.order_fds(order, fds, **arguments)
        for fd in back:
            os.close(fd)
        return reply

    def order_fds(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> tuple[Message, list[int]]:
        return self.reply(self.send(order, fds, **arguments))

    def reply(self, number: int) -> tuple[Message, list[int]]:
        """The next reply, which must be to that order."""
        while True:
            found = self.channel.wait()
            assert found is not None, "the worker ended"
            if "event" not in found[0]:
                break
            self._keep(*found)
        message, back = found
        assert message.pop("id") == number
        if "error" in message:
            assert back == []
            raise NbddError.from_wire(message)
        return message, back

    def event(self) -> tuple[Message, int]:
        """The next thing that it says unasked."""
        if not self.events:
            found = self.channel.wait()
            assert found is not None, "the worker ended"
            self._keep(*found)
        return self.events.pop(0)

    def event_with(self, **fields: Any) -> Message:
        """The next event with such fields; others are passed over."""
        while True:
            message, _ = self.event()
            if fields.items() <= message.items():
                return message

    def _keep(self, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        self.events.append((message, len(fds)))

    def errands(self) -> list[int]:
        """The worker's children, the dead that it has not reaped among them."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def errand(self) -> int:
        """The one child, or the next."""
        (pid,) = until(lambda: [pid for pid in self.errands() if not gone(pid)])
        return int(pid)

    def rested(self) -> None:
        """Wait until it has no child left."""
        until(lambda: not self.errands())

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def ended(self) -> int:
        """The exit code, once it has ended by itself, and its errands too."""
        if self._code is None:
            self._code = self._nursery.code(self.pid)
        return self._code

    def dismiss(self) -> int:
        """Close the channel as a manager that goes away, and wait for the end."""
        self.channel.close()
        return self.ended()


def until(look: Callable[[], Any]) -> Any:
    """What `look` returns, as soon as that is something."""
    end = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
    return found


def gone(pid: int) -> bool:
    """Whether the process has ended; an orphan may have nobody to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def computer() -> Iterator[tuple[FakeKernel, Nursery]]:
    kernel = FakeKernel()
    nursery = Nursery(kernel)
    yield kernel, nursery
    nursery.close()
    kernel.close()


@pytest.fixture
def kernel(computer: tuple[FakeKernel, Nursery]) -> FakeKernel:
    return computer[0]


@contextlib.contextmanager
def hiring(kernel: FakeKernel, nursery: Nursery) -> Iterator[Callable[[], Boss]]:
    """What makes workers; they are dismissed in the end, and the kernel cleaned."""
    bosses: list[Boss] = []

    def make() -> Boss:
        bosses.append(Boss(nursery))
        return bosses[-1]

    yield make
    for boss in bosses:
        boss.dismiss()
    kernel.clean()


@pytest.fixture
def hire(computer: tuple[FakeKernel, Nursery]) -> Iterator[Callable[[], Boss]]:
    """Makes workers, and proves that nothing is left of them in the end."""
    kernel, nursery = computer
    before = open_fds()
    with hiring(kernel, nursery) as make:
        yield make
    assert open_fds() <= before


@pytest.fixture
def boss(hire: Callable[[], Boss]) -> Boss:
    return hire()


def wire(server: Server, **fields: Any) -> dict[str, Any]:
    return Definition(NAME, (server.uri(),), **fields).to_wire()


def bound(index: int = 0, diskseq: int = 7) -> Message:
    """A binding that a record holds, of a device that may be there no more."""
    export = Export("", MIB, Flags.NBD_FLAG_HAS_FLAGS)
    return Binding(index, "nbd://h", export, connections=1, live=1, diskseq=diskseq).to_wire()


def cut(server: Server, number: int = -1) -> None:
    """Kill a connection from the server's side."""
    server._conns[number].shutdown(socket.SHUT_RDWR)


def in_turn(*serves: Serve) -> Serve:
    """A server that is another one for each connection; the last one stays."""
    turns = itertools.chain(serves, itertools.repeat(serves[-1]))

    def serve(conn: socket.socket) -> None:
        next(turns)(conn)

    return serve


SILENT = says(b"")
"""A server that accepts, and says nothing."""


# Orders


def test_a_ping_is_answered_and_nothing_else_said(boss: Boss) -> None:
    assert boss.order("ping") == {}
    assert boss.events == []


def test_an_unknown_order_is_an_error_and_the_next_one_is_obeyed(boss: Boss) -> None:
    with pytest.raises(NbddError, match="no order 'dance'"):
        boss.order("dance", [boss.sock.fileno()])
    assert boss.order("ping") == {}


def test_the_worker_ends_in_peace_when_the_manager_goes(boss: Boss) -> None:
    boss.order("ping")
    assert boss.dismiss() == 0


def test_the_worker_ends_in_peace_when_the_manager_goes_without_listening(boss: Boss) -> None:
    boss.send("ping")
    assert boss.dismiss() == 0


@pytest.mark.parametrize("rubbish", [b"rubbish\n", b"[]\n", b'{"order":"ping"}\n'])
def test_the_worker_ends_with_an_error_where_the_manager_talks_rubbish(boss: Boss, rubbish: bytes) -> None:
    boss.sock.send(rubbish)
    assert boss.ended() == 1


def test_the_device_stays_when_the_worker_goes(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        assert boss.dismiss() == 0
    assert NAME in kernel.bound
    assert "disconnect" not in dict(kernel.asked)


def test_what_needs_a_device_says_that_there_is_none(boss: Boss) -> None:
    with pytest.raises(NotAttached):
        boss.order("set-timeout", seconds=1)
    with pytest.raises(NotAttached):
        boss.order("statistics")


def test_exports_are_told_in_pieces(boss: Boss) -> None:
    names = [f"export{number}".encode() for number in range(1200)]
    with Server(offers(dict.fromkeys(names, MIB))) as server:
        boss.order("list-exports", uri=str(server.uri()))
    told = [message["exports"] for message, _ in boss.events]
    assert [len(exports) for exports in told] == [500, 500, 200]
    assert [export["name"].encode() for exports in told for export in exports] == names


# Errands


def test_orders_are_answered_while_an_attach_waits_for_its_server(boss: Boss) -> None:
    with Server(SILENT) as server:
        boss.send("attach", definition=wire(server), resume=False)
        assert server.connected.wait(SECONDS)
        assert boss.order("ping") == {}
        with pytest.raises(NotAttached):
            boss.order("statistics")
        with pytest.raises(NbddError, match="no order 'dance'"):
            boss.order("dance")
        assert len(boss.errands()) == 1


def test_orders_for_errands_are_carried_out_one_after_the_other(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        kernel.before["bind"] = threading.Event()
        attach = boss.send("attach", definition=wire(server), resume=False)
        numbers = [boss.send("set-timeout", seconds=seconds) for seconds in (1, 2, 3)]
        kernel.before["bind"].set()
        _, fds = boss.reply(attach)
        for fd in fds:
            os.close(fd)
        for number in numbers:
            assert boss.reply(number) == ({}, [])
    assert [ask for ask in kernel.asked if ask[0] == "timeout"] == [("timeout", 1), ("timeout", 2), ("timeout", 3)]


def test_an_errand_is_reaped_and_leaves_no_descriptor(boss: Boss) -> None:
    boss.order("ping")
    before = boss.descriptors()
    with Server(offers({b"": MIB})) as server:
        for _ in range(5):
            boss.order("list-exports", uri=str(server.uri()))
    until(lambda: not boss.errands())
    boss.order("ping")
    assert boss.descriptors() == before


def test_an_errand_shows_what_it_is(boss: Boss, kernel: FakeKernel) -> None:
    kernel.before["find"] = threading.Event()
    number = boss.send("look")
    assert until(lambda: Path(f"/proc/{boss.errand()}/comm").read_text().startswith("task:"))
    assert Path(f"/proc/{boss.pid}/comm").read_text() == f"nbdd:{NAME}\n"
    kernel.before["find"].set()
    boss.reply(number)


def test_where_no_process_can_be_had_the_order_fails_and_the_next_may_not(
    hire: Callable[[], Boss], kernel: FakeKernel
) -> None:
    kernel.settings["forks"] = 1
    boss = hire()
    boss.order("ping")
    before = boss.descriptors()
    with Server(offers({b"": MIB})) as server:
        with pytest.raises(
            WorkerFailed, match="No process could be started for 'disk': Resource temporarily unavailabl"
        ):
            boss.order("attach", definition=wire(server), resume=False)
        assert boss.descriptors() == before
        assert boss.order("attach", definition=wire(server), resume=False)["live"] == 1


@pytest.mark.parametrize("how", ["dismissed", "killed"])
def test_a_worker_that_goes_during_a_slow_negotiation_binds_nothing(boss: Boss, kernel: FakeKernel, how: str) -> None:
    asked, over = threading.Event(), threading.Event()
    answer = offers({b"": MIB})

    def serve(conn: socket.socket) -> None:
        asked.set()
        assert over.wait(SECONDS)
        with contextlib.suppress(OSError):
            answer(conn)

    with Server(serve) as server:
        boss.send("attach", definition=wire(server), resume=False)
        assert asked.wait(SECONDS)
        errand = boss.errand()
        if how == "killed":
            os.kill(boss.pid, signal.SIGKILL)
        else:
            boss.sock.shutdown(socket.SHUT_RDWR)
        assert boss.ended() == (-signal.SIGKILL if how == "killed" else 0)
        until(lambda: gone(errand))
        over.set()
    assert kernel.bound == {}


def test_a_stopped_errand_goes_with_its_worker(boss: Boss, kernel: FakeKernel) -> None:
    kernel.before["find"] = threading.Event()
    boss.send("look")
    until(lambda: "find" in kernel.askers)
    errand = boss.errand()
    os.kill(errand, signal.SIGSTOP)
    os.kill(boss.pid, signal.SIGKILL)
    assert boss.ended() == -signal.SIGKILL
    until(lambda: gone(errand))


def test_the_end_of_a_worker_is_told_when_nothing_of_its_errand_is_left_in_the_kernel(
    hire: Callable[[], Boss], kernel: FakeKernel, computer: tuple[FakeKernel, Nursery]
) -> None:
    kernel.settings["stuck"] = True
    kernel.before["stuck"] = kernel.before["bind"] = threading.Event()
    boss, other = hire(), hire()
    with Server(offers({b"": MIB})) as server:
        boss.send("attach", definition=wire(server), resume=False)
        until(lambda: {"stuck", "bind"} <= kernel.askers.keys())
        errand = boss.errand()
        os.kill(boss.pid, signal.SIGKILL)
        until(lambda: gone(errand))
        # Another's end is told meanwhile.
        other.dismiss()
        assert not computer[1].told(boss.pid)
        kernel.before["stuck"].set()
        assert boss.ended() == -signal.SIGKILL
    assert kernel.bound == {}


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_errand_that_is_killed_over_the_binding_takes_the_worker_along_and_the_next_one_sees_what_was_bound(
    hire: Callable[[], Boss], kernel: FakeKernel, when: str
) -> None:
    with Server(offers({b"": MIB})) as server:
        held = getattr(kernel, when)["bind"] = threading.Event()
        boss = hire()
        boss.send("attach", definition=wire(server), resume=False)
        until(lambda: "bind" in kernel.askers)
        if when == "after":
            kernel.wait_for("bind")
        os.kill(kernel.askers["bind"], signal.SIGKILL)
        assert boss.ended() == 1
        held.set()
        successor = hire()
        assert successor.order("attach", definition=wire(server), resume=True)["live"] == 1
        until(lambda: kernel.live(NAME) == 1)
        successor.order("detach", binding=None, force=False)
    assert kernel.bound == {}
    assert [what for what, _ in kernel.asked].count("bind") == 1


def test_what_was_bound_is_made_anew_where_the_server_can_not_be_asked_and_nobody_uses_it(
    hire: Callable[[], Boss], kernel: FakeKernel
) -> None:
    # A server with a place for one client, which our own device takes.
    serve = offers({b"": MIB})
    turns = iter([serve, lambda conn: conn.close(), serve])

    def in_turn(conn: socket.socket) -> None:
        next(turns)(conn)

    with Server(in_turn) as server:
        kernel.after["bind"] = threading.Event()
        boss = hire()
        boss.send("attach", definition=wire(server), resume=False)
        kernel.wait_for("bind")
        os.kill(kernel.askers["bind"], signal.SIGKILL)
        assert boss.ended() == 1
        kernel.after["bind"].set()
        successor = hire()
        assert successor.order("attach", definition=wire(server), resume=True)["live"] == 1
        assert [what for what, _ in kernel.asked if what in ("bind", "disconnect")] == ["bind", "disconnect", "bind"]
        successor.order("detach", binding=None, force=False)
    assert kernel.bound == {}


@pytest.mark.parametrize("order", ["detach", "set-timeout"])
def test_an_errand_that_is_killed_over_another_order_takes_the_worker_along(
    boss: Boss, kernel: FakeKernel, order: str
) -> None:
    question = {"detach": "disconnect", "set-timeout": "timeout"}[order]
    kernel.before[question] = threading.Event()
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        boss.send(order, binding=None, force=False, seconds=3)
        until(lambda: question in kernel.askers)
        os.kill(kernel.askers[question], signal.SIGKILL)
        assert boss.ended() == 1
    assert NAME in kernel.bound


# Attach


def test_attach_binds_what_the_server_offers_and_describes_it(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": 4 * MIB}, MULTI)) as server:
        definition = wire(server, connections=2, timeout=3, dead_timeout=4, device=5, read_only=True, block_size=4096)
        reply, fds = boss.order_fds("attach", definition=definition, resume=False)
        assert len(fds) == 2, "the links, for whoever comes after us"
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
        told = {key: reply[key] for key in ("index", "node", "size", "block-size", "read-only", "connections", "live")}
        assert told == {
            "index": 5, "node": "/dev/nbd5", "size": 4 * MIB, "block-size": 4096, "read-only": True, "connections": 2,
            "live": 2,
        }  # fmt: skip
        assert (reply["diskseq"], reply["reconnects"], reply["uri"]) == (7, 0, str(server.uri()))


def test_what_the_server_could_not_give_is_told(boss: Boss) -> None:
    with Server(offers({b"": MIB})) as server:
        assert boss.order("attach", definition=wire(server, connections=3), resume=False)["connections"] == 1
        assert "one is used instead of 3" in boss.event()[0]["message"]


def test_links_that_the_kernel_does_not_read_are_made_anew_once_for_each_of_them(
    boss: Boss, kernel: FakeKernel
) -> None:
    kernel.refusals["bind"] = ConnectionNotServiced("not read")
    with Server(offers({b"": MIB}, MULTI)) as server:
        with pytest.raises(ConnectionNotServiced):
            boss.order("attach", definition=wire(server, connections=3), resume=False)
        assert len(server._conns) == 9
    assert [event["message"] for event, _ in boss.events] == 2 * ["not read Connecting again."]


def test_a_name_that_is_bound_by_somebody_else_is_refused(boss: Boss, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = node(3, MIB, 512)
    with Server(offers({b"": MIB})) as server, pytest.raises(Busy, match="/dev/nbd3 is bound under the name 'disk'"):
        boss.order("attach", definition=wire(server), resume=False)


def test_a_device_that_a_worker_before_us_bound_is_taken_over(boss: Boss, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = node(3, MIB, 512)
    with Server(offers({b"": MIB}, MULTI)) as server:
        reply, fds = boss.order_fds("attach", definition=wire(server, connections=2), resume=True)
        boss.order("ping")
    assert (reply["index"], reply["connections"], reply["live"]) == (3, 2, 2)
    assert fds == []
    assert "bind" not in dict(kernel.asked)


def test_an_attach_resumed_where_nothing_was_bound_is_a_plain_one(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=True)
    assert [what for what, _ in kernel.asked] == ["bind"]


@pytest.mark.parametrize(
    ("serve", "kind"),
    [(offers({b"": 0}), NegotiationFailed), (offers({b"x": MIB}), NoSuchExport), (says(b"HTTP/1.1"), NbddError)],
)
def test_a_refusal_of_the_server_is_told_by_its_class_and_the_worker_lives(
    hire: Callable[[], Boss], kernel: FakeKernel, serve: Serve, kind: type[NbddError]
) -> None:
    kernel.settings["CONNECT_SECONDS"] = 1.0
    boss = hire()
    with Server(serve) as server, pytest.raises(kind):
        boss.order("attach", definition=wire(server), resume=False)
    assert boss.order("ping") == {}


def test_a_refusal_of_the_kernel_is_told_and_leaves_no_socket(boss: Boss, kernel: FakeKernel) -> None:
    kernel.refusals["bind"] = KernelError("no")
    hung_up = threading.Event()

    def serve(conn: socket.socket) -> None:
        offers({b"": MIB})(conn)
        hung_up.set()

    with Server(serve) as server:
        with pytest.raises(KernelError):
            boss.order("attach", definition=wire(server), resume=False)
        assert hung_up.wait(SECONDS)


# Adopt


Notes = Callable[..., Message]


@pytest.fixture
def notes(hire: Callable[[], Boss], kernel: FakeKernel) -> Notes:
    """Makes a device that another worker bound, and returns the binding it told."""

    def make(server: Server, **changes: Any) -> Message:
        before, connections = hire(), changes.get("connections", 1)
        binding = before.order("attach", definition=wire(server, connections=connections), resume=False)
        before.dismiss()
        kernel.asked.clear()
        return {**binding, **changes}

    return make


def test_adopt_takes_the_device_over_with_its_links(boss: Boss, kernel: FakeKernel, notes: Notes) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        binding = notes(server, connections=2)
        one, two = socket.socketpair()
        three, four = socket.socketpair()
        reply, fds = boss.order_fds(
            "adopt", [one.fileno(), three.fileno()], definition=wire(server, connections=2), binding=binding
        )
        assert (reply["live"], len(fds)) == (2, 2)
        for fd in fds:
            os.close(fd)
        assert kernel.asked == [("adopt", [0, 7])]
        one.close()
        two.shutdown(socket.SHUT_RDWR)
        assert boss.event_with(live=1)["error"] == "ConnectFailed"
        for sock in (two, three, four):
            sock.close()


def test_adopt_of_what_is_gone_or_was_never_bound_is_refused_and_leaves_no_socket(boss: Boss, notes: Notes) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server)
        for gone in (None, {**binding, "index": 9}, {**binding, "diskseq": 8}, {**binding, "pid": 12}):
            one, two = socket.socketpair()
            with pytest.raises(NotAttached):
                boss.order("adopt", [one.fileno()], definition=wire(server), binding=gone)
            one.close()
            assert two.recv(1) == b"", "the worker closed its copy too"
            two.close()


def test_a_reply_has_the_number_of_its_order_whatever_stands_in_the_notes(boss: Boss, notes: Notes) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server) | {"id": 4711}
        assert boss.order("adopt", definition=wire(server), binding=binding)["index"] == 0


def test_adopt_passes_over_descriptors_that_are_no_sockets(boss: Boss, notes: Notes, tmp_path: Path) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server)
        one, two = socket.socketpair()
        with (tmp_path / "file").open("w") as file:
            order = {"definition": wire(server), "binding": binding}
            assert boss.order("adopt", [file.fileno(), one.fileno()], **order)["live"] == 1
        one.close()
        two.close()


def test_a_device_all_of_whose_links_were_dead_is_mended_by_the_successor(
    boss: Boss, kernel: FakeKernel, notes: Notes
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, live=0)
        assert boss.order("adopt", definition=wire(server), binding=binding)["live"] == 0
        assert boss.event_with(live=1)["reconnects"] == 1
    assert ("replace", 1) in kernel.asked


def test_a_device_whose_links_nobody_kept_is_watched_by_the_kernels_reports_and_mended(
    boss: Boss, kernel: FakeKernel, notes: Notes
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server)
        assert boss.order("adopt", definition=wire(server), binding=binding)["live"] == 1
        boss.order("ping")
        # What died unseen is replaced by a link offered at once; the kernel drops it where nothing had died.
        kernel.wait_for("replace")
        until(lambda: not boss.errands())
        kernel.report(5)  # somebody else's
        kernel.report(0)
        assert boss.event_with(live=0)["error"] == "ConnectFailed"
        assert boss.event_with(live=1)["reconnects"] == 1
        assert kernel.listeners() == 0, "links that are ours again are watched by themselves"


def test_a_link_that_died_while_nobody_watched_is_mended(boss: Boss, notes: Notes) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server)
        one, two = socket.socketpair()
        two.close()
        boss.order("adopt", [one.fileno()], definition=wire(server), binding=binding)
        one.close()
        assert boss.event_with(live=0)["error"] == "ConnectFailed"
        assert boss.event_with(live=1)["reconnects"] == 1


@pytest.mark.parametrize("held", [0, 1])
def test_a_successor_offers_all_links_that_there_can_be_where_some_died_unseen(
    boss: Boss, kernel: FakeKernel, notes: Notes, held: int
) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        binding = notes(server, connections=3, live=3)
        pairs = [socket.socketpair() for _ in range(3)]
        for _, far in pairs[held:]:
            far.close()
        fds = [near.fileno() for near, _ in pairs]
        boss.order("adopt", fds, definition=wire(server, connections=3), binding=binding)
        for near, _ in pairs:
            near.close()
        assert boss.event_with(live=held)["error"] == "ConnectFailed"
        # The predecessor may have replaced any of the dead ones, and said nothing any more.
        assert boss.event_with(live=3)["reconnects"] == 3 - held
        assert ("replace", 3) in kernel.asked
        # From here on the kernel says what dies, and what it is given is its own for certain.
        for _ in range(3 - held):
            kernel.report(0)
        assert boss.event_with(live=3, reconnects=2 * (3 - held))
        until(lambda: kernel.listeners() == 0)
        for _, far in pairs[:held]:
            far.close()


def test_a_link_that_the_kernel_loses_while_it_is_offered_one_on_suspicion_is_replaced_too(
    boss: Boss, kernel: FakeKernel, notes: Notes
) -> None:
    with Server(offers({b"": MIB})) as server:
        held = kernel.after["replace"] = threading.Event()
        boss.order("adopt", definition=wire(server), binding=notes(server))
        kernel.wait_for("replace")
        kernel.report(0)
        assert boss.event_with(live=0)
        held.set()
        assert boss.event_with(live=1)["reconnects"] == 1
        kernel.wait_for("replace", 2)


# Renewal


def _reported(kernel: FakeKernel, links: int = 1) -> None:
    """As the kernel does when its links are shut down."""
    until(lambda: kernel.links[NAME] and kernel.live(NAME) == 0)
    for _ in range(links):
        kernel.report(0)


@pytest.fixture
def _hasty(kernel: FakeKernel) -> None:
    kernel.settings["QUIET_SECONDS"] = 0.01
    kernel.settings["DEAD_SECONDS"] = 1.0


@pytest.mark.usefixtures("_hasty")
def test_reconnect_has_the_new_links_before_the_old_ones_end(hire: Callable[[], Boss], kernel: FakeKernel) -> None:
    boss = hire()
    with Server(offers({b"": MIB}, MULTI)) as server:
        boss.order("attach", definition=wire(server, connections=2), resume=False)
        number = boss.send("reconnect")
        _reported(kernel, 2)
        assert len(server._conns) == 4
        assert boss.event_with(live=0)["lost"]
        told, fds = boss.event()
        assert (told["live"], told["reconnects"], told["lost"], fds) == (2, 2, 0, 2)
        boss.reply(number)
        assert kernel.asked[-1] == ("replace", 2)
        assert kernel.live(NAME) == 2
        cut(server)
        assert boss.event_with(live=1)
        assert boss.event_with(live=2), "the new ones are watched"


@pytest.mark.usefixtures("_hasty")
def test_reconnect_goes_back_to_the_first_server_that_has_the_same_data(
    hire: Callable[[], Boss], kernel: FakeKernel
) -> None:
    boss = hire()
    with Server(offers({b"": 2 * MIB})) as other, Server(offers({b"": MIB})) as first:
        with Server(offers({b"": MIB})) as second:
            servers = [str(server.uri()) for server in (other, first, second)]
            boss.order("attach", definition={**wire(second), "uri": servers[2:]}, resume=False)
            number = boss.send("reconnect")
            _reported(kernel)
            boss.reply(number)
        assert boss.event_with(live=1)["uri"] == servers[2], "the definition names no other"


@pytest.mark.usefixtures("_hasty")
def test_reconnect_to_a_server_that_is_away_or_other_costs_no_link(
    hire: Callable[[], Boss], kernel: FakeKernel
) -> None:
    boss = hire()
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}), SILENT)) as server:
        boss.order("attach", definition=wire(server), resume=False)
        with pytest.raises(NegotiationFailed, match="came back as something else"):
            boss.order("reconnect")
        assert kernel.live(NAME) == 1
        assert boss.events == []
        cut(server, 0)
        assert boss.event_with(live=0), "it is watched on"


@pytest.mark.usefixtures("_hasty")
def test_links_that_the_kernel_does_not_let_go_of_are_mended(hire: Callable[[], Boss], kernel: FakeKernel) -> None:
    boss = hire()
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        with pytest.raises(TimedOut, match="did not let go of the old connections"):
            boss.order("reconnect")
        assert boss.event_with(live=1)["reconnects"] == 1
        assert kernel.live(NAME) == 1


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_errand_that_is_killed_over_the_exchange_leaves_a_device_that_is_mended(
    hire: Callable[[], Boss], kernel: FakeKernel, moment: str
) -> None:
    boss = hire()
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        held = getattr(kernel, moment)["replace"] = threading.Event()
        number = boss.send("reconnect")
        _reported(kernel)
        until(lambda: "replace" in kernel.askers)
        if moment == "after":
            kernel.wait_for("replace")
        os.kill(kernel.askers["replace"], signal.SIGKILL)
        with pytest.raises(WorkerFailed):
            boss.reply(number)
        held.set()
        assert boss.event_with(live=1)["reconnects"] == 1
        assert kernel.live(NAME) == 1


@pytest.mark.usefixtures("_hasty")
def test_resize_takes_the_grown_size_over_new_links_and_mending_goes_by_it(
    hire: Callable[[], Boss], kernel: FakeKernel
) -> None:
    boss = hire()
    grown = offers({b"": 3 * MIB + 100})
    with Server(in_turn(offers({b"": MIB}), offers({b"": MIB}), grown, grown, offers({b"": MIB}))) as server:
        boss.order("attach", definition=wire(server), resume=False)
        assert boss.order("resize")["size"] == MIB
        assert "replace" not in dict(kernel.asked), "nothing to do"
        number = boss.send("resize")
        _reported(kernel)
        reply, _ = boss.reply(number)
        assert reply["size"] == 3 * MIB
        assert kernel.asked[-2:] == [("replace", 1), ("size", 3 * MIB)]
        assert boss.event_with(live=1)["export"]["size"] == 3 * MIB + 100
        assert boss.event_with(live=1)["size"] == 3 * MIB
        cut(server)
        assert boss.event_with(live=0)
        assert boss.event_with(live=1)["reconnects"] == 2
        with pytest.raises(NegotiationFailed, match="has 1048576 bytes now, less than the 3145828"):
            boss.order("resize")


@pytest.mark.usefixtures("_hasty")
def test_a_server_that_came_back_grown_is_taken_by_a_resize(hire: Callable[[], Boss]) -> None:
    boss = hire()
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}))) as server:
        boss.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert boss.event_with(error="ExportChanged")
        assert boss.order("resize")["size"] == 2 * MIB
        assert boss.event_with(live=1, size=2 * MIB)


@pytest.mark.usefixtures("_hasty")
def test_a_size_that_the_kernel_refuses_leaves_the_new_links(hire: Callable[[], Boss], kernel: FakeKernel) -> None:
    boss = hire()
    kernel.refusals["size"] = KernelError("no")
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}))) as server:
        boss.order("attach", definition=wire(server), resume=False)
        number = boss.send("resize")
        _reported(kernel)
        with pytest.raises(KernelError):
            boss.reply(number)
        told = boss.event_with(live=1)
        assert (told["size"], told["reconnects"], kernel.live(NAME)) == (MIB, 1, 1)


def test_links_that_are_the_kernels_alone_are_not_exchanged(boss: Boss, kernel: FakeKernel, notes: Notes) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("adopt", definition=wire(server), binding=notes(server))
        kernel.wait_for("replace")
        with pytest.raises(Busy, match="are the kernel's alone"):
            boss.order("reconnect")


@pytest.mark.parametrize("order", ["reconnect", "resize"])
def test_what_is_not_attached_is_not_renewed(boss: Boss, order: str) -> None:
    with pytest.raises(NotAttached):
        boss.order(order)


# Links


def test_a_link_that_dies_is_told_and_replaced_when_the_server_is_there(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        for number in (1, 2, 3):
            cut(server)
            message, fds = boss.event()
            assert (message["event"], message["live"], message["error"], fds) == ("links", 0, "ConnectFailed", 0)
            message, fds = boss.event()
            assert (message["live"], message["reconnects"], "error" in message, fds) == (1, number, False, 1)
    assert [detail for what, detail in kernel.asked if what == "replace"] == [1, 1, 1]


def test_of_several_links_only_the_dead_one_is_replaced(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        boss.order("attach", definition=wire(server, connections=3), resume=False)
        cut(server, 1)
        assert boss.event_with(live=2)
        message, fds = boss.event()
        assert (message["live"], message["reconnects"], fds) == (3, 1, 3)
        assert len(server._conns) == 4
    assert ("replace", 1) in kernel.asked


def test_links_that_die_together_are_all_replaced(boss: Boss) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        boss.order("attach", definition=wire(server, connections=4), resume=False)
        for number in range(4):
            cut(server, number)
        assert boss.event_with(reconnects=4)["live"] == 4


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (offers({b"": 2 * MIB}), "the size was 1048576 and is 2097152"),
        (offers({b"": MIB}, HAS_FLAGS | int(Flags.NBD_FLAG_READ_ONLY)), "the flags was"),
    ],
)
def test_a_server_that_comes_back_as_another_is_refused_until_it_is_the_same_again(
    boss: Boss, kernel: FakeKernel, other: Serve, what: str
) -> None:
    good = offers({b"": MIB})
    with Server(in_turn(good, other, other, other, good)) as server:
        boss.order("attach", definition=wire(server), resume=False)
        cut(server)
        message = boss.event_with(error="ExportChanged")
        assert "came back as something else, and is not used" in message["message"]
        assert what in message["message"]
        assert message["live"] == 0
        assert ("replace", 1) not in kernel.asked
        assert boss.event_with(live=1)["reconnects"] == 1
        assert kernel.asked.count(("replace", 1)) == 1


def test_a_server_that_does_not_come_back_is_tried_on_and_orders_are_obeyed_meanwhile(boss: Boss) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
    for _ in range(5):
        message = boss.event_with(event="links")
        assert (message["error"], message["live"]) == (ConnectFailed.__name__, 0)
    boss.order("set-timeout", seconds=4)
    boss.order("detach", binding=None, force=False)


def test_orders_are_answered_at_once_while_mending_waits_for_a_silent_server(boss: Boss, kernel: FakeKernel) -> None:
    with Server(in_turn(offers({b"": MIB}), SILENT)) as server:
        boss.order("attach", definition=wire(server), resume=False)
        boss.rested()
        cut(server)
        mending = boss.errand()
        assert boss.order("ping") == {}
        assert boss.order("statistics")["statistics"]["in-flight"] == 1
        boss.order("set-timeout", seconds=12)
        assert ("timeout", 12) in kernel.asked
        assert mending in boss.errands()


def test_what_waits_too_long_is_warned_of_and_then_refused_until_a_server_is_back(
    boss: Boss, kernel: FakeKernel
) -> None:
    mood = [offers({b"": MIB})]

    def serve(conn: socket.socket) -> None:
        mood[0](conn)

    with Server(serve) as server:
        boss.order("attach", definition=wire(server, dead_timeout=1), resume=False)
        good, mood[0] = mood[0], socket.socket.close
        cut(server)
        assert boss.event_with(error="ConnectFailed")["lost"] > 0
        assert "reads and writes that wait fail in " in boss.event_with(event="warning")["message"]
        told = boss.event_with(failing=True)
        assert (told["error"], told["live"]) == ("TimedOut", 0)
        assert told["message"].startswith("No server came back within 1 s")
        kernels = kernel.links[NAME][0]
        kernels.settimeout(10)
        kernels.sendall(bytes.fromhex("25609513 0000 0000 1122334455667788 0000000000000000 00001000"))
        assert kernels.recv(100) == bytes.fromhex("67446698 00000005 1122334455667788"), "EIO, for that request"
        mood[0] = good
        # Our end goes first, or the kernel would not take another in its place.
        assert kernels.recv(1) == b""
        kernels.shutdown(socket.SHUT_RDWR)
        told = boss.event_with(live=1)
        assert (told["failing"], told["lost"]) == (False, 0)


def test_a_successor_ends_the_waiting_when_it_would_have_ended(boss: Boss, hire: Callable[[], Boss]) -> None:
    with Server(in_turn(offers({b"": MIB}), socket.socket.close)) as server:
        definition = wire(server, dead_timeout=3600)
        notes = boss.order("attach", definition=definition, resume=False)
        cut(server)
        lost = boss.event_with(error="ConnectFailed")["lost"]
        boss.dismiss()
        successor = hire()
        long_ago = {**notes, "live": 0, "lost": lost - 3600}
        successor.order("adopt", definition=definition, binding=long_ago)
        assert successor.event_with(failing=True)["error"] == "TimedOut"


def test_a_worker_in_a_hurry_ends_the_waiting_sooner_now_or_after_the_next_death_of_a_link(boss: Boss) -> None:
    good = offers({b"": MIB})
    with pytest.raises(NotAttached):
        boss.order("shorten-dead-timeout", seconds=1)
    with Server(in_turn(good, socket.socket.close)) as server:
        boss.order("attach", definition=wire(server, dead_timeout=3600), resume=False)
        assert boss.order("shorten-dead-timeout", seconds=600) == {"dead-timeout": 600}
        assert boss.order("shorten-dead-timeout", seconds=900) == {"dead-timeout": 600}, "never later"
        cut(server)
        assert boss.event_with(error="ConnectFailed")["lost"] > 0
        assert boss.order("shorten-dead-timeout", seconds=1) == {"dead-timeout": 1}
        assert boss.event_with(failing=True)["error"] == "TimedOut"
        assert boss.order("shorten-dead-timeout", seconds=1) == {"dead-timeout": 1}


def test_a_detach_ends_the_mending(boss: Boss, kernel: FakeKernel) -> None:
    with Server(in_turn(offers({b"": MIB}), SILENT)) as server:
        boss.order("attach", definition=wire(server), resume=False)
        boss.rested()
        cut(server)
        mending = boss.errand()
        boss.order("detach", binding=None, force=False)
        until(lambda: gone(mending))
        until(lambda: not boss.errands())
    assert kernel.bound == {}
    assert [message["error"] for message, _ in boss.events] == ["ConnectFailed"]


def test_a_refused_detach_lets_the_mending_begin_anew(hire: Callable[[], Boss], kernel: FakeKernel) -> None:
    kernel.settings["MEND_SECONDS"] = 1.0
    boss = hire()
    good = offers({b"": MIB})
    kernel.refusals["disconnect"] = Busy("in use")
    with Server(in_turn(good, SILENT, good)) as server:
        boss.order("attach", definition=wire(server), resume=False)
        boss.rested()
        cut(server)
        boss.errand()
        with pytest.raises(Busy):
            boss.order("detach", binding=None, force=False)
        assert boss.event_with(live=1)["reconnects"] == 1
    assert kernel.asked.count(("replace", 1)) == 1


def test_links_that_die_of_a_detach_are_not_mended(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        kernel.after["disconnect"] = threading.Event()
        number = boss.send("detach", binding=None, force=False)
        kernel.wait_for("disconnect")
        assert boss.order("ping") == {}
        kernel.after["disconnect"].set()
        boss.reply(number)
    assert boss.events == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_errand_that_is_killed_over_mending_leaves_no_link_that_nobody_watches(
    boss: Boss, kernel: FakeKernel, when: str
) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        held = getattr(kernel, when)["replace"] = threading.Event()
        cut(server)
        until(lambda: "replace" in kernel.askers)
        if when == "after":
            kernel.wait_for("replace")
        os.kill(kernel.askers["replace"], signal.SIGKILL)
        assert boss.event_with(error="WorkerFailed")["live"] == 0
        held.set()
        message, fds = boss.event()
        while "error" in message:
            message, fds = boss.event()
        assert (message["live"], message["reconnects"], fds) == (1, 1, 1)
        # The newest, which is watched, is the one that the kernel has.
        assert kernel.live(NAME) == 1
        assert kernel.links[NAME][0].getsockname() == server._conns[-1].getpeername()
        cut(server)
        assert boss.event_with(live=0)
        assert boss.event_with(live=1)


def test_a_link_that_is_offered_just_when_a_detach_comes_is_not_left_behind(boss: Boss, kernel: FakeKernel) -> None:
    kernel.refusals["disconnect"] = Busy("in use")
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        held = kernel.before["replace"] = threading.Event()
        kernel.after["replace"] = threading.Event()
        cut(server)
        until(lambda: "replace" in kernel.askers)
        os.kill(boss.pid, signal.SIGSTOP)
        held.set()
        kernel.wait_for("replace")
        number = boss.send("detach", binding=None, force=False)
        os.kill(boss.pid, signal.SIGCONT)
        with pytest.raises(Busy):
            boss.reply(number)
        kernel.after["replace"].set()
        assert boss.event_with(live=1)
        assert kernel.live(NAME) == 1
        assert kernel.links[NAME][0].getsockname() == server._conns[-1].getpeername()


def test_mending_that_hangs_is_killed_and_tried_again(hire: Callable[[], Boss], kernel: FakeKernel) -> None:
    kernel.settings["MEND_DEADLINE"] = 0.3
    boss = hire()
    with Server(in_turn(offers({b"": MIB}), SILENT, offers({b"": MIB}))) as server:
        boss.order("attach", definition=wire(server), resume=False)
        boss.rested()
        cut(server)
        os.kill(boss.errand(), signal.SIGSTOP)
        assert boss.event_with(error="WorkerFailed")["live"] == 0
        assert boss.event_with(live=1)["reconnects"] == 1


def test_mending_goes_on_where_no_process_could_be_had(
    hire: Callable[[], Boss], kernel: FakeKernel, notes: Notes
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, live=0)
        kernel.settings.update(forks=2, forks_after=1)
        boss = hire()
        assert boss.order("adopt", definition=wire(server), binding=binding)["live"] == 0
        assert boss.event_with(error="WorkerFailed")["live"] == 0
        assert boss.event_with(error="WorkerFailed")["live"] == 0
        assert boss.event_with(live=1)["reconnects"] == 1


def test_the_reason_why_a_link_ended_is_told(boss: Boss) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert boss.event_with(live=0)["message"] == f"A connection to {server.uri()} ended: the server closed it."


def test_a_refusal_of_the_kernel_to_take_a_link_is_told_and_tried_again(boss: Boss, kernel: FakeKernel) -> None:
    kernel.refusals["replace"] = KernelError("no")
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert boss.event_with(error="KernelError")["live"] == 0
        kernel.refusals.clear()
        assert boss.event_with(live=1)


def test_a_worker_whose_device_was_ended_by_somebody_else_ends_in_peace(boss: Boss, kernel: FakeKernel) -> None:
    kernel.refusals["replace"] = NotAttached("gone")
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        cut(server)
        assert boss.ended() == 0


# Live orders


def test_the_timeout_goes_to_the_kernel(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        boss.order("set-timeout", seconds=12)
    assert ("timeout", 12) in kernel.asked


def test_statistics_count_from_the_attach(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        counted = kernel.bound[NAME]["counted"]
        counted["read-requests"] += 3
        counted["write-sectors"] += 2
        counted["in-flight"] = 9
        counted["write-milliseconds"] += 5
        told = boss.order("statistics")["statistics"]
        assert (told["read-time"], told["write-time"]) == (0, 5)
        assert (told["reads"], told["writes"], told["written-bytes"], told["in-flight"]) == (3, 0, 1024, 9)
        counted.clear()
        with pytest.raises(NotAttached):
            boss.order("statistics")


# Detach


def test_detach_frees_the_device_and_closes_the_links(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        held = boss.descriptors()
        boss.order("detach", binding=None, force=False)
        boss.order("ping")
        until(lambda: boss.descriptors() < held)
    assert kernel.bound == {}
    assert boss.events == [], "its links died on purpose"


def test_detach_of_a_device_in_use_is_refused_and_it_is_watched_on(boss: Boss, kernel: FakeKernel) -> None:
    kernel.refusals["disconnect"] = Busy("in use")
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        with pytest.raises(Busy):
            boss.order("detach", binding=None, force=False)
        cut(server)
        assert boss.event_with(live=1)


def test_detach_by_force_tells_who_still_has_the_node(boss: Boss) -> None:
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        boss.order("detach", binding=None, force=True)
    assert "blkid (5)" in boss.event()[0]["message"]


def test_detach_by_force_does_not_wait_long_for_the_users_that_it_overrides(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        for force in (False, True):
            boss.order("attach", definition=wire(server), resume=False)
            boss.order("detach", binding=None, force=force)
    asked = [detail for what, detail in kernel.asked if what == "disconnect"]
    assert asked == [{"force": False, "seconds": DETACH_SECONDS}, {"force": True, "seconds": FORCE_SECONDS}]
    assert FORCE_SECONDS <= 5


def test_a_worker_that_is_called_in_detaches_by_the_notes_or_the_name(
    boss: Boss, kernel: FakeKernel, notes: Notes
) -> None:
    with Server(offers({b"": MIB})) as server:
        for told in (True, False):
            binding = notes(server)
            boss.order("detach", definition=wire(server), binding=binding if told else None, force=False)
            assert kernel.bound == {}


def test_a_worker_that_is_called_in_for_a_busy_device_looks_after_it(
    boss: Boss, kernel: FakeKernel, notes: Notes
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server)
        kernel.refusals["disconnect"] = Busy("in use")
        for _ in range(3):
            with pytest.raises(Busy):
                boss.order("detach", definition=wire(server), binding=binding, force=False)
        assert boss.order("statistics")["statistics"]["in-flight"] == 1


@pytest.mark.parametrize("binding", [None, bound(index=9)])
def test_detach_of_what_is_gone_is_done(boss: Boss, binding: Message | None) -> None:
    with Server(offers({b"": MIB})) as server:
        assert boss.order("detach", definition=wire(server), binding=binding, force=False) == {}


def test_detach_of_another_disk_of_the_same_name_touches_nothing(boss: Boss, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = node(0, MIB, 512)
    with Server(offers({b"": MIB})) as server:
        boss.order("detach", definition=wire(server), binding=bound(diskseq=6), force=True)
    assert NAME in kernel.bound


def test_descriptors_of_an_order_that_takes_none_are_closed(boss: Boss) -> None:
    one, two = socket.socketpair()
    boss.order("ping", [one.fileno()])
    one.close()
    assert two.recv(1) == b""
    two.close()


def test_descriptors_that_come_without_an_order_end_nothing(boss: Boss) -> None:
    boss.sock.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    assert boss.order("ping") == {}
