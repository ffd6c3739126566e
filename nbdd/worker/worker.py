# SPDX-License-Identifier: MIT
"""The child process of one device: orders in, replies and events out.

It is a plain loop that never blocks: whatever takes long, or much memory, is done by an errand, one order at a time.
Whatever happens to it, the kernel keeps the device; it ends when the manager's end of the channel closes. An errand
that ends without an answer takes it along, since nobody knows what the kernel was asked by then: the next worker looks.
Its whole world is the standard library and the light half of nbdd, forked 64 times and more.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from functools import partial

from nbdd.errors import NbddError, NotAttached
from nbdd.ipc.channel import Channel, Message
from nbdd.ipc.poller import Loop
from nbdd.kernel.sysfs import SECTOR, Node
from nbdd.worker.attached import Bound
from nbdd.worker.binding import Binding
from nbdd.worker.child import Errand, title
from nbdd.worker.operations import ORDERS, RENEWALS, Task


def main(channel: Channel, name: str) -> int:
    """Serve one device until the manager lets go; returns the exit code. Called in a fresh fork."""
    title(f"nbdd:{name}")
    try:
        Worker(channel, name).run()
    except BrokenPipeError:
        return 0  # The manager went away while it was told something.
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:  # noqa: BLE001 - the last word of a process: say what happened, end, be replaced
        traceback.print_exc(file=sys.stderr)
        return 1
    return 0


class Worker:
    """Orders in, replies and events out; one device at most."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        self._loop = Loop()
        self._loop.watch(channel.fileno(), select.POLLIN, self._ordered)
        self._device: Bound | None = None
        # Orders that errands carry out, in their order, with the descriptors that came with them.
        self._orders: deque[tuple[Message, list[int]]] = deque()
        self._busy = False
        self._dismissed = False

    def run(self) -> None:
        """Work until the manager's end of the channel closes."""
        while not self._dismissed:
            self.turn()

    def turn(self) -> None:
        """Wait for news of any kind, and deal with it."""
        due = self._device.due if self._device is not None else None
        self._loop.turn(None if due is None else due - time.monotonic())
        if self._device is not None:
            self._device.tick()

    @property
    def idle(self) -> bool:
        """Whether nothing is watched but the channel: no errand, no device."""
        return len(self._loop) == 1

    def _ordered(self, _events: int) -> None:
        if not self._channel.receive():
            self._dismissed = True
            return
        while (found := self._channel.pop()) is not None:
            self._obey(*found)

    def _obey(self, order: Message, fds: list[int]) -> None:
        if order["order"] in ORDERS or order["order"] in RENEWALS:
            self._orders.append((order, _sockets(fds)))
            self._next()
            return
        # These are answered at once, whatever is under way.
        _close(fds)
        try:
            match order["order"]:
                case "ping":
                    reply: Message = {}
                case "statistics":
                    reply = {"statistics": self._statistics()}
                case "hasten":
                    reply = {"dead-timeout": self._hasten(order["seconds"])}
                case unknown:
                    raise NbddError(f"The worker of {self._name!r} knows no order {unknown!r}.")
        except NbddError as error:
            reply = error.to_wire()
        self._reply(order, reply)

    def _reply(self, order: Message, reply: Message, fds: Sequence[int] = ()) -> None:
        self._channel.send({**reply, "id": order["id"]}, fds)

    # Errands

    def _next(self) -> None:
        """Send an errand on the next order, if none is under way."""
        while self._orders and not self._busy:
            order, links = self._orders.popleft()
            try:
                self._send(order, links)
            except NbddError as error:
                _close(links)
                self._reply(order, error.to_wire())

    def _send(self, order: Message, links: list[int]) -> None:
        kind, device = order["order"], self._device
        if kind in RENEWALS:
            _close(links)
            if device is None:
                raise NotAttached(f"{self._name!r} is not attached.")
            device.renew(order, partial(self._done, kind, order, [], fds=[]))
            self._busy = True
            return
        if device is not None:
            # We have our own binding and links, and an errand sees no link that we still watch.
            _close(links)
            task = Task(order, self._name, device.definition, device.binding, device.links if kind == "detach" else ())
        elif kind == "set-timeout":
            raise NotAttached(f"{self._name!r} is not attached.")
        else:
            found = order.get("binding")
            binding = None if found is None else Binding.from_wire(found)
            task = Task(order, self._name, order.get("definition") or {}, binding, links)
            if kind == "detach" and binding is not None:
                # Called in after the device's own worker died. It is adopted first: while the detach is refused, or
                # waits, its links still want mending.
                kind = "adopt"
        if kind == "detach" and device is not None:
            device.rest()
        job, done = partial(ORDERS[kind], task), partial(self._done, kind, order, links)
        try:
            Errand(self._loop, self._name, job, heard=self._heard, done=done)
        except NbddError:
            if kind == "detach" and device is not None:
                device.resume()
            raise
        self._busy = True

    def _heard(self, event: Message, fds: Sequence[int]) -> None:
        """What an errand tells on its way is for the manager."""
        self._channel.send(event, fds)

    def _done(self, kind: str, order: Message, links: list[int], answer: Message | None, fds: list[int]) -> None:
        """An order is carried out, or refused: `answer` is what there is to say."""
        self._busy = False
        if answer is None:
            sys.stderr.write(f"{self._name}: the process that was to {kind!r} ended without an answer\n")
            raise SystemExit(1)
        done = "error" not in answer
        told: Sequence[int] = ()
        if kind in ("attach", "adopt"):
            answer = self._take_over(order["definition"], answer, links + fds)
            told = self._device.links if self._device is not None else ()
        elif self._device is None:
            _close(links)
        elif kind == "detach" and done:
            self._device.close()
            self._device = None
        elif kind == "detach":
            self._device.resume()
        elif kind == "set-timeout" and done:
            self._device.definition["timeout"] = order["seconds"]
        if kind == "adopt" and order["order"] == "detach":
            if self._device is not None:
                self._orders.appendleft((order, []))
                self._next()
                return
            if answer["error"] == NotAttached.__name__:
                answer = {}
        self._reply(order, answer, told)
        self._next()

    def _take_over(self, definition: Message, answer: Message, links: list[int]) -> Message:
        """Look after the device from now on; returns its binding, or what went wrong."""
        if "error" not in answer:
            try:
                self._device = Bound(
                    self._loop,
                    self._name,
                    definition=definition,
                    binding=Binding.from_wire(answer),
                    links=links,
                    report=self._channel.send,
                )
                return answer
            except NbddError as error:
                answer = error.to_wire()
        _close(links)
        return answer

    def _hasten(self, seconds: int) -> int:
        if self._device is None:
            raise NotAttached(f"{self._name!r} is not attached.")
        return self._device.hasten(seconds)

    def _statistics(self) -> dict[str, int]:
        """What the kernel counted since the device was attached; the keys are those of GetStatistics."""
        binding = self._device.binding if self._device is not None else None
        counted = Node(binding.index).statistics() if binding is not None else {}
        if binding is None or not counted:
            raise NotAttached(f"{self._name!r} is not attached.")
        # The kernel counts from when it made the node, which may have been other disks before.
        before = binding.baseline or {}
        since = {key: value - before.get(key, 0) for key, value in counted.items()}
        return {
            "reads": since["read-requests"],
            "writes": since["write-requests"],
            "discards": since.get("discard-requests", 0),
            "flushes": since.get("flush-requests", 0),
            "read-bytes": since["read-sectors"] * SECTOR,
            "written-bytes": since["write-sectors"] * SECTOR,
            "discarded-bytes": since.get("discard-sectors", 0) * SECTOR,
            "in-flight": counted["in-flight"],
            "io-time": since["busy-milliseconds"],
            "read-time": since["read-milliseconds"],
            "write-time": since["write-milliseconds"],
        }


def _sockets(fds: Sequence[int]) -> list[int]:
    """Those that are sockets; the others are closed."""
    kept = [fd for fd in fds if stat.S_ISSOCK(os.fstat(fd).st_mode)]
    _close([fd for fd in fds if fd not in kept])
    return kept


def _close(fds: list[int]) -> None:
    """Close them all; none is left in the list."""
    while fds:
        os.close(fds.pop())
