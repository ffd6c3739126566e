# SPDX-License-Identifier: MIT
"""What the children of a worker do to give a bound device new connections: mend, reconnect, resize, serve errors.

The order of events is the same in each. Connections are opened and checked to lead to the same data; the device is
adopted, to be sure that it is still ours; the worker gets duplicates ("offered"); and then the kernel gets them. An
exchange goes on in between: the worker shuts the old connections down, and the kernel must have seen each of them die.
"""

from __future__ import annotations

import socket
import time
from dataclasses import replace

from nbdd.config.definition import Definition
from nbdd.errors import (
    Busy,
    ConnectFailed,
    ExportChanged,
    KernelError,
    NbddError,
    NegotiationFailed,
    ServerError,
)
from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.sysfs import Node
from nbdd.kernel.usage import Usage
from nbdd.server import fingerprint
from nbdd.server.connect import Deadline
from nbdd.server.connections import Connections, export_difference, open_connections
from nbdd.server.fingerprint import Fingerprint
from nbdd.uri import URI
from nbdd.worker import error_server
from nbdd.worker.child import Answer, Report
from nbdd.worker.request import Request, adopt_device

MEND_SECONDS = 5.0
"""For connecting and negotiating again. A server that comes back is found by a fresh attempt, not by waiting."""

LOOK_SECONDS = 15.0
"""For a look at what is on the export. If the server is slower than that, it is used without the look."""

QUIET_SECONDS = 1.0
"""How long to wait for a moment without requests under way, before connections are exchanged."""

EXCHANGE_PATIENCE = 30
"""Seconds of dead timeout, at least, while connections are exchanged, as we interrupt I/O ourselves."""

QUIET_INTERVAL = 0.002
"""Seconds between two looks for it."""

LATE_SECONDS = 1.0
"""For the kernel to say so, if it saw a connection die later than we did: it waited for a processor, which in a virtual
machine may be away for long. I/O goes on meanwhile; only the report that all is well comes later."""

RESEND_SECONDS = 3.0
"""How long to wait for a moment without requests under way, before a size is set: what was lost with the only
connection of a device is sent again by then."""

DEAD_SECONDS = 3.0
"""For the kernel to say that a connection that was shut down is dead; it only has to run."""


def mend(request: Request, report: Report) -> Answer:
    """Give the kernel `missing` new connections for dead ones, checked to lead to the same data; answers their server.

    `request.sockets` has the error server's end if the kernel was given one; it is removed first.
    """
    definition = request.wanted
    if request.bound.live:
        # What is written over connections to one server could be read late, or never, over those to another.
        definition = replace(definition, uri=(URI.parse(request.bound.uri),))
    connections = _open_same(request, definition, request.order["missing"], report=report)
    device = _adopt_for(request, connections)
    _offer(report, connections)
    _hand_over(request, device, connections)
    # A timeout may have been set while no connection lived.
    device.pace()
    return {"uri": str(connections.uri)}, ()


def reconnect(request: Request, report: Report) -> Answer:
    """Exchange all connections for new ones to the first server of the definition that has the same data."""
    _exchange(request, report, _open_same(request, request.wanted, report=report))
    return {}, ()


def resize(request: Request, report: Report) -> Answer:
    """Take the size that the server says now, if it grew. All connections are exchanged: an old one keeps its size."""
    definition = request.wanted
    binding = request.bound
    if binding.live:
        definition = replace(definition, uri=(URI.parse(binding.uri),))
    connections = _open_same(request, definition, report=report, grown=True)
    size = connections.export.size - connections.export.size % binding.block_size
    if size == binding.size and not binding.missing:
        connections.close()
        return {"size": size}, ()
    device = _exchange(request, report, connections)
    # From Linux 6.9 on the kernel waits for all that is under way, with every other command for any NBD device behind
    # it. What was lost with one of several connections is sent again after half a minute only.
    if not _quiet(Node(binding.index), RESEND_SECONDS) and binding.connections > 1:
        raise Busy(
            f"{request.name!r} has several connections, and takes a size at a moment without I/O only: try again then."
        )
    device.set_size(size)
    return {"size": size}, ()


def serve_errors(request: Request, _report: Report) -> Answer:
    """Give the kernel the end in `request.sockets` of an error server. See error_server.py."""
    device, _ = adopt_device(replace(request, sockets=()), request.bound)
    device.replace_connections([socket.socket(fileno=fd) for fd in request.sockets])
    return {}, ()


# What a child opens is closed by its end; only servers want a disconnect message.


class _CannotCompare(Exception):
    """What is on an export can't be looked at. No ServerError: no reason to refuse it, nor to try another one."""

    def __init__(self, uri: URI, why: str) -> None:
        super().__init__(f"{why} What is on the export is not compared with what is on the device.")
        self.uri = uri


def _open_same(
    request: Request, definition: Definition, number: int | None = None, *, report: Report, grown: bool = False
) -> Connections:
    """New connections, as many as the device has or as are said, to the same export; it may have `grown`."""
    binding = request.bound
    known = binding.export

    def check(connections: Connections) -> None:
        found = connections.export
        if grown and found.size < known.size:
            raise ExportChanged(
                f"{connections.uri} has {found.size} bytes now, less than the {known.size} of the device. A device "
                "that is attached can't shrink: detach it, and attach it again."
            )
        if difference := export_difference(known, replace(found, size=known.size) if grown else found):
            raise _changed(connections, difference)

    def look(connections: Connections) -> None:
        check(connections)
        # What stood at the end of a device before it grew is at its old end.
        _look_same(Node(binding.index), connections, known.size)

    count = number or binding.connections
    try:
        return open_connections(definition, Deadline(MEND_SECONDS), count, check=look)
    except _CannotCompare as error:
        report({"event": "warning", "message": str(error)}, ())
        # That server alone: one before it in the list may have been looked at, and refused.
        return open_connections(replace(definition, uri=(error.uri,)), Deadline(MEND_SECONDS), count, check=check)


def _adopt_for(request: Request, connections: Connections) -> KernelDevice:
    """The device, for connections that are about to be its own; closes them if that fails."""
    try:
        return adopt_device(replace(request, sockets=()), request.bound)[0]
    except NbddError:
        connections.close()
        raise


def _offer(report: Report, connections: Connections) -> None:
    """Pass duplicates to the worker before the kernel is asked: it then has what the kernel took, even if we die."""
    report(
        {"event": "offered", "export": connections.export.to_wire()}, [sock.fileno() for sock in connections.sockets]
    )


def _hand_over(request: Request, device: KernelDevice, connections: Connections) -> None:
    """Have the kernel take the connections in place of dead ones, and of the error server.

    Raises KernelError if it may have dropped one: it replaces those that it has seen die by then, and drops the rest
    without an error. If it reports another death now, that slot was still taken.
    """
    index = request.bound.index
    with device.watch_connections() as reports:
        for fd in request.sockets:
            error_server.remove(fd)
        device.replace_connections(connections.sockets)
        late, end = -len(request.sockets), time.monotonic() + LATE_SECONDS
        while (left := end - time.monotonic()) > 0:
            late += reports.wait(left).count(index)
    if late > 0:
        raise KernelError("A connection died while the kernel was given new ones. It is given others.")


def _exchange(request: Request, report: Report, connections: Connections) -> KernelDevice:
    """Give the kernel these connections in place of all that it has, at a quiet moment if there is one."""
    device = _adopt_for(request, connections)
    index, live = request.bound.index, request.bound.live
    patience = request.wanted.dead_timeout
    if patience < EXCHANGE_PATIENCE:
        device.set_dead_timeout(EXCHANGE_PATIENCE)
    with device.watch_connections() as reports:
        _quiet(Node(index), QUIET_SECONDS)
        _offer(report, connections)  # The worker now shuts the old ones down.
        # Only what the kernel counts as dead is replaced.
        deadline = Deadline(DEAD_SECONDS)
        while live > 0:
            live -= reports.wait(deadline.remaining("The kernel did not let go of the old connections")).count(index)
    _hand_over(request, device, connections)
    report({"event": "taken", "uri": str(connections.uri)}, ())
    if patience < EXCHANGE_PATIENCE:
        device.set_dead_timeout(patience)
    return device


def _quiet(node: Node, seconds: float) -> bool:
    """Wait for a moment without requests under way; returns whether there was one. Others are sent again, late."""
    end = time.monotonic() + seconds
    while node.statistics().get("in-flight"):
        if time.monotonic() >= end:
            return False
        time.sleep(QUIET_INTERVAL)
    return True


def _look_same(node: Node, connections: Connections, size: int) -> None:
    """Refuse an export that has another filesystem on it, or another partition table, than the device of that size."""
    known = fingerprint.of_device(node, Usage())
    if known == Fingerprint():
        return
    try:
        found = fingerprint.of_export(connections.sockets[0], size, connections.block_size, Deadline(LOOK_SECONDS))
    except (ConnectFailed, NegotiationFailed):
        # It went away, or does not speak NBD: nothing for the kernel.
        raise
    except ServerError as error:
        # It is too slow, or can't read there. I/O that can go on does not wait for that.
        raise _CannotCompare(connections.uri, str(error)) from None
    if difference := known.difference(found):
        raise _changed(connections, difference)


def _changed(connections: Connections, difference: str) -> ExportChanged:
    return ExportChanged(
        f"{connections.uri} came back as something else, and is not used: {difference}. I/O waits; detach the device "
        "if this is what you want."
    )
