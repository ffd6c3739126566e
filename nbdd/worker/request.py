# SPDX-License-Identifier: MIT
"""A request to a child: the order, what the device is, and the kernel's device that it is about."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdd.config.definition import Definition
from nbdd.errors import NotAttached, WorkerFailed
from nbdd.ipc.channel import Message
from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.sysfs import Node
from nbdd.worker.binding import Binding
from nbdd.worker.child import Answer, Report

IO_TIMEOUT = 1000
"""Milliseconds; for a device of one connection, without a request timeout of the user's.

What was under way when its connection died is sent again when the kernel looks at it next. By itself it does that after
30 s. With one connection and no request timeout it only looks, so it may look often: slow servers are left in peace.
With several connections, or a timeout, it would give up the connection of every request that takes so long
(drivers/block/nbd.c, nbd_xmit_timeout), so these keep the 30 s, or what the user said.
"""


@dataclass(frozen=True, slots=True)
class Request:
    """One order, and what the worker knows of the device when it starts the child."""

    order: Message
    name: str
    definition: Definition | None
    """What the device shall be; None if that does not matter for the order."""
    binding: Binding | None
    """What the device is; None if none is bound yet, as far as we know."""
    sockets: Sequence[int]
    """Descriptors of the device's connections, as far as we have them."""

    @property
    def wanted(self) -> Definition:
        """The definition; raises WorkerFailed if the order came without one."""
        if self.definition is None:
            raise WorkerFailed(f"The order for {self.name!r} has no definition.")
        return self.definition

    @property
    def bound(self) -> Binding:
        """The binding; raises NotAttached if there is none."""
        if self.binding is None:
            raise NotAttached(f"{self.name!r} was not bound to any device yet.")
        return self.binding


Operation = Callable[[Request, Report], Answer]
"""What a child does for a request; an NbddError that it raises is its answer."""


def io_timeout(connections: int) -> int | None:
    """The I/O timeout of a device of that many connections, in milliseconds; None is the kernel's own."""
    return IO_TIMEOUT if connections == 1 else None


def adopt_device(request: Request, binding: Binding, *, paced: bool = True) -> tuple[KernelDevice, Node]:
    """The device that was bound, if it is still the same; else raises NotAttached."""
    definition = request.wanted
    device = KernelDevice(
        request.name,
        timeout=definition.timeout,
        dead_timeout=definition.dead_timeout,
        io_timeout=io_timeout(binding.connections) if paced else None,
    )
    sockets = [socket.socket(fileno=fd) for fd in request.sockets]
    node = device.adopt(binding.index, diskseq=binding.diskseq or None, pid=binding.pid or None, sockets=sockets)
    return device, node
