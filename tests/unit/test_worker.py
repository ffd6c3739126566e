# SPDX-License-Identifier: MIT
"""The worker: its orders, its replies, and links that die under it. The servers are scripted, the kernel is a fake."""

from __future__ import annotations

import array
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

import nbdd.worker
from nbdd.channel import Channel, Message
from nbdd.definition import Definition
from nbdd.errors import (
    Busy,
    ConnectFailed,
    KernelError,
    NbddError,
    NegotiationFailed,
    NoSuchExport,
    NotAttached,
)
from nbdd.protocol import Flags
from nbdd.worker import main
from tests.unit.fake_worker import open_fds
from tests.unit.servers import HAS_FLAGS, MIB, Server, offers, says

SECONDS = 30.0
MULTI = HAS_FLAGS | int(Flags.NBD_FLAG_CAN_MULTI_CONN)
NAME = "disk"

Serve = Callable[[socket.socket], None]


class FakeNode:
    """A /dev/nbdX as `nbdd.kernel.Node` shows it."""

    def __init__(self, index: int, size: int, block_size: int, *, read_only: bool) -> None:
        self.index = index
        self.path = f"/dev/nbd{index}"
        self.size = size
        self.block_size = block_size
        self.read_only = read_only
        self.diskseq = 7
        self.pid = 11
        self.counted = {
            "read-requests": 10, "write-requests": 20, "read-sectors": 30, "write-sectors": 40,
            "busy-milliseconds": 50, "in-flight": 1,
        }  # fmt: skip

    def statistics(self) -> dict[str, int]:
        return dict(self.counted)


class FakeKernel:
    """What is bound, and what was asked of it."""

    def __init__(self) -> None:
        self.bound: dict[str, FakeNode] = {}
        self.asked: list[tuple[str, Any]] = []
        self.refusals: dict[str, NbddError] = {}
        self.claims: list[str] = []
        self.reports: list[FakeReports] = []
        self._asked_now = threading.Condition()
        self.open_clients = 0
        self.clients: list[FakeClient] = []

    def find(self, name: str) -> list[FakeNode]:
        return [self.bound[name]] if name in self.bound else []

    def wait_for(self, what: str) -> None:
        """Wait until the worker, in its thread, has asked for it."""
        with self._asked_now:
            assert self._asked_now.wait_for(lambda: what in dict(self.asked), SECONDS), what

    def report(self, index: int) -> None:
        for reports in self.reports:
            reports.report(index)

    def ask(self, what: str, detail: Any = None) -> None:
        with self._asked_now:
            self.asked.append((what, detail))
            self._asked_now.notify_all()
        if what in self.refusals:
            raise self.refusals[what]

    def client(self, backend: str, **arguments: Any) -> FakeClient:
        self.clients.append(FakeClient(self, backend, **arguments))
        return self.clients[-1]


class FakeReports:
    """`nbdd.kernel.LinkDeadMonitor` without a kernel."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._read, self._write = socket.socketpair()
        kernel.reports.append(self)

    def fileno(self) -> int:
        return self._read.fileno()

    def read(self) -> list[int]:
        return list(self._read.recv(64))

    def report(self, index: int) -> None:
        self._write.send(bytes([index]))

    def close(self) -> None:
        self._kernel.reports.remove(self)
        self._read.close()
        self._write.close()


class FakeClient:
    """`nbdd.client.Client` without a kernel."""

    def __init__(
        self, kernel: FakeKernel, backend: str, *, sockets: Sequence[socket.socket] = (), **arguments: Any
    ) -> None:
        self.kernel = kernel
        self.backend = backend
        self.sockets = list(sockets)
        self.arguments = arguments
        self.node: FakeNode | None = None
        kernel.open_clients += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kernel.open_clients -= 1
        for sock in self.sockets:
            sock.close()

    def bind(self, index: int | None) -> FakeNode:
        self.kernel.ask("bind", {**self.arguments, "index": index})
        node = FakeNode(
            index or 0,
            self.arguments["size"],
            self.arguments["block_size"],
            read_only=self.arguments["read_only"],
        )
        self.node = self.kernel.bound[self.backend] = node
        return node

    def claims(self) -> list[str]:
        return self.kernel.claims

    def link_dead(self) -> FakeReports:
        return FakeReports(self.kernel)

    def adopt(
        self, index: int, *, diskseq: int | None = None, pid: int | None = None, sockets: Sequence[socket.socket] = ()
    ) -> FakeNode:
        self.kernel.ask("adopt", (index, diskseq))
        node = self.kernel.bound.get(self.backend)
        same = node is not None and diskseq in (None, node.diskseq) and pid in (None, node.pid)
        if node is None or node.index != index or not same:
            raise NotAttached(f"/dev/nbd{index} is not bound any more.")
        self.node = node
        self.sockets = list(sockets)
        return node

    def replace_links(self, sockets: Sequence[socket.socket]) -> None:
        self.kernel.ask("replace", len(sockets))
        self.sockets.extend(sockets)

    def drop_link(self, sock: socket.socket) -> None:
        self.sockets.remove(sock)
        sock.close()

    def set_timeout(self, seconds: int) -> None:
        self.kernel.ask("timeout", seconds)

    def disconnect(self, *, seconds: float, force: bool) -> list[str]:
        assert seconds > 0
        self.kernel.ask("disconnect", force)
        if self.backend not in self.kernel.bound:
            raise NotAttached("gone")
        del self.kernel.bound[self.backend]
        self.node = None
        return ["blkid (5)"] if force else []


class Boss:
    """The manager's end of a worker that runs in a thread."""

    def __init__(self) -> None:
        ours, theirs = Channel.pair()
        ours.settimeout(SECONDS)
        self.sock = ours
        self.channel = Channel(ours)
        self.events: list[tuple[Message, int]] = []
        """What it said unasked, with the number of descriptors."""
        self.code: int | None = None
        self._ids = itertools.count(1)
        self._thread = threading.Thread(target=self._work, args=(Channel(theirs),))
        self._thread.start()

    def _work(self, channel: Channel) -> None:
        self.code = main(channel, NAME)
        channel.close()

    def order(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> Message:
        reply, back = self.order_fds(order, fds, **arguments)
        for fd in back:
            os.close(fd)
        return reply

    def order_fds(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> tuple[Message, list[int]]:
        number = next(self._ids)
        self.channel.send({"order": order, "id": number, **arguments}, fds)
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

    def ended(self) -> int | None:
        """The exit code, once it has ended by itself."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.code

    def dismiss(self) -> int | None:
        """Close the channel as a manager that goes away, and wait for the end."""
        self.channel.close()
        return self.ended()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel()
    monkeypatch.setattr(nbdd.worker, "Client", fake.client)
    monkeypatch.setattr(nbdd.worker, "find", fake.find)
    monkeypatch.setattr(nbdd.worker, "Usage", lambda: SimpleNamespace(users=lambda _node: fake.claims))
    monkeypatch.setattr(nbdd.worker, "MEND_WAITS", (0.0, 0.01))
    monkeypatch.setattr(nbdd.worker, "_title", lambda _name: None)
    return fake


@pytest.fixture
def boss(kernel: FakeKernel) -> Iterator[Boss]:
    """A worker, and the proof that it holds nothing in the end."""
    before = open_fds()
    made = Boss()
    yield made
    made.dismiss()
    assert kernel.open_clients in (0, 1), "the device's own at most"
    for client in kernel.clients:
        # The links of a bound device go with the process, and here is none.
        client.close()
    for reports in list(kernel.reports):
        reports.close()
    assert open_fds() <= before


def wire(server: Server, **fields: Any) -> dict[str, Any]:
    return Definition(NAME, (server.uri(),), **fields).to_wire()


def cut(server: Server, number: int = -1) -> None:
    """Kill a connection from the server's side."""
    server._conns[number].shutdown(socket.SHUT_RDWR)


def in_turn(*serves: Serve) -> Serve:
    """A server that is another one for each connection; the last one stays."""
    turns = itertools.chain(serves, itertools.repeat(serves[-1]))

    def serve(conn: socket.socket) -> None:
        next(turns)(conn)

    return serve


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


def test_the_worker_ends_in_peace_when_the_manager_goes_without_listening(kernel: FakeKernel) -> None:
    made = Boss()
    assert kernel.bound == {}
    made.channel.send({"order": "ping", "id": 1})
    assert made.dismiss() == 0


@pytest.mark.parametrize("rubbish", [b"rubbish\n", b"[]\n", b'{"order":"ping"}\n'])
def test_the_worker_ends_with_an_error_where_the_manager_talks_rubbish(
    boss: Boss, rubbish: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    boss.sock.send(rubbish)
    assert boss.ended() == 1
    assert "Traceback" in capfd.readouterr().err


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
                    "dead_timeout": 4,
                },
            )
        ]  # fmt: skip
        told = {key: reply[key] for key in ("index", "node", "size", "block-size", "read-only", "connections", "live")}
        assert told == {
            "index": 5, "node": "/dev/nbd5", "size": 4 * MIB, "block-size": 4096, "read-only": True, "connections": 2,
            "live": 2,
        }  # fmt: skip
        assert (reply["diskseq"], reply["reconnects"], reply["uri"]) == (7, 0, str(server.uri()))


def test_a_worker_whose_manager_went_during_a_slow_negotiation_binds_nothing(boss: Boss, kernel: FakeKernel) -> None:
    asked, gone = threading.Event(), threading.Event()
    answer = offers({b"": MIB})

    def serve(conn: socket.socket) -> None:
        asked.set()
        assert gone.wait(SECONDS)
        answer(conn)

    with Server(serve) as server:
        order = {"order": "attach", "id": 1, "definition": wire(server), "resume": False}
        boss.channel.send(order)
        assert asked.wait(SECONDS)
        boss.sock.shutdown(socket.SHUT_RDWR)
        gone.set()
        assert boss.ended() == 0
    assert kernel.bound == {}


def test_what_the_server_could_not_give_is_told(boss: Boss) -> None:
    with Server(offers({b"": MIB})) as server:
        assert boss.order("attach", definition=wire(server, connections=3), resume=False)["connections"] == 1
        assert "one is used instead of 3" in boss.event()[0]["message"]


def test_a_name_that_is_bound_by_somebody_else_is_refused(boss: Boss, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = FakeNode(3, MIB, 512, read_only=False)
    with Server(offers({b"": MIB})) as server, pytest.raises(Busy, match="/dev/nbd3 is bound under the name 'disk'"):
        boss.order("attach", definition=wire(server), resume=False)


def test_a_device_that_a_worker_before_us_bound_is_taken_over(boss: Boss, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = FakeNode(3, MIB, 512, read_only=False)
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
    boss: Boss, serve: Serve, kind: type[NbddError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdd.worker, "CONNECT_SECONDS", 1.0)
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
    assert kernel.open_clients == 0


# Adopt


def notes(server: Server, kernel: FakeKernel, **changes: Any) -> Message:
    """A device that another worker bound, and the binding it told."""
    before = Boss()
    binding = before.order("attach", definition=wire(server, connections=changes.get("connections", 1)), resume=False)
    before.dismiss()
    kernel.asked.clear()
    kernel.open_clients = 0
    return {**binding, **changes}


def test_adopt_takes_the_device_over_with_its_links(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        binding = notes(server, kernel, connections=2)
        one, two = socket.socketpair()
        three, four = socket.socketpair()
        reply, fds = boss.order_fds(
            "adopt", [one.fileno(), three.fileno()], definition=wire(server, connections=2), binding=binding
        )
        assert (reply["live"], len(fds)) == (2, 2)
        for fd in fds:
            os.close(fd)
        assert kernel.asked == [("adopt", (0, 7))]
        one.close()
        two.shutdown(socket.SHUT_RDWR)
        assert boss.event_with(live=1)["error"] == "ConnectFailed"
        for sock in (two, three, four):
            sock.close()


def test_adopt_of_what_is_gone_or_was_never_bound_is_refused_and_leaves_no_socket(
    boss: Boss, kernel: FakeKernel
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, kernel)
        for gone in (None, {**binding, "index": 9}, {**binding, "diskseq": 8}, {**binding, "pid": 12}):
            one, two = socket.socketpair()
            with pytest.raises(NotAttached):
                boss.order("adopt", [one.fileno()], definition=wire(server), binding=gone)
            one.close()
            assert two.recv(1) == b"", "the worker closed its copy too"
            two.close()
    assert kernel.open_clients == 0


def test_a_reply_has_the_number_of_its_order_whatever_stands_in_the_notes(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, kernel) | {"id": 4711}
        assert boss.order("adopt", definition=wire(server), binding=binding)["index"] == 0


def test_adopt_passes_over_descriptors_that_are_no_sockets(boss: Boss, kernel: FakeKernel, tmp_path: Path) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, kernel)
        one, two = socket.socketpair()
        with (tmp_path / "file").open("w") as file:
            order = {"definition": wire(server), "binding": binding}
            assert boss.order("adopt", [file.fileno(), one.fileno()], **order)["live"] == 1
        one.close()
        two.close()


def test_a_device_all_of_whose_links_were_dead_is_mended_by_the_successor(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, kernel, live=0)
        assert boss.order("adopt", definition=wire(server), binding=binding)["live"] == 0
        assert boss.event_with(live=1)["reconnects"] == 1
    assert ("replace", 1) in kernel.asked


def test_a_device_whose_links_nobody_kept_is_watched_by_the_kernels_reports_and_mended(
    boss: Boss, kernel: FakeKernel
) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, kernel)
        assert boss.order("adopt", definition=wire(server), binding=binding)["live"] == 1
        boss.order("ping")
        # What died unseen is replaced by a link offered at once; the kernel drops it where nothing had died.
        kernel.wait_for("replace")
        kernel.report(5)  # somebody else's
        kernel.report(0)
        assert boss.event_with(live=0)["error"] == "ConnectFailed"
        assert boss.event_with(live=1)["reconnects"] == 1
        assert kernel.reports == [], "links that are ours again are watched by themselves"


def test_a_link_that_died_while_nobody_watched_is_mended(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, kernel)
        one, two = socket.socketpair()
        two.close()
        boss.order("adopt", [one.fileno()], definition=wire(server), binding=binding)
        one.close()
        assert boss.event_with(live=0)["error"] == "ConnectFailed"
        assert boss.event_with(live=1)["reconnects"] == 1


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
        message = boss.event_with(error="NegotiationFailed")
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
        counted = kernel.bound[NAME].counted
        counted["read-requests"] += 3
        counted["write-sectors"] += 2
        counted["in-flight"] = 9
        told = boss.order("statistics")["statistics"]
        assert (told["reads"], told["writes"], told["written-bytes"], told["in-flight"]) == (3, 0, 1024, 9)
        counted.clear()
        with pytest.raises(NotAttached):
            boss.order("statistics")


# Detach


def test_detach_frees_the_device_and_closes_the_links(boss: Boss, kernel: FakeKernel) -> None:
    hung_up = threading.Event()

    def serve(conn: socket.socket) -> None:
        offers({b"": MIB})(conn)
        hung_up.set()

    with Server(serve) as server:
        _, fds = boss.order_fds("attach", definition=wire(server), resume=False)
        boss.order("detach", binding=None, force=False)
        assert not hung_up.is_set()
        for fd in fds:
            os.close(fd)
        assert hung_up.wait(SECONDS)
    assert kernel.bound == {}
    assert kernel.open_clients == 0
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


def test_a_worker_that_is_called_in_detaches_by_the_notes_or_the_name(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        for told in (True, False):
            binding = notes(server, kernel)
            boss.order("detach", definition=wire(server), binding=binding if told else None, force=False)
            assert kernel.bound == {}
    assert kernel.open_clients == 0


def test_a_worker_that_is_called_in_for_a_busy_device_looks_after_it(boss: Boss, kernel: FakeKernel) -> None:
    with Server(offers({b"": MIB})) as server:
        binding = notes(server, kernel)
        kernel.refusals["disconnect"] = Busy("in use")
        for _ in range(3):
            with pytest.raises(Busy):
                boss.order("detach", definition=wire(server), binding=binding, force=False)
        assert kernel.open_clients == 1
        assert boss.order("statistics")["statistics"]["in-flight"] == 1


@pytest.mark.parametrize("binding", [None, {"index": 9, "diskseq": 7}])
def test_detach_of_what_is_gone_is_done(boss: Boss, kernel: FakeKernel, binding: Message | None) -> None:
    with Server(offers({b"": MIB})) as server:
        assert boss.order("detach", definition=wire(server), binding=binding, force=False) == {}
    assert kernel.open_clients == 0


def test_detach_of_another_disk_of_the_same_name_touches_nothing(boss: Boss, kernel: FakeKernel) -> None:
    kernel.bound[NAME] = FakeNode(0, MIB, 512, read_only=False)
    with Server(offers({b"": MIB})) as server:
        boss.order("detach", definition=wire(server), binding={"index": 0, "diskseq": 6}, force=True)
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
