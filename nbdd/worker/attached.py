# SPDX-License-Identifier: MIT
"""An attached device as its worker knows it: what it is, its connections, and what is reported of them."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from nbdd.config.definition import Definition
from nbdd.errors import Busy, ConnectFailed
from nbdd.ipc.channel import Message
from nbdd.ipc.poller import Poller
from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.sockets import dead
from nbdd.protocol import Export
from nbdd.server.connections import disconnect_reason
from nbdd.worker.binding import Binding
from nbdd.worker.child import Report
from nbdd.worker.mender import Mender
from nbdd.worker.request import Operation


class AttachedDevice:
    """The device, from the kernel's binding to the detach.

    The kernel has the connections. `sockets` are our duplicates, to see them end and to shut them down. What is done
    when one dies is in mender.py.
    """

    def __init__(
        self, poller: Poller, name: str, *, definition: Definition, binding: Binding, sockets: list[int], report: Report
    ) -> None:
        """Watch the connections, and mend what is dead. `report` gets what the manager must know."""
        self.name = name
        self.definition = definition
        self.binding = binding
        """The manager keeps a copy for the worker's successor."""
        self.sockets = sockets
        self._poller = poller
        self._send_report = report
        # If connections died unseen, or were not kept, our predecessor may have given the kernel others, and died
        # before it could report them. Then the kernel's own reports of deaths count.
        self._kernel_reports: LinkDeadMonitor | None = None
        self._died_unseen: set[int] = set()
        self._expected_deaths = 0
        if len(sockets) < binding.connections or any(map(dead, sockets)):
            with KernelDevice(name) as device:
                self._kernel_reports = device.watch_connections()
            self._died_unseen.update(filter(dead, sockets))
        self._mender = Mender(poller, self, report)
        self.resume()

    @property
    def due(self) -> float | None:
        """When to call `tick` again, monotonic; None while there is nothing to wait for."""
        return self._mender.due

    def tick(self) -> None:
        """Do what is due by now."""
        self._mender.tick()

    def pause(self) -> None:
        """Stop watching and mending the connections: a detach is about to end them."""
        for fd in self.sockets:
            self._poller.unregister(fd)
        if self._kernel_reports is not None:
            self._poller.unregister(self._kernel_reports.fileno())
        self._mender.pause()

    def resume(self) -> None:
        """Watch and mend the connections again; one that died meanwhile is seen by the next poll."""
        for fd in self.sockets:
            self._watch(fd)
        if self._kernel_reports is not None:
            self._poller.register(self._kernel_reports.fileno(), select.POLLIN, self._kernel_reported)
        self._mender.resume()

    def close(self) -> None:
        """Close our duplicates, after `pause`; the device is gone."""
        for fd in self.sockets:
            os.close(fd)
        if self._kernel_reports is not None:
            self._kernel_reports.close()
        self._mender.close()

    def shorten_dead_timeout(self, seconds: int) -> int:
        """Let I/O wait for `seconds` at most from now on, or from the death of the last connection.

        Returns the dead timeout. The kernel keeps its own: our error server ends the waiting before.
        """
        lost = self.binding.lost
        waited = int(time.monotonic() - lost) if lost else 0
        dead_timeout = min(self.definition.dead_timeout, waited + seconds)
        self.definition = replace(self.definition, dead_timeout=dead_timeout)
        self._mender.check_dead_timeout()
        return dead_timeout

    def replace_connections(self, operation: Operation, order: Message, done: Callable[[Message], None]) -> None:
        """Exchange all connections for new ones, by this operation for this order; `done` gets the answer.

        The old ones are shut down when the new ones are open, checked, and about to be given to the kernel. Raises
        Busy if we do not have all of the old ones to shut them down, and WorkerFailed.
        """
        if self.has_unknown_connections:
            raise Busy(
                f"Some connections of {self.name!r} are the kernel's alone, since nbdd was stopped or lost a process, "
                "and can't be exchanged: detach the device and attach it again when nobody uses it."
            )
        self._mender.exchange(operation, order, done)

    # For the mender

    @property
    def has_unknown_connections(self) -> bool:
        """Whether the kernel has, or may have, connections of which we have no duplicate."""
        return self._kernel_reports is not None

    def report(self, error: Message) -> None:
        """Report the connections to the manager, with an error or with {}."""
        state = self.binding.connection_state(failing=self._mender.failing)
        self._send_report({"event": "connections", **state.to_wire(), **error}, self.sockets)

    def add_connections(self, sockets: list[int], number: int, uri: str) -> None:
        """Count `number` connections more to that server; `sockets` are those of them that are ours to watch."""
        for fd in sockets:
            self._watch(fd)
        self.sockets += sockets
        live, reconnects = self.binding.live + number, self.binding.reconnects + number
        self._change(live=live, reconnects=reconnects, uri=uri, lost=0)
        if self._kernel_reports is not None and len(self.sockets) >= self.binding.connections:
            self._poller.unregister(self._kernel_reports.fileno())
            self._kernel_reports.close()
            self._kernel_reports = None

    def shut_down_connections(self, export: Export) -> None:
        """End all connections, which are about to be exchanged for others to `export`.

        They are reported as dead before: a successor of ours must not count on them.
        """
        self._change(export=export, live=0, lost=self.binding.lost or time.monotonic())
        old = self.sockets.copy()
        self.sockets.clear()
        self.report({})
        for fd in old:
            self._poller.unregister(fd)
            with socket.socket(fileno=fd) as sock, suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def set_size(self, size: int) -> None:
        """The kernel has this size now, in bytes."""
        if size != self.binding.size:
            self._change(size=size)
            self.report({})

    def expect_deaths(self, number: int) -> None:
        """Take so many more reports of a death, or fewer, for one of an error server and not of a connection."""
        self._expected_deaths += number

    # What happens to the connections

    def _watch(self, fd: int) -> None:
        # No POLLIN: what arrives is the kernel driver's to read. Only the end of the connection is ours to see.
        self._poller.register(fd, select.POLLRDHUP, partial(self._connection_ended, fd))

    def _connection_ended(self, fd: int, _events: int) -> None:
        self._poller.unregister(fd)
        self.sockets.remove(fd)
        with socket.socket(fileno=fd) as sock:
            # What the kernel reports, too, is counted once.
            if self._kernel_reports is None or fd in self._died_unseen:
                self._count_dead(1, disconnect_reason(sock))
        self._died_unseen.discard(fd)

    def _kernel_reported(self, _events: int) -> None:
        """The kernel reports that connections died, of this device or of others."""
        died = self._kernel_reports.read().count(self.binding.index) if self._kernel_reports is not None else 0
        expected = min(died, self._expected_deaths)
        self._expected_deaths -= expected
        died -= expected
        if died:
            self._mender.kernel_reported_death()
            self._count_dead(died, "the kernel lost it, and nbdd had no duplicate to see why")

    def _count_dead(self, number: int, why: str) -> None:
        self._change(live=max(0, self.binding.live - number))
        if not self.binding.live:
            self._change(lost=self.binding.lost or time.monotonic())
        self.report(ConnectFailed(f"A connection to {self.binding.uri} ended: {why}.").to_wire())
        self._mender.connection_died()

    def _change(self, **changes: Any) -> None:
        self.binding = replace(self.binding, **changes)
