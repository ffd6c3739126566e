# SPDX-License-Identifier: MIT
"""The child process of one device: it connects, negotiates, binds, watches, mends and detaches.

It is a plain loop over two kinds of news: orders from the manager, and links that die. Whatever happens to it, the
kernel keeps the device; it ends when the manager's end of the channel closes. Its whole world is the standard library
and the light half of nbdd, forked 64 times and more.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nbdd.channel import Channel, Message
from nbdd.client import Client
from nbdd.definition import Definition
from nbdd.errors import Busy, ConnectFailed, NbddError, NegotiationFailed, NotAttached
from nbdd.kernel import LinkDeadMonitor, Usage, find
from nbdd.kernel.sysfs import SECTOR
from nbdd.link import Links, differs, open_links
from nbdd.protocol import Export
from nbdd.transport import Deadline, list_exports
from nbdd.uri import URI

CONNECT_SECONDS = 15.0
"""For connecting and negotiating all links of an attach. With what binding and udev take, an attach that fails says so
before busctl's 25 seconds are over."""

MEND_SECONDS = 5.0
"""For connecting and negotiating one link anew; orders wait that long at most."""

MEND_WAITS = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Seconds before each attempt to mend; the last one repeats."""

DETACH_SECONDS = 20.0
"""For the kernel to free a device and udev to take its links away."""

_DEAD = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_EXPORTS_PER_MESSAGE = 500


def main(channel: Channel, name: str) -> int:
    """Serve one device until the manager lets go; returns the exit code. Called in a fresh fork."""
    _title(name)
    try:
        Worker(channel, name).run()
    except (BrokenPipeError, SystemExit):
        return 0  # The manager went away while it was told something; or nothing is left to do.
    except Exception:  # noqa: BLE001 - the last word of a process: say what happened, end, be replaced
        traceback.print_exc(file=sys.stderr)
        return 1
    return 0


def _title(name: str) -> None:
    """Show the device's name in ``ps -o comm`` and ``top``."""
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as comm:
            comm.write(f"nbdd:{name}"[:15])
    except OSError:
        return  # a nicety


class Worker:
    """Orders in, replies and events out; one device at most."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        self._client: Client | None = None
        self._definition: Definition | None = None
        # Our notes about the device: what it is, as the server told when it was bound. Nothing else may ever be
        # bound in its place. The manager keeps a copy for our successor.
        self._binding: Message = {}
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._watched: dict[int, socket.socket] = {}
        # Set while the links are the kernel's alone: after a start that found none kept. See `_go_blind`.
        self._reports: LinkDeadMonitor | None = None
        self._next_mend: float | None = None
        self._mends = 0
        self._orders: dict[str, Callable[[Message, list[int]], Message]] = {
            "look": self._look,
            "attach": self._attach,
            "adopt": self._adopt,
            "detach": self._detach,
            "set-timeout": self._set_timeout,
            "statistics": self._statistics,
            "list-exports": self._list_exports,
            "ping": lambda _order, _fds: {},
        }

    def run(self) -> None:
        """Work until the manager's end of the channel closes."""
        while True:
            for fd, events in self._poll.poll(self._patience()):
                if fd == self._channel.fileno():
                    if not self._channel.receive():
                        return
                elif self._reports is not None and fd == self._reports.fileno():
                    self._reported(self._reports)
                elif events & (_DEAD | select.POLLNVAL):
                    self._link_died(self._watched.pop(fd))
            while (found := self._channel.pop()) is not None:
                self._obey(*found)
            if self._next_mend is not None and time.monotonic() >= self._next_mend:
                self._mend()

    def _patience(self) -> float | None:
        """Milliseconds to wait for news; None is for ever."""
        if self._next_mend is None:
            return None
        return max(0.0, self._next_mend - time.monotonic()) * 1000

    def _obey(self, order: Message, fds: list[int]) -> None:
        # Descriptors become sockets with the order that brings them; what is left over is closed here.
        reply_fds: list[int] = []
        try:
            obey = self._orders.get(order["order"])
            if obey is None:
                raise NbddError(f"The worker of {self._name!r} knows no order {order['order']!r}.")
            reply = obey(order, fds)
            if order["order"] in ("attach", "adopt"):
                reply_fds = [sock.fileno() for sock in self._watched.values()]
        except NbddError as error:
            reply = error.to_wire()
        finally:
            for fd in fds:
                os.close(fd)
        self._channel.send({**reply, "id": order["id"]}, reply_fds)

    def _tell(self, event: str, **fields: Any) -> None:
        self._channel.send({"event": event, **fields})

    # Orders

    def _look(self, _order: Message, _fds: list[int]) -> Message:
        """Refuse if the name is taken in the kernel. From a record on, a device of that name counts as our own."""
        for node in find(self._name):
            users = "; ".join(Usage().users(node))
            who = f"it was detached by force and is still in use ({users})" if users else "by somebody else than nbdd"
            raise Busy(
                f"{node.path} is bound under the name {self._name!r} already: {who}. "
                f"Free it, or use another name; 'nbd-client -d {node.path}' ends it when nobody uses it."
            )
        return {}

    def _attach(self, order: Message, _fds: list[int]) -> Message:
        definition = Definition.from_wire(order["definition"])
        bound = find(self._name)
        if bound and order["resume"]:
            # A worker before us died between the kernel's answer and its own: it knew the server, we must ask again.
            with open_links(definition, Deadline(CONNECT_SECONDS)) as links:
                binding = self._describe(links)
            return self._take_over(definition, {**binding, "index": bound[0].index}, [])
        self._look(order, [])
        links = open_links(definition, Deadline(CONNECT_SECONDS))
        if self._abandoned():
            # A slow server outlasted the manager: its successor may be binding this very device by now.
            links.close()
            raise SystemExit(0)
        for warning in links.warnings:
            self._tell("warning", message=warning)
        try:
            client = Client(
                self._name,
                sockets=links.sockets,
                size=links.export.size,
                block_size=links.block_size,
                flags=int(links.export.flags),
                read_only=links.read_only,
                timeout=definition.timeout,
                dead_timeout=definition.dead_timeout,
            )
        except NbddError:
            links.close()
            raise
        try:
            client.bind(definition.device)
        except NbddError:
            client.close()
            raise
        return self._attached(client, definition, self._describe(links))

    def _abandoned(self) -> bool:
        poll = select.poll()
        poll.register(self._channel, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _adopt(self, order: Message, fds: list[int]) -> Message:
        if order["binding"] is None:
            raise NotAttached(f"{self._name!r} was not bound to any device yet.")
        return self._take_over(Definition.from_wire(order["definition"]), order["binding"], _sockets(fds))

    def _take_over(self, definition: Definition, binding: Message, sockets: list[socket.socket]) -> Message:
        try:
            client = Client(self._name, timeout=definition.timeout, dead_timeout=definition.dead_timeout)
            try:
                client.adopt(binding["index"], **_identity(binding), sockets=sockets)
            except NbddError:
                client.close()
                raise
        except NbddError:
            for sock in sockets:
                sock.close()
            raise
        # One that died since is seen by the first poll. Where nobody kept any, as many live as when we last knew.
        live = len(sockets) or binding["live"]
        reply = self._attached(client, definition, {**binding, "live": live})
        if not sockets and live:
            self._go_blind(client)
        return reply

    def _go_blind(self, client: Client) -> None:
        """Watch links that only the kernel holds: by its reports, and by offering it a new one for what died unseen."""
        self._reports = client.link_dead()
        self._poll.register(self._reports, select.POLLIN)
        self._next_mend = time.monotonic()

    @staticmethod
    def _describe(links: Links) -> Message:
        """The worker's notes about a device, but for what only the kernel knows."""
        return {
            "uri": str(links.uri),
            "export": links.export.to_wire(),
            "connections": len(links.sockets),
            "live": len(links.sockets),
            "reconnects": 0,
        }

    def _attached(self, client: Client, definition: Definition, binding: Message) -> Message:
        node = client.node
        assert node is not None  # noqa: S101 - just bound or adopted
        self._client = client
        self._definition = definition
        for sock in client.sockets:
            self._watch(sock)
        self._binding = {
            "baseline": node.statistics(),
            **binding,
            "index": node.index,
            "node": node.path,
            "size": node.size,
            "block-size": node.block_size,
            "read-only": node.read_only,
            "diskseq": node.diskseq or 0,
            "pid": node.pid or 0,
        }
        if self._binding["live"] < self._binding["connections"]:
            self._next_mend = time.monotonic()
        return self._binding

    def _detach(self, order: Message, fds: list[int]) -> Message:
        if self._client is not None:
            self._disconnect(self._client, force=order["force"])
            self._forget()
            return {}
        # Called in after the device's own worker died: the notes say which device it was.
        if order["binding"]:
            # It is adopted first: while the detach is refused, or waits, its links still want mending.
            with suppress(NotAttached):
                self._take_over(Definition.from_wire(order["definition"]), order["binding"], _sockets(fds))
                self._disconnect(self._bound(), force=order["force"])
                self._forget()
            return {}
        for node in find(self._name):
            with Client(self._name) as client, suppress(NotAttached):
                client.adopt(node.index)
                # The attach was not over: what has it open is udev, or the worker that died over it. But somebody
                # quick may have mounted it.
                if claims := client.claims():
                    raise Busy(f"{node.path} is in use: {'; '.join(claims)}.")
                self._disconnect(client, force=True)
        return {}

    def _disconnect(self, client: Client, *, force: bool) -> None:
        try:
            left = client.disconnect(seconds=DETACH_SECONDS, force=force)
        except NotAttached:
            return
        if left:
            self._tell("warning", message=f"detached, and the node is taken until they leave: {'; '.join(left)}")

    def _forget(self) -> None:
        for sock in self._watched.values():
            self._poll.unregister(sock)
        self._watched.clear()
        self._see_again()
        self._next_mend = None
        self._bound().close()
        self._client = None

    def _set_timeout(self, order: Message, _fds: list[int]) -> Message:
        self._bound().set_timeout(order["seconds"])
        return {}

    def _statistics(self, _order: Message, _fds: list[int]) -> Message:
        node = self._bound().node
        counted = node.statistics() if node is not None else {}
        if not counted:
            raise NotAttached(f"{self._name!r} is not attached.")
        # The kernel counts from when it made the node, which may have been other disks before.
        before = self._binding["baseline"]
        since = {key: value - before.get(key, 0) for key, value in counted.items()}
        return {
            "statistics": {
                "reads": since["read-requests"],
                "writes": since["write-requests"],
                "discards": since.get("discard-requests", 0),
                "flushes": since.get("flush-requests", 0),
                "read-bytes": since["read-sectors"] * SECTOR,
                "written-bytes": since["write-sectors"] * SECTOR,
                "discarded-bytes": since.get("discard-sectors", 0) * SECTOR,
                "in-flight": counted["in-flight"],
                "io-time": since["busy-milliseconds"],
            }
        }

    def _list_exports(self, order: Message, _fds: list[int]) -> Message:
        exports = [export.to_wire() for export in list_exports(URI.parse(order["uri"]), Deadline(CONNECT_SECONDS))]
        for start in range(0, len(exports), _EXPORTS_PER_MESSAGE):
            self._tell("exports", exports=exports[start : start + _EXPORTS_PER_MESSAGE])
        return {}

    def _bound(self) -> Client:
        if self._client is None:
            raise NotAttached(f"{self._name!r} is not attached.")
        return self._client

    # Links

    def _watch(self, sock: socket.socket) -> None:
        # No POLLIN: what arrives is the kernel driver's to read. Only the end of the link is ours to see.
        self._watched[sock.fileno()] = sock
        self._poll.register(sock, select.POLLRDHUP)

    def _reported(self, reports: LinkDeadMonitor) -> None:
        """The kernel says that links died, of this device or of others."""
        node = self._bound().node
        died = reports.read().count(node.index) if node is not None else 0
        if died:
            self._binding["live"] = max(0, self._binding["live"] - died)
            self._mends = 0
            self._next_mend = time.monotonic()
            self._report(ConnectFailed(f"A connection to {self._binding['uri']} ended."))

    def _see_again(self) -> None:
        if self._reports is not None:
            self._poll.unregister(self._reports)
            self._reports.close()
            self._reports = None

    def _link_died(self, sock: socket.socket) -> None:
        self._poll.unregister(sock)
        self._bound().drop_link(sock)
        self._binding["live"] -= 1
        self._mends = 0
        self._next_mend = time.monotonic()
        self._report(ConnectFailed(f"A connection to {self._binding['uri']} ended."))

    def _mend(self) -> None:
        """Replace what is dead, or say when to try again."""
        client, definition = self._bound(), self._definition
        assert definition is not None  # noqa: S101 - bound
        missing = self._binding["connections"] - self._binding["live"]
        # Blind, with none known to be dead: the kernel takes what we offer in place of a dead one, or drops it unseen.
        offer = self._reports is not None and missing == 0
        try:
            links = open_links(definition, Deadline(MEND_SECONDS), missing or 1)
            try:
                self._check_same(links)
                client.replace_links(links.sockets)
            except NbddError:
                links.close()
                raise
        except NotAttached:
            # Somebody else ended the device: go, and the next worker finds out.
            raise SystemExit(0) from None
        except NbddError as error:
            self._mends += 1
            self._next_mend = time.monotonic() + MEND_WAITS[min(self._mends, len(MEND_WAITS) - 1)]
            self._report(error)
            return
        if offer:
            for sock in links.sockets:
                client.drop_link(sock)
            self._next_mend = None
            return
        for sock in links.sockets:
            self._watch(sock)
        self._binding["live"] += len(links.sockets)
        self._binding["reconnects"] += len(links.sockets)
        self._binding["uri"] = str(links.uri)
        if len(self._watched) >= self._binding["connections"]:
            self._see_again()
        self._mends = 0
        self._next_mend = None
        self._report(None)

    def _check_same(self, links: Links) -> None:
        """Refuse a server that would put other data under the same device."""
        difference = differs(Export.from_wire(self._binding["export"]), links.export)
        if difference:
            raise NegotiationFailed(
                f"{links.uri} came back as something else, and is not used: {difference}. I/O waits; detach the device "
                "if this is what you want."
            )

    def _report(self, error: NbddError | None) -> None:
        told = error.to_wire() if error is not None else {}
        fields = {key: self._binding[key] for key in ("live", "reconnects", "uri")}
        fds = [sock.fileno() for sock in self._watched.values()]
        self._channel.send({"event": "links", **fields, **told}, fds)


def _sockets(fds: list[int]) -> list[socket.socket]:
    """The descriptors as sockets, which own them; what is no socket stays in `fds`."""
    found = []
    for fd in list(fds):
        try:
            found.append(socket.socket(fileno=fd))
        except OSError:
            continue
        fds.remove(fd)
    return found


def _identity(binding: Message) -> dict[str, int | None]:
    """What tells a device from a later one of the same index, as `Client.adopt` takes it."""
    return {"diskseq": binding.get("diskseq") or None, "pid": binding.get("pid") or None}
