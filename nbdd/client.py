# SPDX-License-Identifier: MIT
"""Client: the device side of one network block device.

It takes negotiated sockets and makes them a /dev/nbdX. The kernel owns the data path from then on: a Client that is
closed, or whose process is killed, leaves the device as it is, for another Client to adopt.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from nbdd.errors import KernelError, NbddError, NotAttached, TimedOut
from nbdd.kernel import LinkDeadMonitor, NetlinkNBD, Node, ServerFlags, Usage, identify, release, settle

MIN_BLOCK_SIZE = 512
"""Bytes; the kernel counts in sectors of this size."""

MAX_TIMEOUT = 2**31 - 1
"""Seconds; more than any clock here will see."""

UNBIND_SECONDS = 10.0
"""How long the kernel may take to free a device that could not be made usable."""


class Client:
    """One device: `bind` makes it, or `adopt` takes over one that is bound; `disconnect` ends it.

    `backend` is the identifier that the kernel keeps with the device, by which it is found again. Sizes in bytes,
    times in seconds. Not for several threads.
    """

    def __init__(
        self,
        backend: str,
        *,
        sockets: Sequence[socket.socket] = (),
        size: int = 0,
        block_size: int = MIN_BLOCK_SIZE,
        flags: int = 0,
        read_only: bool = False,
        timeout: int = 0,
        dead_timeout: int = 0,
    ) -> None:
        self.backend = backend
        self.node: Node | None = None
        self._netlink = NetlinkNBD()
        self._sockets = list(sockets)
        self._size = size
        self._block_size = block_size
        self._flags = flags | ServerFlags.HAS_FLAGS | (ServerFlags.READ_ONLY if read_only else 0)
        # What the node said of itself when it was ours; an index is recycled, and the kernel asks for no identity.
        self._diskseq: int | None = None
        self._pid: int | None = None
        self._timeout = timeout
        self._dead_timeout = dead_timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what this process holds; the device stays bound."""
        self._netlink.close()
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """The device's links, as far as this process has their descriptors."""
        return self._sockets

    def bind(self, index: int | None = None, *, usable_within: float = 15.0) -> Node:
        """Bind the sockets to /dev/nbdX, or to a free device, and wait until it is usable.

        Usable: it has its size, its partitions are there, udev has made its links. A device that can't be read
        within `usable_within` seconds is unbound again and TimedOut raised. Raises Busy, NoFreeDevice, KernelError.
        """
        try:
            found = self._netlink.connect(
                fds=[sock.fileno() for sock in self._sockets],
                size=self._size - self._size % self._block_size,
                block_size=self._block_size,
                server_flags=self._flags,
                timeout=self._timeout,
                dead_timeout=self._dead_timeout,
                backend=self.backend,
                index=index,
            )
        except TimedOut:
            self._shut_down()
            raise
        node = self.node = Node(found)
        self._diskseq, self._pid = node.diskseq, node.pid
        try:
            settle(node, usable_within)
        except NbddError:
            self._unbind(node)
            raise
        return node

    def adopt(
        self,
        index: int,
        *,
        diskseq: int | None = None,
        pid: int | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> Node:
        """Take over a device that is bound under our identifier; raises NotAttached where it is not.

        `diskseq` and `pid` are what `Node` said of it when it was bound, to tell it from a later one.
        `sockets` are duplicates of its links, if somebody kept them.
        """
        node = Node(index)
        identify(node, self.backend, diskseq, pid)
        self.node = node
        self._diskseq, self._pid = node.diskseq, node.pid
        self._sockets = list(sockets)
        return node

    def replace_links(self, sockets: Sequence[socket.socket]) -> None:
        """Give the kernel new sockets for its dead ones; raises NotAttached, KernelError, TimedOut."""
        node = self._still_ours()
        self._netlink.reconfigure(
            node.index,
            backend=self.backend,
            fds=[sock.fileno() for sock in sockets],
            dead_timeout=self._dead_timeout,
        )
        self._sockets.extend(sockets)

    def drop_link(self, sock: socket.socket) -> None:
        """Forget a dead link's descriptor."""
        self._sockets.remove(sock)
        sock.close()

    def set_timeout(self, seconds: int) -> None:
        """Set the request timeout, live: how long a request may take before its link is given up; 0 is no limit."""
        if not 0 <= seconds <= MAX_TIMEOUT:
            raise KernelError(f"A timeout of {seconds} s can't be set; it goes from 0 to {MAX_TIMEOUT}.")
        if self.node is not None:
            self._netlink.reconfigure(
                self._still_ours().index, backend=self.backend, timeout=seconds, dead_timeout=self._dead_timeout
            )
        self._timeout = seconds

    def disconnect(self, *, seconds: float, force: bool = False) -> list[str]:
        """End the device and wait, at most that long, until it is free; it is checked to be ours first.

        Raises Busy while somebody uses it, unless `force`; returns who still has it open then.
        """
        node = self._bound()
        left = release(
            self._netlink,
            node,
            self.backend,
            seconds,
            diskseq=self._diskseq,
            pid=self._pid,
            force=force,
            nudge=self._shut_down,
        )
        self.node = None
        return left

    def _bound(self) -> Node:
        if self.node is None:
            raise NotAttached(f"{self.backend!r} is not bound to any device.")
        return self.node

    def _still_ours(self) -> Node:
        """The node, if it is what it was. The kernel compares identifiers only where the device has one."""
        node = self._bound()
        identify(node, self.backend, self._diskseq, self._pid)
        return node

    def claims(self) -> list[str]:
        """Who has the device mounted, swapped on or stacked upon, in sentences; asks nothing of the device itself."""
        return Usage().claims(self._bound())

    def link_dead(self) -> LinkDeadMonitor:
        """The kernel's own word about dying links, for devices whose links nobody here holds."""
        return self._netlink.link_dead()

    def _unbind(self, node: Node) -> None:
        """Take a device away again that could not be made usable."""
        # The server may not answer any more; with the links down, what waits for it fails at once.
        self._shut_down()
        with suppress(NotAttached):
            release(self._netlink, node, self.backend, UNBIND_SECONDS, force=True)
        self.node = None

    def _shut_down(self) -> None:
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def page_size() -> int:
    """Bytes; the largest block size before Linux 6.15."""
    return os.sysconf("SC_PAGE_SIZE")
