# SPDX-License-Identifier: MIT
"""The jobs that a worker sends errands on: everything that connects, or that asks the kernel for something.

Each is a function of a `Task`. It runs in a child of the worker, blocks as long as it must, within its deadlines,
and returns its answer or raises an NbddError. A device is told from a later one of the same index by the worker's
binding, each time anew.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from nbdd.config.definition import Definition
from nbdd.errors import (
    Busy,
    ConnectFailed,
    ConnectionNotServiced,
    ExportChanged,
    InvalidArgs,
    KernelError,
    NbddError,
    NegotiationFailed,
    NoFreeDevice,
    NotAttached,
    ServerError,
)
from nbdd.ipc.channel import Message
from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.sysfs import Node, find
from nbdd.kernel.usage import Usage
from nbdd.server import fingerprint
from nbdd.server.connect import Deadline, list_exports
from nbdd.server.connections import Connections, export_difference, open_connections
from nbdd.server.fingerprint import Fingerprint
from nbdd.uri import URI
from nbdd.worker.binding import Binding
from nbdd.worker.child import Answer, Tell
from nbdd.worker.error_server import withdraw

CONNECT_SECONDS = 15.0
"""For connecting and negotiating all links of an attach. With what binding and udev take, an attach that fails says so
before busctl's 25 seconds are over."""

MEND_SECONDS = 5.0
"""For connecting and negotiating links anew. A server that comes back is found by a fresh attempt, not by waiting."""

LOOK_SECONDS = 15.0
"""For a look at what is on the export. A slow server gets it, and one that is slower still does without the look."""

QUIET_SECONDS = 1.0
"""How long a moment with nothing under way is waited for, before links are exchanged."""

EXCHANGE_PATIENCE = 30
"""Seconds of dead timeout, at least, while links are exchanged: I/O waits for a moment that we have made ourselves."""

QUIET_INTERVAL = 0.002
"""Seconds between two looks for it."""

LATE_SECONDS = 1.0
"""For the kernel to say so, where it saw a link die later than we did: it waited for a processor, which in a virtual
machine may be away for long. I/O goes on meanwhile; only that all is well again is told later."""

RESEND_SECONDS = 3.0
"""How long a moment with nothing under way is waited for, before a size is set: what was lost with the old link of a
device that has one is sent again by then."""

DEAD_SECONDS = 3.0
"""For the kernel to say that a link that was shut down is dead; it only has to run."""

IO_TIMEOUT = 1000
"""Milliseconds; for a device of one link, without a request timeout of the user's.

What was under way when its link died is sent again when the kernel looks after it. By itself it does that after 30 s.
With one link and no request timeout it only looks, so it may look often: slow servers are left in peace. With several
links, or a timeout, it would give up the link of every request that takes so long (drivers/block/nbd.c,
nbd_xmit_timeout), so that these keep the 30 s, or what the user said.
"""

DETACH_SECONDS = 20.0
"""For the kernel to free a device and udev to take its links away."""

FORCE_SECONDS = 5.0
"""The same for a detach by force, which does not wait for the users that it overrides."""

_EXPORTS_PER_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class Task:
    """One order, and what the worker knows of the device when it sends the errand."""

    order: Message
    name: str
    definition: Message
    """As `Definition.to_wire`, or {} where none matters."""
    binding: Binding | None
    """What the device is; None where none is bound yet, as far as anybody knows."""
    links: Sequence[int]
    """Descriptors of the device's links, as far as anybody has them."""

    @property
    def bound(self) -> Binding:
        """The binding; raises NotAttached where there is none."""
        if self.binding is None:
            raise NotAttached(f"{self.name!r} was not bound to any device yet.")
        return self.binding


def look(task: Task, _tell: Tell) -> Answer:
    """Refuse if the name is taken in the kernel. From a record on, a device of that name counts as our own."""
    for node in find(task.name):
        users = "; ".join(Usage().users(node))
        who = f"it was detached by force and is still in use ({users})" if users else "by somebody else than nbdd"
        raise Busy(
            f"{node.path} is bound under the name {task.name!r} already: {who}. "
            f"Free it, or use another name; 'nbd-client -d {node.path}' ends it when nobody uses it."
        )
    return {}, ()


def attach(task: Task, tell: Tell) -> Answer:
    """Connect, bind, and wait until the device is usable; answers the binding, with the links."""
    definition = Definition.from_wire(task.definition)
    bound = find(task.name)
    if bound and task.order["resume"]:
        # One before us died between the kernel's answer and its own: it knew the server, we must ask again.
        try:
            with open_connections(definition, Deadline(CONNECT_SECONDS)) as links:
                binding = _offered(bound[0].index, links)
            return _as_bound(binding, _adopted(task, binding)[1]).to_wire(), ()
        except ServerError as error:
            # Our own device may hold the only place that the server has. As long as nobody uses it, it is made anew.
            _unmake(task.name, bound[0], error)
    look(task, tell)
    deadline = Deadline(CONNECT_SECONDS)
    for _ in range(definition.connections - 1):
        try:
            return _bind(task, definition, deadline, tell)
        except ConnectionNotServiced as error:
            # With each attempt the kernel has at least one more.
            tell({"event": "info", "message": f"{error} They are connected anew."}, ())
    return _bind(task, definition, deadline, tell)


def _bind(task: Task, definition: Definition, deadline: Deadline, tell: Tell) -> Answer:
    """Connect, and bind what comes of it."""
    links = open_connections(definition, deadline)
    for warning in links.warnings:
        tell({"event": "warning", "message": warning}, ())
    try:
        device = KernelDevice(
            task.name,
            sockets=links.sockets,
            size=links.export.size,
            block_size=links.block_size,
            flags=int(links.export.flags),
            read_only=links.read_only,
            timeout=definition.timeout,
            dead_timeout=definition.dead_timeout,
            io_timeout=_io_timeout(len(links.sockets)),
        )
        node = device.bind(definition.device)
    except ConnectFailed:
        # It knows the socket, and not whose it is.
        raise ConnectFailed(f"The NBD server {links.uri.address} hung up before the device was usable.") from None
    except (Busy, InvalidArgs, NoFreeDevice):
        links.close()  # The kernel took none of them.
        raise
    return _as_bound(_offered(node.index, links), node).to_wire(), links.sockets


def adopt(task: Task, _tell: Tell) -> Answer:
    """Find the device that was bound; answers its binding as it is now."""
    binding = task.bound
    _, node = _adopted(task, binding)
    # A link that died since is seen by the worker's first poll. Where nobody kept any, as many live as was last known.
    return _as_bound(replace(binding, live=len(task.links) or binding.live), node).to_wire(), ()


def mend(task: Task, tell: Tell) -> Answer:
    """Give the kernel `missing` new links for dead ones, checked to lead to the same data; answers their server.

    `task.links` is the refuser's end, where the kernel has been given one; it is withdrawn first.
    """
    definition = Definition.from_wire(task.definition)
    if task.bound.live:
        # Writes over links to one server would be read over those to another late, or never.
        definition = replace(definition, uri=(URI.parse(task.bound.uri),))
    links = _open_same(task, definition, task.order["missing"], tell=tell)
    device = _ours(task, links)
    _offer(tell, links)
    _give(task, device, links)
    # A timeout may have been set while there was no link.
    device.pace()
    return {"uri": str(links.uri)}, ()


def reconnect(task: Task, tell: Tell) -> Answer:
    """Exchange all links for new ones to the first server of the definition that has the same data; answers it."""
    _exchange(task, tell, _open_same(task, Definition.from_wire(task.definition), tell=tell))
    return {}, ()


def resize(task: Task, tell: Tell) -> Answer:
    """Take the size that the server says now, if it has grown: over new links, as one keeps the size it began with."""
    definition = Definition.from_wire(task.definition)
    binding = task.bound
    if binding.live:
        definition = replace(definition, uri=(URI.parse(binding.uri),))
    links = _open_same(task, definition, tell=tell, grown=True)
    size = links.export.size - links.export.size % binding.block_size
    if size == binding.size and not binding.missing:
        links.close()
        return {"size": size}, ()
    device = _exchange(task, tell, links)
    # From Linux 6.9 on the kernel waits for all that is under way, with every other command for any NBD device behind
    # that. What was lost with one of several links is sent again after half a minute only.
    if not _quiet(Node(binding.index), RESEND_SECONDS) and binding.connections > 1:
        raise Busy(
            f"{task.name!r} has several connections, and takes a size at a moment without I/O only: try again then."
        )
    device.set_size(size)
    return {"size": size}, ()


def refuse(task: Task, _tell: Tell) -> Answer:
    """Give the kernel, for its dead links, one that fails every request: `task.links` is its end. See `refuser`."""
    device, _ = _adopted(replace(task, links=()), task.bound)
    device.replace_connections([socket.socket(fileno=fd) for fd in task.links])
    return {}, ()


def set_timeout(task: Task, _tell: Tell) -> Answer:
    """Set the request timeout, live."""
    # Its pace waits, from Linux 6.12 on, for all that is under way, and with a dead link for ever. The mend sees to it.
    device, _ = _adopted(task, task.bound, paced=task.bound.missing <= 0)
    device.set_timeout(task.order["seconds"])
    return {}, ()


def detach(task: Task, tell: Tell) -> Answer:
    """End the device that was bound; without a binding, what an unfinished attach left under the name."""
    if task.binding is not None:
        with suppress(NotAttached):
            _disconnect(task, tell, _adopted(task, task.binding)[0], force=task.order["force"])
        return {}, ()
    for node in find(task.name):
        with suppress(NotAttached):
            device = KernelDevice(task.name)
            device.adopt(node.index)
            # What has it open is udev, or the errand that died over it. But somebody quick may have mounted it.
            if claims := device.claims():
                raise Busy(f"{node.path} is in use: {'; '.join(claims)}.")
            _disconnect(task, tell, device, force=True)
    return {}, ()


def exports(task: Task, tell: Tell) -> Answer:
    """Ask a server what it exports; told in pieces."""
    found = [export.to_wire() for export in list_exports(URI.parse(task.order["uri"]), Deadline(CONNECT_SECONDS))]
    for start in range(0, len(found), _EXPORTS_PER_MESSAGE):
        tell({"event": "exports", "exports": found[start : start + _EXPORTS_PER_MESSAGE]}, ())
    return {}, ()


ORDERS: Mapping[str, Callable[[Task, Tell], Answer]] = {
    "look": look,
    "attach": attach,
    "adopt": adopt,
    "set-timeout": set_timeout,
    "detach": detach,
    "list-exports": exports,
}
"""What the manager may order, and what is done for it."""

RENEWALS: Mapping[str, Callable[[Task, Tell], Answer]] = {"reconnect": reconnect, "resize": resize}
"""The same, for what exchanges the links of a device."""


# What a job opens is closed by the end of its process; only servers want to be told.


class _Unseen(Exception):
    """What is on an export can't be looked at. No ServerError: no reason to refuse it, nor to try another one."""

    def __init__(self, uri: URI, why: str) -> None:
        super().__init__(f"{why} What is on the export is not compared with what is on the device.")
        self.uri = uri


def _open_same(
    task: Task, definition: Definition, connections: int | None = None, *, tell: Tell, grown: bool = False
) -> Connections:
    """New links, as many as the device has or as are said, to the same export; it may have `grown`."""
    binding = task.bound
    known = binding.export

    def check(links: Connections) -> None:
        found = links.export
        if grown and found.size < known.size:
            raise ExportChanged(
                f"{links.uri} has {found.size} bytes now, less than the {known.size} of the device. A device that is "
                "attached can't shrink: detach it, and attach it again."
            )
        if difference := export_difference(known, replace(found, size=known.size) if grown else found):
            raise _other(links, difference)

    def look(links: Connections) -> None:
        check(links)
        # What stands at the end of a device that grew stands where its end was.
        _look_same(Node(binding.index), links, known.size)

    count = connections or binding.connections
    try:
        return open_connections(definition, Deadline(MEND_SECONDS), count, check=look)
    except _Unseen as error:
        tell({"event": "warning", "message": str(error)}, ())
        # That server alone: one before it in the list may have been looked at, and refused.
        return open_connections(replace(definition, uri=(error.uri,)), Deadline(MEND_SECONDS), count, check=check)


def _ours(task: Task, links: Connections) -> KernelDevice:
    """The device, for links that are about to be its own."""
    try:
        return _adopted(replace(task, links=()), task.bound)[0]
    except NbddError:
        links.close()
        raise


def _offer(tell: Tell, links: Connections) -> None:
    """Before the kernel is asked: whatever becomes of us, the worker holds what the kernel may have taken."""
    tell({"event": "offered", "export": links.export.to_wire()}, [sock.fileno() for sock in links.sockets])


def _give(task: Task, device: KernelDevice, links: Connections) -> None:
    """Have the kernel take the links in place of dead ones, and of the refuser; raises KernelError if it may not have.

    It replaces what it has seen die by then, and drops the rest without a word. So one that it sees die only now may
    have been in the way.
    """
    index = task.bound.index
    with device.watch_connections() as reports:
        for fd in task.links:
            withdraw(fd)
        device.replace_connections(links.sockets)
        late, end = -len(task.links), time.monotonic() + LATE_SECONDS
        while (left := end - time.monotonic()) > 0:
            late += reports.wait(left).count(index)
    if late > 0:
        raise KernelError("A link died while the kernel was given new ones; it is given others.")


def _exchange(task: Task, tell: Tell, links: Connections) -> KernelDevice:
    """Give the kernel these links in place of all that it has, at a quiet moment where there is one."""
    device = _ours(task, links)
    index, live = task.bound.index, task.bound.live
    patience = task.definition["dead-timeout"]
    if patience < EXCHANGE_PATIENCE:
        device.set_dead_timeout(EXCHANGE_PATIENCE)
    with device.watch_connections() as reports:
        _quiet(Node(index), QUIET_SECONDS)
        _offer(tell, links)  # Upon this the worker shuts the old ones down.
        # Only what the kernel counts as dead is replaced.
        deadline = Deadline(DEAD_SECONDS)
        while live > 0:
            live -= reports.wait(deadline.remaining("The kernel did not let go of the old links")).count(index)
    _give(task, device, links)
    tell({"event": "linked", "uri": str(links.uri)}, ())
    if patience < EXCHANGE_PATIENCE:
        device.set_dead_timeout(patience)
    return device


def _quiet(node: Node, seconds: float) -> bool:
    """Wait for a moment with nothing under way; whether there was one. What is will be sent again, but not at once."""
    end = time.monotonic() + seconds
    while node.statistics().get("in-flight"):
        if time.monotonic() >= end:
            return False
        time.sleep(QUIET_INTERVAL)
    return True


def _look_same(node: Node, links: Connections, size: int) -> None:
    """Refuse an export that has another filesystem on it, or another partition table, than the device of that size."""
    known = fingerprint.of_device(node, Usage())
    if known == Fingerprint():
        return
    try:
        found = fingerprint.of_export(links.sockets[0], size, links.block_size, Deadline(LOOK_SECONDS))
    except (ConnectFailed, NegotiationFailed):
        # It went away, or speaks no NBD: nothing for the kernel.
        raise
    except ServerError as error:
        # Too slow, or it can't read there. I/O that can go on does not wait for that.
        raise _Unseen(links.uri, str(error)) from None
    if difference := known.difference(found):
        raise _other(links, difference)


def _other(links: Connections, difference: str) -> ExportChanged:
    return ExportChanged(
        f"{links.uri} came back as something else, and is not used: {difference}. I/O waits; detach the device if this "
        "is what you want."
    )


def _io_timeout(connections: int) -> int | None:
    return IO_TIMEOUT if connections == 1 else None


def _adopted(task: Task, binding: Binding, *, paced: bool = True) -> tuple[KernelDevice, Node]:
    """The device that was bound, if it is still that: else NotAttached."""
    definition = Definition.from_wire(task.definition)
    device = KernelDevice(
        task.name,
        timeout=definition.timeout,
        dead_timeout=definition.dead_timeout,
        io_timeout=_io_timeout(binding.connections) if paced else None,
    )
    sockets = [socket.socket(fileno=fd) for fd in task.links]
    node = device.adopt(binding.index, diskseq=binding.diskseq or None, pid=binding.pid or None, sockets=sockets)
    return device, node


def _unmake(name: str, node: Node, error: ServerError) -> None:
    """Free a device that nobody uses yet; raises the error that made it necessary where somebody does."""
    with KernelDevice(name) as device:
        try:
            device.adopt(node.index)
            device.disconnect(seconds=DETACH_SECONDS)
        except NotAttached:
            return
        except Busy as busy:
            raise type(error)(f"{error} It stays bound as it is: {busy}") from None


def _offered(index: int, links: Connections) -> Binding:
    """A device that has these links, as far as the server and they say what it is."""
    return Binding(
        index=index,
        uri=str(links.uri),
        export=links.export,
        connections=len(links.sockets),
        live=len(links.sockets),
    )


def _as_bound(binding: Binding, node: Node) -> Binding:
    """The binding with what the kernel says."""
    return replace(
        binding,
        index=node.index,
        node=node.path,
        size=node.size,
        # Not asked for again, where a link may be dead: see KernelDevice.block_size.
        block_size=binding.block_size or node.block_size,
        read_only=node.read_only,
        diskseq=node.diskseq or 0,
        pid=node.pid or 0,
        baseline=node.statistics() if binding.baseline is None else binding.baseline,
    )


def _disconnect(task: Task, tell: Tell, device: KernelDevice, *, force: bool) -> None:
    seconds = FORCE_SECONDS if task.order["force"] else DETACH_SECONDS
    if left := device.disconnect(seconds=seconds, force=force):
        message = f"detached, and the node is taken until they leave: {'; '.join(left)}"
        tell({"event": "warning", "message": message}, ())
