# SPDX-License-Identifier: MIT
"""The orders of the manager that a child carries out: one class for each, how it begins and how it ends."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from nbdd.config.definition import Definition
from nbdd.errors import NbddError, NotAttached
from nbdd.ipc.channel import Message
from nbdd.worker import operations, replacement
from nbdd.worker.attached import AttachedDevice
from nbdd.worker.binding import Binding
from nbdd.worker.child import Job
from nbdd.worker.request import Operation, Request


class Host(Protocol):
    """What an order needs of the worker."""

    name: str
    device: AttachedDevice | None

    def start_child(self, job: Job, order: Order) -> None:
        """Carry out the job in a child, and finish the order with its answer; raises WorkerFailed."""

    def answered(self, order: Order, answer: Message | None, fds: list[int]) -> None:
        """Finish the order with this answer."""

    def reply(self, message: Message, answer: Message, fds: Sequence[int] = ()) -> None:
        """Send the answer to an order."""

    def take_over(self, definition: Definition, answer: Message, sockets: list[int]) -> Message:
        """Look after the device from now on; returns its binding as it was answered, or the error."""

    def put_first(self, order: Order) -> None:
        """Carry out this order before those that wait."""


class Order:
    """An order that needs nothing of the worker but a child. `sockets` are the descriptors that came with it."""

    def __init__(self, host: Host, operation: Operation, message: Message, sockets: list[int]) -> None:
        self.message = message
        self.sockets = sockets
        self._host = host
        self._operation = operation

    def begin(self) -> None:
        """Start the child; raises NbddError, upon which the order is over."""
        self._host.start_child(partial(self._operation, self._request()), self)

    def finish(self, answer: Message, fds: list[int]) -> None:
        """Do what follows from the answer, which may be an error, and reply; `fds` came with it."""
        close_all(self.sockets + fds)
        self._host.reply(self.message, answer)

    def _request(self) -> Request:
        device = self._host.device
        if device is not None:
            # We have our own binding and connections, and a child gets none that we still watch.
            close_all(self.sockets)
            return Request(self.message, self._host.name, device.definition, device.binding, ())
        found = self.message.get("binding")
        binding = None if found is None else Binding.from_wire(found)
        definition = self._definition() if "definition" in self.message else None
        return Request(self.message, self._host.name, definition, binding, self.sockets)

    def _definition(self) -> Definition:
        return Definition.from_wire(self.message["definition"])


class TakeOver(Order):
    """Attach and adopt: the device is the worker's from then on."""

    def finish(self, answer: Message, fds: list[int]) -> None:
        """Look after the device; the reply has duplicates of its connections."""
        answer = self._host.take_over(self._definition(), answer, self.sockets + fds)
        device = self._host.device
        self._host.reply(self.message, answer, device.sockets if device is not None else ())


class SetTimeout(Order):
    """Set the request timeout of the device."""

    def begin(self) -> None:
        """Raises NotAttached."""
        if self._host.device is None:
            raise _not_attached(self._host)
        super().begin()

    def finish(self, answer: Message, fds: list[int]) -> None:
        """Later children begin with the new timeout."""
        device = self._host.device
        if device is not None and "error" not in answer:
            device.definition = device.definition.with_timeout(self.message["seconds"])
        super().finish(answer, fds)


class Detach(Order):
    """End the device. A worker without one adopts it first: if the detach is refused, it has to be mended on."""

    def begin(self) -> None:
        """The device is left alone meanwhile: its connections end on purpose."""
        device = self._host.device
        if device is None:
            request = self._request()
            operation = self._operation if request.binding is None else operations.adopt
            self._host.start_child(partial(operation, request), self)
            return
        request = self._request()
        request = Request(request.order, request.name, request.definition, request.binding, device.sockets)
        device.pause()
        try:
            self._host.start_child(partial(self._operation, request), self)
        except NbddError:
            device.resume()
            raise

    def finish(self, answer: Message, fds: list[int]) -> None:
        """The device is gone, or looked after again."""
        device = self._host.device
        if device is None and self.message.get("binding") is not None:
            self._adopted(answer, fds)
            return
        if device is not None and "error" in answer:
            device.resume()
        elif device is not None:
            device.close()
            self._host.device = None
        super().finish(answer, fds)

    def _adopted(self, answer: Message, fds: list[int]) -> None:
        answer = self._host.take_over(self._definition(), answer, self.sockets + fds)
        if self._host.device is not None:
            self._host.put_first(Detach(self._host, self._operation, self.message, []))
            return
        gone = answer["error"] == NotAttached.__name__
        self._host.reply(self.message, {} if gone else answer)


class Exchange(Order):
    """Exchange the connections of the device: reconnect and resize."""

    def begin(self) -> None:
        """Raises NotAttached, Busy."""
        close_all(self.sockets)
        device = self._host.device
        if device is None:
            raise _not_attached(self._host)
        device.replace_connections(self._operation, self.message, lambda answer: self._host.answered(self, answer, []))


ORDERS: Mapping[str, tuple[type[Order], Operation]] = {
    "look": (Order, operations.look),
    "attach": (TakeOver, operations.attach),
    "adopt": (TakeOver, operations.adopt),
    "set-timeout": (SetTimeout, operations.set_timeout),
    "detach": (Detach, operations.detach),
    "list-exports": (Order, operations.report_exports),
    "reconnect": (Exchange, replacement.reconnect),
    "resize": (Exchange, replacement.resize),
}
"""By their names on the channel: what begins and finishes them in the worker, and what the child does."""


def close_all(fds: list[int]) -> None:
    """Close them all, and empty the list."""
    while fds:
        os.close(fds.pop())


def _not_attached(host: Host) -> NotAttached:
    return NotAttached(f"{host.name!r} is not attached.")
