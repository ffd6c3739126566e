# SPDX-License-Identifier: MIT
"""The worker process of one device: orders in, replies and events out.

It is a plain loop that never blocks: a child does whatever takes long, or much memory, one order at a time. Whatever
happens to the worker, the kernel keeps the device; it ends when the manager's end of the channel closes. If a child
ends without an answer, the worker ends too, since what the kernel was asked by then is unknown: the next worker looks.
It imports the standard library and the light half of nbdd only, as it is forked for every device.
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

from nbdd.config.definition import Definition
from nbdd.errors import NbddError, NotAttached
from nbdd.ipc.channel import Channel, Message
from nbdd.ipc.poller import Poller
from nbdd.ipc.processes import set_title
from nbdd.kernel.sysfs import SECTOR, Node
from nbdd.worker.attached import AttachedDevice
from nbdd.worker.binding import Binding
from nbdd.worker.child import ChildTask, Job
from nbdd.worker.orders import ORDERS, Order, close_all


def main(channel: Channel, name: str) -> int:
    """Serve one device until the manager closes the channel; returns the exit code. Called in a fresh fork."""
    set_title(f"nbdd:{name}")
    try:
        return Worker(channel, name).run()
    except BrokenPipeError:
        return 0  # The manager went away while something was sent to it.
    except Exception:  # noqa: BLE001 - the last word of a process: say what happened, end, be replaced
        traceback.print_exc(file=sys.stderr)
        return 1


class Worker:
    """Orders in, replies and events out; one device at most."""

    def __init__(self, channel: Channel, name: str) -> None:
        self.name = name
        self.device: AttachedDevice | None = None
        self._channel = channel
        self._poller = Poller()
        self._poller.register(channel.fileno(), select.POLLIN, self._readable)
        # Orders for children, which are carried out one after the other, and whether one is being carried out.
        self._orders: deque[Order] = deque()
        self._busy = False

    def run(self) -> int:
        """Work until the manager's end of the channel closes, or the device is gone; returns the exit code."""
        while self._poller.exit_code is None:
            self.run_once()
        return self._poller.exit_code

    def run_once(self) -> None:
        """Wait for an event of any kind, and handle it."""
        due = self.device.due if self.device is not None else None
        self._poller.run_once(None if due is None else due - time.monotonic())
        if self.device is not None and self._poller.exit_code is None:
            self.device.tick()

    @property
    def idle(self) -> bool:
        """Whether nothing is watched but the channel: no child, no device."""
        return len(self._poller) == 1

    def _readable(self, _events: int) -> None:
        if not self._channel.receive():
            self._poller.stop(0)
            return
        while (found := self._channel.pop()) is not None:
            self._obey(*found)

    def _obey(self, message: Message, fds: list[int]) -> None:
        if message["order"] in ORDERS:
            kind, operation = ORDERS[message["order"]]
            self._orders.append(kind(self, operation, message, _sockets(fds)))
            self._begin_next()
            return
        # These are answered at once, whatever is under way.
        close_all(fds)
        try:
            match message["order"]:
                case "ping":
                    answer: Message = {}
                case "statistics":
                    answer = {"statistics": self._statistics()}
                case "shorten-dead-timeout":
                    answer = {"dead-timeout": self._attached().shorten_dead_timeout(message["seconds"])}
                case unknown:
                    raise NbddError(f"The worker of {self.name!r} knows no order {unknown!r}.")
        except NbddError as error:
            answer = error.to_wire()
        self.reply(message, answer)

    # Orders for children: see orders.py

    def _begin_next(self) -> None:
        """Begin the next order, if none is being carried out."""
        while self._orders and not self._busy:
            order = self._orders.popleft()
            try:
                order.begin()
                self._busy = True
            except NbddError as error:
                close_all(order.sockets)
                self.reply(order.message, error.to_wire())

    def start_child(self, job: Job, order: Order) -> None:
        """Carry out the job in a child, and finish the order with its answer; raises WorkerFailed."""
        ChildTask(self._poller, self.name, job, on_progress=self._channel.send, done=partial(self.answered, order))

    def answered(self, order: Order, answer: Message | None, fds: list[int]) -> None:
        """Finish the order with this answer. If there is none, end."""
        self._busy = False
        if answer is None:
            lost = f"the process that was to {order.message['order']!r} ended without an answer"
            sys.stderr.write(f"{self.name}: {lost}\n")
            self._poller.stop(1)
            return
        order.finish(answer, fds)
        self._begin_next()

    def reply(self, message: Message, answer: Message, fds: Sequence[int] = ()) -> None:
        """Send the answer to an order."""
        self._channel.send({**answer, "id": message["id"]}, fds)

    def take_over(self, definition: Definition, answer: Message, sockets: list[int]) -> Message:
        """Look after the device from now on; returns its binding as it was answered, or the error."""
        if "error" not in answer:
            try:
                self.device = AttachedDevice(
                    self._poller,
                    self.name,
                    definition=definition,
                    binding=Binding.from_wire(answer),
                    sockets=sockets,
                    report=self._channel.send,
                )
                return answer
            except NbddError as error:
                answer = error.to_wire()
        close_all(sockets)
        return answer

    def put_first(self, order: Order) -> None:
        """Carry out this order before those that wait."""
        self._orders.appendleft(order)

    # What is answered at once

    def _attached(self) -> AttachedDevice:
        if self.device is None:
            raise NotAttached(f"{self.name!r} is not attached.")
        return self.device

    def _statistics(self) -> dict[str, int]:
        """What the kernel counted since the device was attached; the keys are those of GetStatistics."""
        binding = self._attached().binding
        counted = Node(binding.index).statistics()
        if not counted:
            raise NotAttached(f"{self.name!r} is not attached.")
        # The kernel counts from when it made the node, and it may have been other disks before.
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
    close_all([fd for fd in fds if fd not in kept])
    return kept
