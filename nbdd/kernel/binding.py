# SPDX-License-Identifier: MIT
"""KernelDevice: one NBD device of the kernel, from the binding of its sockets to its end.

The kernel does all I/O of a bound device. No process has to stay: a program that knows the device's identifier and
index can adopt it later.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from nbdd.errors import AlreadyAttached, Busy, InvalidArgs, NbddError, NotAttached, TimedOut
from nbdd.kernel.arguments import check_backend, check_block_size, check_integer, check_seconds
from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.family import ServerFlags
from nbdd.kernel.netlink import NetlinkNBD
from nbdd.kernel.release import identify, let_udev_finish, release
from nbdd.kernel.sockets import all_hung_up, check_socket, shut_down
from nbdd.kernel.sysfs import Node, find
from nbdd.kernel.usable import SETTLE_SECONDS, change_geometry, make_usable
from nbdd.kernel.usage import Usage
from nbdd.limits import MAX_SIZE, MAX_TIMEOUT, MIN_BLOCK_SIZE

END_SECONDS = 10.0
"""How long the end of a device may take: programs that have it open must close it first."""


class KernelDevice:
    """One NBD device of the kernel: binds sockets to it, or adopts it; changes it while it is in use; disconnects it.

    `backend`: the identifier that the kernel keeps with the device; one is made up if it is None.
    `size`, `block_size` in bytes; `size` is rounded down to a multiple of the block size.
    `flags`: the transmission flags of the NBD protocol; the kernel gets those that it knows.
    `timeout`: seconds that a request may take before its connection is given up; 0 is no limit.
    `dead_timeout`: seconds that I/O waits for a new connection after the last one died; 0 fails it at once. None is 0
    for a device that is bound, and leaves one that is adopted as it is.
    `io_timeout`: milliseconds between two checks of the kernel whether the connection of a request was replaced, which
    is when the request is sent again. Only in force while `timeout` is 0. None leaves it at the kernel's 30 s.

    Nothing reaches the kernel before `bind` or `adopt`. From then on each change is made at once, after a check that
    the device is still the one that was bound: an index is recycled, and the kernel compares no identity. The sockets
    are the object's own from the end of the constructor. Not for several threads.
    """

    def __init__(
        self,
        backend: str | None = None,
        *,
        sockets: Sequence[socket.socket] = (),
        size: int | None = None,
        block_size: int = MIN_BLOCK_SIZE,
        flags: int = 0,
        read_only: bool = False,
        timeout: int = 0,
        dead_timeout: int | None = None,
        io_timeout: int | None = None,
    ) -> None:
        if backend is not None:
            check_backend(backend)
        # No udev rule makes a link for a name that begins like this, and the daemon takes it for no device of its own.
        self.backend = f"@nbdd-{os.urandom(8).hex()}" if backend is None else backend
        self.has_name = backend is not None
        self.node: Node | None = None
        self.sockets: list[socket.socket] = []
        self._netlink: NetlinkNBD | None = None
        self._netlink_owner = 0
        # What the node said when it was bound or adopted.
        self._bound_as: str | None = None
        self._diskseq: int | None = None
        self._pid: int | None = None
        check_integer("Transmission flags", flags, 0, 0xFFFF, "bits")
        self._flags = flags | ServerFlags.HAS_FLAGS | (ServerFlags.READ_ONLY if read_only else 0)
        self._dead_timeout = dead_timeout
        if dead_timeout is not None:
            check_integer("A dead timeout", dead_timeout, 0, MAX_TIMEOUT, "s")
        self._io_timeout = io_timeout
        if io_timeout is not None:
            check_integer("An I/O timeout", io_timeout, 1, MAX_TIMEOUT * 1000, "ms")
        # As set or adopted: bytes, 0 if it was never set, and seconds; the timeout of an adopted device is not read.
        self.size = self._block_size = self.timeout = 0
        self.set_timeout(timeout)
        self.set_block_size(block_size)
        if size is not None:
            self.set_size(size)
        for sock in sockets:
            check_socket(sock)
        self.sockets.extend(sockets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets and the netlink socket. The device stays bound."""
        self.close_sockets()
        self.close_netlink()

    def close_sockets(self) -> None:
        """Close this process's descriptors of the connections; the kernel has its own."""
        for sock in self.sockets:
            sock.close()
        self.sockets = []

    def close_netlink(self) -> None:
        """Close the netlink socket; the next call to the kernel opens another one."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    # Bind, adopt, disconnect

    def bind(self, index: int | None = None, *, usable_within: float = SETTLE_SECONDS) -> Node:
        """Bind the sockets to the device of this index, or to a free one, and wait until it is usable.

        Usable: it has its size, its partitions are there, udev has made its symlinks. A device that can't be read
        within `usable_within` seconds is unbound again and TimedOut raised, or ConnectFailed if the server hung up.
        Raises AlreadyAttached, InvalidArgs (no socket, no size), Busy, NoFreeDevice, KernelError.
        ConnectionNotServiced: the kernel reads from some of the sockets only; new ones may do. See `make_usable`.
        """
        if (bound := self.current()) is not None:
            raise AlreadyAttached(f"The client is bound to {bound.path} already.")
        self.check_complete()
        try:
            node = self.connect(index)
            self.make_usable(node, usable_within)
        except BaseException:
            if self.node is not None:
                # The server may not answer any more. With the connections down, what waits for it fails at once.
                self.shut_down()
                self.unbind(self.node)
            raise
        return node

    def adopt(
        self,
        index: int | None = None,
        *,
        diskseq: int | None = None,
        pid: int | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> Node:
        """Take over a device that is bound, as it is.

        Without an `index` it is looked up by the identifier. An object that was given no identifier takes whatever is
        bound at the index. `diskseq` and `pid` are what `Node` said when the device was bound, to tell it from a later
        one. `sockets` are duplicates of its connections, if somebody kept them.

        Raises AlreadyAttached, Busy (several devices have the identifier), NotAttached (not bound, or not as this).
        """
        if (bound := self.current()) is not None:
            raise AlreadyAttached(f"The client is bound to {bound.path} already.")
        node = find_one(self.backend) if index is None else Node(index)
        bound_as = self.backend if self.has_name else node.backend
        identify(node, bound_as, diskseq, pid)
        self.node, self._bound_as = node, bound_as
        self._diskseq, self._pid = node.diskseq, node.pid
        self.size, self._block_size = node.size, 0
        self.sockets = list(sockets)
        return node

    def bound_by_child(self, node: Node, diskseq: int | None, pid: int | None) -> None:
        """Remember what a child of this process has bound, with this object's identifier and settings."""
        self.node, self._bound_as, self._diskseq, self._pid = node, self.backend, diskseq, pid

    def disconnect(self, *, seconds: float = END_SECONDS, force: bool = False) -> list[str]:
        """Disconnect the device, and wait until it is free; return who still has it open after `seconds`.

        Raises Busy if somebody uses it, unless `force`: then what they have not written is lost, and the node is free
        when the last of them has closed it. Raises NotAttached (it is bound as something else by now), TimedOut,
        KernelError.
        """
        check_seconds("How long to wait", seconds)
        left = release(
            self._kernel(),
            self._bound(),
            self._bound_as,
            seconds,
            diskseq=self._diskseq,
            pid=self._pid,
            force=force,
            nudge=self.shut_down,
        )
        self.node = None
        return left

    def current(self) -> Node | None:
        """The node, or None if none is bound, or it is bound as something else by now."""
        with suppress(NotAttached):
            return self._still_ours()
        self.node = None
        return None

    # Changes of a bound device

    def replace_connections(self, sockets: Sequence[socket.socket]) -> None:
        """Give the kernel new sockets for its dead ones; raises NotAttached, KernelError, TimedOut."""
        node = self._still_ours()
        for sock in sockets:
            check_socket(sock)
        self._kernel().reconfigure(
            node.index,
            backend=self._bound_as,
            fds=[sock.fileno() for sock in sockets],
            dead_timeout=self._dead_timeout,
        )
        self.sockets.extend(sockets)

    def drop_connection(self, sock: socket.socket) -> None:
        """Close this process's descriptor of a dead connection."""
        self.sockets.remove(sock)
        sock.close()

    def watch_connections(self) -> LinkDeadMonitor:
        """The kernel's own reports of connections that die, of all devices. It needs none of their descriptors."""
        return self._kernel().watch_connections()

    def claims(self) -> list[str]:
        """The mounts, swap and stacked devices on it, one sentence each; asks nothing of the device itself."""
        return Usage().claims(self._bound())

    def set_timeout(self, seconds: int) -> None:
        """Set the request timeout, in seconds; 0 is no limit. Without a pause in the I/O of a bound device.

        Raises InvalidArgs; on a bound device NotAttached, KernelError, TimedOut.
        """
        seconds = check_integer("A timeout", seconds, 0, MAX_TIMEOUT, "s")
        if self.node is not None:
            index = self._still_ours().index
            self._kernel().reconfigure(index, backend=self._bound_as, timeout=seconds, dead_timeout=self._dead_timeout)
        self.timeout = seconds
        if self.node is not None:
            self._pace(self.node)

    def set_dead_timeout(self, seconds: int) -> None:
        """Set how long I/O waits without a live connection, in seconds; 0 fails it at once."""
        check_integer("A dead timeout", seconds, 0, MAX_TIMEOUT, "s")
        self._dead_timeout = seconds
        if self.node is not None:
            node = self._still_ours()
            self._kernel().reconfigure(node.index, backend=self._bound_as, dead_timeout=seconds)

    def pace(self) -> None:
        """Set the kernel's `queue/io_timeout` of an adopted device to `io_timeout`; not while a connection is dead."""
        self._pace(self._bound())

    @property
    def block_size(self) -> int:
        """Bytes, as set or adopted."""
        # That of an adopted device is read only if somebody wants it. From Linux 6.12 on, a read below queue/ waits for
        # a write there, which waits for the requests in flight, which may wait for the very connection that the device
        # was adopted to be given.
        if not self._block_size:
            self._block_size = self._bound().block_size
        return self._block_size

    def set_size(self, size: int) -> None:
        """Set the size in bytes, rounded down to a multiple of the block size.

        A bound device grows at once, in use or not; it shrinks only while it is unused.
        Raises InvalidArgs; on a bound device Busy, NotAttached, ConnectFailed (a connection is dead), KernelError,
        TimedOut.
        """
        self._resize(check_integer("A size", size, 1, MAX_SIZE, "bytes"), self.block_size)

    def set_block_size(self, size: int) -> None:
        """Set the block size in bytes; rounds the size of the device down to a multiple.

        A bound device must be unused. Raises InvalidArgs, and what `set_size` raises.
        """
        self._resize(self.size, check_block_size(size))

    def _resize(self, size: int, block_size: int) -> None:
        """Set both; a size of 0 was never set."""
        rounded = size - size % block_size
        if size and not rounded:
            raise InvalidArgs(f"{size} bytes don't fill one block of {block_size} bytes.")
        if self.node is not None:
            node = self._still_ours()
            change_geometry(self._kernel(), node, self._bound_as, self.sockets, size=rounded, block_size=block_size)
        self.size, self._block_size = rounded, block_size

    # The steps of `bind`, for a process that serves the device while it is bound

    def check_complete(self) -> None:
        """Raise InvalidArgs if there is no socket or no size, ConnectFailed if a socket has hung up."""
        if not self.sockets:
            raise InvalidArgs(
                "There is no socket to serve; set one first, with socket(). Those of a service that has ended are gone."
            )
        if not self.size:
            raise InvalidArgs("The size of the device is not known; set it first, with set_size() or set_blocks().")
        for sock in self.sockets:
            check_socket(sock)

    def connect(self, index: int | None) -> Node:
        """Have the kernel bind the sockets; the device is not usable yet."""
        known = find(self.backend) if self.has_name else []
        try:
            found = self._kernel().connect(
                fds=[sock.fileno() for sock in self.sockets],
                size=self.size,
                block_size=self.block_size,
                server_flags=self._flags,
                timeout=self.timeout,
                dead_timeout=self._dead_timeout or 0,
                backend=self.backend,
                index=index,
            )
            node = self.node = Node(found)
            self._bound_as, self._diskseq, self._pid = self.backend, node.diskseq, node.pid
            self._pace(node)
            return node
        except TimedOut:
            self.shut_down()
            raise
        except NbddError:
            raise
        except BaseException:
            # Interrupted: the device may be bound all the same.
            self.shut_down()
            for node in find(self.backend):
                if node not in known:
                    self.unbind(node)
            raise

    def make_usable(self, node: Node, seconds: float = SETTLE_SECONDS) -> None:
        """Wait until it has its size, its partitions and udev's symlinks; raises as `usable.make_usable`."""
        make_usable(node, self.sockets, seconds, disconnect=lambda: self._kernel().disconnect(node.index))

    def unbind(self, node: Node) -> None:
        """Disconnect by force a device that could not be made usable, or that is served no longer."""
        if not self.is_cut_off():
            let_udev_finish(node, Usage())
        with suppress(NotAttached):
            release(self._kernel(), node, self.backend, END_SECONDS, force=True, nudge=self.shut_down)
        self.node = None

    def is_cut_off(self) -> bool:
        """Whether the server has hung up on every socket."""
        return all_hung_up(self.sockets)

    def shut_down(self) -> None:
        """Shut all sockets down, so that nothing waits for the server any more."""
        shut_down(self.sockets)

    # Inside

    def _kernel(self) -> NetlinkNBD:
        if self._netlink is not None and self._netlink_owner != os.getpid():
            # A fork of the process: two processes can't share one, each would take the other's answers.
            self.close_netlink()
        if self._netlink is None:
            self._netlink = NetlinkNBD()
            self._netlink_owner = os.getpid()
        return self._netlink

    def _bound(self) -> Node:
        if self.node is None:
            raise NotAttached(f"{self.backend!r} is not bound to any device.")
        return self.node

    def _still_ours(self) -> Node:
        """The node, if it is what it was. The kernel compares identifiers only if the device has one."""
        node = self._bound()
        identify(node, self._bound_as, self._diskseq, self._pid)
        return node

    def _pace(self, node: Node) -> None:
        """Write `queue/io_timeout`. It counts for new requests; those that the kernel has already keep their 30 s."""
        if self._io_timeout is not None and not self.timeout and node.io_timeout != self._io_timeout:
            # On Linux 6.12 and later it waits for a slow server; the kernel writes it later all the same.
            with suppress(TimedOut):
                node.set_io_timeout(self._io_timeout)


def find_one(backend: str) -> Node:
    """The device that is bound with this identifier; raises Busy if there are several, NotAttached if none."""
    found = find(backend)
    if len(found) > 1:
        raise Busy(f"{backend!r} is bound to {' and '.join(node.path for node in found)}; name the device.")
    if not found:
        raise NotAttached(f"{backend!r} is not bound to any device, and no device was named.")
    return found[0]
