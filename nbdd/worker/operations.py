# SPDX-License-Identifier: MIT
"""What the children of a worker do: attach, adopt, set the timeout, detach, and what needs no device.

Each is a function of a `Request`. It runs in a child, blocks as long as it must, within its deadlines, and returns its
answer or raises an NbddError. Before each change it is checked that the device is still the one that was bound. See
replacement.py for what gives a device new connections.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from nbdd.config.definition import Definition
from nbdd.errors import (
    Busy,
    ConnectFailed,
    ConnectionNotServiced,
    InvalidArgs,
    NoFreeDevice,
    NotAttached,
    ServerError,
)
from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.sysfs import Node, find
from nbdd.kernel.usage import Usage
from nbdd.server.connect import Deadline, list_exports
from nbdd.server.connections import Connections, open_connections
from nbdd.uri import URI
from nbdd.worker.binding import Binding
from nbdd.worker.child import Answer, Report
from nbdd.worker.request import Request, adopt_device, io_timeout

CONNECT_SECONDS = 15.0
"""For connecting and negotiating all connections of an attach. With what binding and udev take, an attach that
fails says so before busctl's 25 seconds are over."""

DETACH_SECONDS = 20.0
"""For the kernel to free a device and udev to remove its symbolic links."""

FORCE_SECONDS = 5.0
"""The same for a detach by force, which does not wait long for the users that it overrides."""

_EXPORTS_PER_MESSAGE = 500


def look(request: Request, _report: Report) -> Answer:
    """Refuse if the name is taken in the kernel. Once there is a record, a device of that name counts as our own."""
    for node in find(request.name):
        users = "; ".join(Usage().users(node))
        who = f"it was detached by force and is still in use ({users})" if users else "by somebody else than nbdd"
        raise Busy(
            f"{node.path} is bound under the name {request.name!r} already: {who}. "
            f"Free it, or use another name; 'nbd-client -d {node.path}' ends it when nobody uses it."
        )
    return {}, ()


def attach(request: Request, report: Report) -> Answer:
    """Connect, bind, and wait until the device is usable; answers the binding, with the connections."""
    definition = request.wanted
    bound = find(request.name)
    if bound and request.order["resume"]:
        # A worker before us died between the kernel's answer and its own. It knew the server; we must ask again.
        try:
            with open_connections(definition, Deadline(CONNECT_SECONDS)) as connections:
                binding = _binding_of(bound[0].index, connections)
            return _with_node(binding, adopt_device(request, binding)[1]).to_wire(), ()
        except ServerError as error:
            # Our own device may have the only connection that the server allows. If not in use, it is bound again.
            _free(request.name, bound[0], error)
    look(request, report)
    deadline = Deadline(CONNECT_SECONDS)
    for _ in range(definition.connections - 1):
        try:
            return _bind(request, definition, deadline, report)
        except ConnectionNotServiced as error:
            # With each attempt the kernel serves at least one more.
            report({"event": "info", "message": f"{error} Connecting again."}, ())
    return _bind(request, definition, deadline, report)


def adopt(request: Request, _report: Report) -> Answer:
    """Find the device that was bound; answers its binding as it is now."""
    binding = request.bound
    _, node = adopt_device(request, binding)
    # A connection that died since is seen by the worker's first poll. If none was kept, as many live as was last known.
    return _with_node(replace(binding, live=len(request.sockets) or binding.live), node).to_wire(), ()


def set_timeout(request: Request, _report: Report) -> Answer:
    """Set the request timeout, live."""
    # From Linux 6.12 on, setting the pace waits for all that is under way, and with a dead connection for ever. The
    # next mend sets it.
    device, _ = adopt_device(request, request.bound, paced=request.bound.missing <= 0)
    device.set_timeout(request.order["seconds"])
    return {}, ()


def detach(request: Request, report: Report) -> Answer:
    """End the device that was bound; without a binding, what an unfinished attach left under the name."""
    if request.binding is not None:
        with suppress(NotAttached):
            _disconnect(request, report, adopt_device(request, request.binding)[0], force=request.order["force"])
        return {}, ()
    for node in find(request.name):
        with suppress(NotAttached):
            device = KernelDevice(request.name)
            device.adopt(node.index)
            # udev has it open, or the child that died over it. But a quick user may have mounted it.
            if claims := device.claims():
                raise Busy(f"{node.path} is in use: {'; '.join(claims)}.")
            _disconnect(request, report, device, force=True)
    return {}, ()


def report_exports(request: Request, report: Report) -> Answer:
    """Ask a server what it exports; reports it in pieces."""
    found = [export.to_wire() for export in list_exports(URI.parse(request.order["uri"]), Deadline(CONNECT_SECONDS))]
    for start in range(0, len(found), _EXPORTS_PER_MESSAGE):
        report({"event": "exports", "exports": found[start : start + _EXPORTS_PER_MESSAGE]}, ())
    return {}, ()


def _bind(request: Request, definition: Definition, deadline: Deadline, report: Report) -> Answer:
    """Connect, and bind the connections."""
    connections = open_connections(definition, deadline)
    for warning in connections.warnings:
        report({"event": "warning", "message": warning}, ())
    try:
        device = KernelDevice(
            request.name,
            sockets=connections.sockets,
            size=connections.export.size,
            block_size=connections.block_size,
            flags=int(connections.export.flags),
            read_only=connections.read_only,
            timeout=definition.timeout,
            dead_timeout=definition.dead_timeout,
            io_timeout=io_timeout(len(connections.sockets)),
        )
        node = device.bind(definition.device)
    except ConnectFailed:
        # The error knows the socket, but not the server.
        raise ConnectFailed(f"The NBD server {connections.uri.address} hung up before the device was usable.") from None
    except (Busy, InvalidArgs, NoFreeDevice):
        connections.close()  # The kernel took none of them.
        raise
    return _with_node(_binding_of(node.index, connections), node).to_wire(), connections.sockets


def _free(name: str, node: Node, error: ServerError) -> None:
    """Free a device that is not in use yet; if it is, raises the error that made it necessary."""
    with KernelDevice(name) as device:
        try:
            device.adopt(node.index)
            device.disconnect(seconds=DETACH_SECONDS)
        except NotAttached:
            return
        except Busy as busy:
            raise type(error)(f"{error} It stays bound as it is: {busy}") from None


def _binding_of(index: int, connections: Connections) -> Binding:
    """A device that has these connections, as far as the server and they say what it is."""
    return Binding(
        index=index,
        uri=str(connections.uri),
        export=connections.export,
        connections=len(connections.sockets),
        live=len(connections.sockets),
    )


def _with_node(binding: Binding, node: Node) -> Binding:
    """The binding with what the kernel says of the node."""
    return replace(
        binding,
        index=node.index,
        node=node.path,
        size=node.size,
        # Not read again while a connection may be dead: see KernelDevice.block_size.
        block_size=binding.block_size or node.block_size,
        read_only=node.read_only,
        diskseq=node.diskseq or 0,
        pid=node.pid or 0,
        baseline=node.statistics() if binding.baseline is None else binding.baseline,
    )


def _disconnect(request: Request, report: Report, device: KernelDevice, *, force: bool) -> None:
    seconds = FORCE_SECONDS if request.order["force"] else DETACH_SECONDS
    if left := device.disconnect(seconds=seconds, force=force):
        message = f"detached, and the node is taken until they leave: {'; '.join(left)}"
        report({"event": "warning", "message": message}, ())
