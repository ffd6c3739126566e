# SPDX-License-Identifier: MIT
"""Connections and the kernel's own idea of them, where the two differ: how many live is told rightly in the end.

The fake kernel here keeps its slots as drivers/block/nbd.c does: one is free for a new link only once the kernel itself
has seen the old one die, which it reports, and what finds no free slot is dropped without a word.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from nbdd.config.definition import Definition
from nbdd.errors import Busy
from nbdd.ipc.channel import Message
from nbdd.server.connect import Deadline
from nbdd.server.connections import open_connections
from nbdd.worker import replacement
from nbdd.worker.binding import Binding
from nbdd.worker.request import Request
from tests.fakes.kernel import SECONDS, FakeKernel
from tests.fakes.servers import MIB, Server, offers
from tests.unit.worker.test_worker import MULTI, NAME, SILENT, Boss, Nursery, cut, hiring, in_turn, until, wire


class SlotKernel(FakeKernel):
    """`lag` is how many seconds after a link's death it sees that."""

    def reset(self) -> None:
        super().reset()
        self.lag = 0.0
        self.dead: set[socket.socket] = set()
        self._over = False

    def clean(self) -> None:
        self._over = True
        super().clean()

    def living(self) -> int:
        """How many slots have a link that lives, as far as it has seen."""
        return len([sock for sock in self.links[NAME] if sock not in self.dead])

    def _bind(self, question: Message, sockets: list[socket.socket]) -> Any:
        node = super()._bind(question, sockets)
        for sock in sockets:
            self._receive(sock)
        return node

    def _replace(self, question: Message, sockets: list[socket.socket]) -> Any:
        links = self.links[question["name"]]
        for number, link in enumerate(links):
            if sockets and link in self.dead:
                link.close()
                links[number] = sockets.pop(0)
                self._receive(links[number])
        for sock in sockets:
            sock.close()

    def _receive(self, sock: socket.socket) -> None:
        """recv_work: until the link ends."""

        def work() -> None:
            poll = select.poll()
            with suppress(ValueError, OSError):
                poll.register(sock, select.POLLRDHUP)
                while not self._over and not poll.poll(50):
                    pass
            time.sleep(self.lag)
            self.dead.add(sock)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            if not self._over:
                self.report(0)

        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()


@pytest.fixture
def kernel() -> Iterator[SlotKernel]:
    kernel = SlotKernel()
    kernel.settings.update(QUIET_SECONDS=0.01, RESEND_SECONDS=0.01, LATE_SECONDS=0.3)
    yield kernel
    kernel.close()


@pytest.fixture
def hire(kernel: SlotKernel) -> Iterator[Callable[[], Boss]]:
    nursery = Nursery(kernel)
    with hiring(kernel, nursery) as make:
        yield make
    nursery.close()


def settled(boss: Boss, kernel: SlotKernel, live: int) -> Message:
    """Wait until so many links are told and there, and nothing more is being done; returns what was told last."""
    told: Message = {"live": None}
    end = time.monotonic() + SECONDS
    while told["live"] != live or kernel.living() != live or boss.errands():
        assert time.monotonic() < end, (told, kernel.living())
        boss.sock.settimeout(0.2)
        with suppress(TimeoutError):
            message, _ = boss.event()
            told = message if message["event"] == "links" else told
    boss.sock.settimeout(SECONDS)
    return told


def known(notes: Message, told: Message) -> Message:
    """The manager's notes, with what the worker told last."""
    return {**notes, **{key: told[key] for key in ("live", "reconnects", "uri", "lost", "size", "export")}}


@pytest.mark.parametrize("lag", [0.0, 0.05, 0.2])
def test_a_death_that_the_kernel_sees_later_than_the_worker_costs_one_more_attempt(
    hire: Callable[[], Boss], kernel: SlotKernel, lag: float
) -> None:
    boss = hire()
    kernel.lag = lag
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server), resume=False)
        cut(server)
        settled(boss, kernel, 1)
        cut(server)
        assert boss.event_with(live=0), "the one that the kernel has is the one that is watched"
        settled(boss, kernel, 1)


@pytest.mark.parametrize("slow", [0.0, 1.6])
def test_a_refuser_that_a_successor_gave_is_no_link_that_dies(
    hire: Callable[[], Boss], kernel: SlotKernel, slow: float
) -> None:
    good, away = offers({b"": MIB}), threading.Event()

    def serve(conn: socket.socket) -> None:
        if away.is_set():
            conn.close()
            return
        time.sleep(slow)
        good(conn)

    first = hire()
    with Server(serve) as server:
        definition = wire(server, dead_timeout=2)
        notes = first.order("attach", definition=definition, resume=False)
        away.set()
        cut(server)
        assert first.event_with(failing=True)
        first.dismiss()
        boss = hire()
        boss.order("adopt", definition=definition, binding={**notes, "live": 0, "lost": time.monotonic() - 100})
        assert boss.event_with(failing=True)
        away.clear()
        assert settled(boss, kernel, 1)["lost"] == 0


def test_a_refuser_that_the_kernel_drops_shows_that_it_has_its_links(
    hire: Callable[[], Boss], kernel: SlotKernel
) -> None:
    boss = hire()
    # A server for one client at a time, as qemu-nbd is by default: the successor gets no link to offer.
    with Server(in_turn(offers({b"": MIB}), offers({b"": MIB}), SILENT)) as server:
        definition = wire(server, dead_timeout=2)
        notes = boss.order("attach", definition=definition, resume=False)
        held = kernel.after["replace"] = threading.Event()
        cut(server)
        told = boss.event_with(live=0)
        kernel.wait_for("replace")
        os.kill(boss.pid, signal.SIGKILL)
        boss.ended()
        held.set()
        del kernel.after["replace"]
        successor = hire()
        successor.order("adopt", definition=definition, binding=known(notes, told))
        told = successor.event_with(live=1)
        assert (told["lost"], told["failing"], kernel.living()) == (0, False, 1)


def test_a_link_of_an_offer_that_is_given_up_is_not_counted_as_another(
    hire: Callable[[], Boss], kernel: SlotKernel
) -> None:
    first = hire()
    with Server(offers({b"": MIB}, MULTI)) as server:
        definition = wire(server, connections=2)
        notes = first.order("attach", definition=definition, resume=False)
        first.dismiss()
        boss = hire()
        boss.order("adopt", definition=definition, binding=notes)
        kernel.wait_for("replace")
        until(lambda: not boss.errands())
        held = kernel.after["replace"] = threading.Event()
        kernel.refusals["disconnect"] = Busy("in use")
        kernel.links[NAME][0].shutdown(socket.SHUT_RDWR)
        kernel.wait_for("replace", 2)
        number = boss.send("detach", binding=None, force=False)
        with pytest.raises(Busy):
            boss.reply(number)
        held.set()
        del kernel.after["replace"]
        settled(boss, kernel, 2)
        kernel.links[NAME][1].shutdown(socket.SHUT_RDWR)
        assert boss.event_with(live=1), "it is watched"
        settled(boss, kernel, 2)


def test_a_worker_that_is_killed_while_a_size_is_set_leaves_links_that_are_known(
    hire: Callable[[], Boss], kernel: SlotKernel
) -> None:
    boss = hire()
    with Server(in_turn(offers({b"": MIB}), offers({b"": 2 * MIB}), SILENT)) as server:
        definition = wire(server, dead_timeout=2)
        notes = boss.order("attach", definition=definition, resume=False)
        held = kernel.after["size"] = threading.Event()
        boss.send("resize")
        kernel.wait_for("size")
        assert boss.event_with(live=0)
        told, links = boss.event()
        assert (told["live"], told["lost"], links) == (1, 0, 1), "the manager has them before the size is set"
        os.kill(boss.pid, signal.SIGKILL)
        boss.ended()
        held.set()
        assert known(notes, told)["export"]["size"] == 2 * MIB


def test_a_short_dead_timeout_is_none_for_what_waits_for_an_exchange(
    hire: Callable[[], Boss], kernel: SlotKernel
) -> None:
    boss = hire()
    with Server(offers({b"": MIB})) as server:
        boss.order("attach", definition=wire(server, dead_timeout=0), resume=False)
        boss.order("reconnect")
    asked = [asked for asked in kernel.asked if asked[0] not in ("bind", "adopt")]
    assert asked == [("dead_timeout", replacement.EXCHANGE_PATIENCE), ("replace", 1), ("dead_timeout", 0)]


def test_a_server_that_was_refused_is_not_taken_because_the_next_one_can_not_be_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Server(offers({b"": MIB})) as other, Server(offers({b"": MIB})) as unseen:

        def look(_node: object, links: Any, _size: int) -> None:
            if str(links.uri) == str(other.uri()):
                raise replacement._changed(links, "the UUID of its filesystem was one and is two")
            raise replacement._CannotCompare(links.uri, "It is slow.")

        monkeypatch.setattr(replacement, "_look_same", look)
        definition = Definition(NAME, (other.uri(), unseen.uri()))
        with open_connections(definition, Deadline(SECONDS)) as links:
            binding = Binding(0, "", links.export, connections=1, live=0)
        warnings: list[Message] = []
        request = Request({}, NAME, definition.to_wire(), binding, ())
        with replacement._open_same(request, definition, report=lambda message, _: warnings.append(message)) as links:
            assert str(links.uri) == str(unseen.uri())
        assert [warning["event"] for warning in warnings] == ["warning"]
