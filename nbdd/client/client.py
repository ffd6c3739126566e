# SPDX-License-Identifier: MIT
"""Client: the device side of one network block device.

Its methods are those of the Perl module Linux::NBD::Client, on today's kernel: see docs/client.md. The kernel owns the
data path of a bound device; a service process, where there is one, only waits for the end.
"""

from __future__ import annotations

import os
import re
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from types import EllipsisType
from typing import TYPE_CHECKING, Self, TypeAlias

from nbdd.errors import (
    AlreadyAttached,
    Busy,
    ConnectFailed,
    InvalidArgs,
    KernelError,
    NbddError,
    NotAttached,
    NotRead,
    TimedOut,
)
from nbdd.kernel import (
    LinkDeadMonitor,
    NetlinkNBD,
    Node,
    ServerFlags,
    Usage,
    find,
    identify,
    let_udev_finish,
    release,
    settle,
)
from nbdd.kernel.sockets import check_socket, hung_up, unread

if TYPE_CHECKING:
    from nbdd.client.service import End, Service, Stop

MIN_BLOCK_SIZE = 512
"""Bytes; the kernel counts in sectors of this size."""

MAX_SIZE = 2**63 - 1
"""Bytes; the kernel's loff_t."""

MAX_TIMEOUT = 2_000_000
"""Seconds, 23 days. The kernel keeps time limits as 32 bits of its clock ticks: one far above would come out short."""

MAX_BACKEND = 255
"""Bytes of an identifier."""

END_SECONDS = 10.0
"""How long the end of a device may take: whoever has it open must close it first."""

SETTLE_SECONDS = 15.0
"""For udev to have done with a device that came or changed; what hangs for so long is not usable."""

UNREAD_SECONDS = 0.5
"""After which an answer that is still there counts as one that the kernel does not read; else it does so at once."""

Socket: TypeAlias = socket.socket
"""By this name, since Client.socket hides the module."""


class Client:
    """The device side of one network block device: it makes a /dev/nbdX of connected sockets.

    Usable by root, without the daemon. Six lines make a disk of an NBD URI and take it away again:

        from nbdd import Client, connect

        disk = connect("nbd://storage.example/backup")
        client = Client(socket=disk.sockets, blocksize=disk.blocksize, size=disk.size, flags=disk.flags)
        client.run_async()
        print(client.device())  # /dev/nbd0: use it
        client.kill_async()

    The keywords `socket`, `device`, `timeout`, `blocksize`, `blocks` and `size` call the method of that name, perhaps
    with "set_" before it. The others:

    `backend`: the identifier that the kernel keeps with the device, by which any process finds it again. One that is a
    name for nbdd (letters, digits, "._:-") gives the device a link /dev/disk/by-nbd/NAME. Without it the client makes
    one up.
    `flags`: the transmission flags of the NBD protocol, as the server said them; those that the kernel doesn't know
    are left out. `read_only`: no writes, whatever the flags say.
    `dead_timeout`: seconds that I/O waits for a new socket when the last has died; 0 fails it at once. None is 0 for
    a device that is bound, and leaves one that is adopted as it is.
    `io_timeout`: milliseconds between two looks of the kernel whether a request's link was replaced, which is when what
    was lost with the old one is sent again. It counts while no `timeout` is set, and is for a device of one socket
    that is given new ones: with several, a link would be given up over a request that takes so long. None leaves it
    at the kernel's 30 s.

    Sizes in bytes, times in seconds. Nothing reaches the kernel before `run`, `run_async` or `bind`; from then on the
    set methods act on the device at once. Where the kernel refuses, a `KernelError` says why; values out of range are
    `InvalidArgs`; all errors are an `nbdd.errors.NbddError`. Not for several threads.

    A client that is closed, left as a context manager, or dropped ends the service that it started with `run_async`,
    and frees that device. What it bound with `bind`, or adopted, stays: the kernel serves it without any process.
    """

    def __init__(
        self,
        backend: str | None = None,
        *,
        socket: Socket | list[Socket] | tuple[Socket, ...] | None = None,
        device: str | os.PathLike[str] | None = None,
        timeout: int = 0,
        blocksize: int = MIN_BLOCK_SIZE,
        blocks: int | None = None,
        size: int | None = None,
        flags: int = 0,
        read_only: bool = False,
        dead_timeout: int | None = None,
        io_timeout: int | None = None,
    ) -> None:
        self.node: Node | None = None
        if backend is not None:
            _check_backend(backend)
        # No udev rule makes a link of a name that begins like this, and the daemon takes it for nobody's.
        self.backend = f"@nbdd-{os.urandom(8).hex()}" if backend is None else backend
        self._named = backend is not None
        self._netlink: NetlinkNBD | None = None
        self._netlink_pid = 0
        self._service: Service | None = None
        self._finalizer: weakref.finalize[[], Client] | None = None
        self._index: int | None = None
        # What the node said of itself when it was ours; an index is recycled, and the kernel asks for no identity.
        self._bound_as: str | None = None
        self._diskseq: int | None = None
        self._pid: int | None = None
        _whole("Transmission flags", flags, 0, 0xFFFF, "bits")
        self._flags = flags | ServerFlags.HAS_FLAGS | (ServerFlags.READ_ONLY if read_only else 0)
        self._block_size = MIN_BLOCK_SIZE
        self._size = 0
        self._timeout = 0
        self._dead_timeout = dead_timeout
        if dead_timeout is not None:
            _whole("A dead timeout", dead_timeout, 0, MAX_TIMEOUT, "s")
        self._io_timeout = io_timeout
        if io_timeout is not None:
            _whole("An I/O timeout", io_timeout, 1, MAX_TIMEOUT * 1000, "ms")
        self._sockets: list[Socket] = []
        self.device(device)
        self.set_timeout(timeout)
        self.set_blocksize(blocksize)
        if blocks is not None:
            self.set_blocks(blocks)
        if size is not None:
            self.set_size(size)
        # Last: they are the client's from here on, and the caller's as long as anything above was refused.
        self.socket(socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the service that this client started, if any; let go of all else: a device that was only bound stays.

        Closes the sockets. May be called twice. Raises Busy as `kill_async` does.
        """
        try:
            self.kill_async()
        finally:
            self._close_sockets()
            self._drop_netlink()

    # The methods of the manual

    def socket(self, new: Socket | list[Socket] | tuple[Socket, ...] | EllipsisType | None = ...) -> Socket | None:
        """Return the current socket, after setting a new one if there is an argument; None where there is none.

        It must be a connected stream socket, TCP or Unix (a socket pair as well), on which the transmission phase of
        the NBD protocol comes next. Several, one for each connection, are given as a list or tuple; the first is
        returned then, and `sockets` has all. The client closes its sockets at the end of `run`, in `kill_async` and in
        `close`.

        None takes the sockets away again, unclosed.

        On a device that `bind` made or `adopt` took over, the new sockets take the place of the dead ones. A service,
        and a device whose links all live, refuse them: Busy.

        Raises InvalidArgs (anything else than such a socket), ConnectFailed (its other end has hung up).
        """
        if not isinstance(new, EllipsisType):
            if new is None:
                self._set_sockets([])
            elif isinstance(new, (list, tuple)) and not new:
                raise InvalidArgs("An empty list is no socket; None takes the sockets away.")
            else:
                self._set_sockets(list(new) if isinstance(new, (list, tuple)) else [new])
        return self._sockets[0] if self._sockets else None

    def device(self, new: str | os.PathLike[str] | EllipsisType | None = ...) -> str:
        """Return the device node, such as "/dev/nbd2", after setting another one if there is an argument.

        None leaves the choice to the kernel: it takes a free device, or makes one, in the same moment in which it
        binds it, so that nobody can be quicker. Until then, and after the end, "" is returned.

        A link to a node, as in /dev/disk/by-nbd, is followed. Whether the node is free turns out when it is bound:
        Busy then, or NoFreeDevice where the kernel should have chosen. Raises InvalidArgs (not an NBD device),
        AlreadyAttached (while it is bound).
        """
        bound = self._current()
        if not isinstance(new, EllipsisType):
            if bound is not None:
                raise AlreadyAttached(f"The client is bound to {bound.path}; it can't take another device meanwhile.")
            self._index = None if new is None else _index_of(new)
        if bound is None and self._index is not None:
            bound = Node(self._index)
        return "" if bound is None else bound.path

    def disconnect(self, *, seconds: float = END_SECONDS, force: bool = False) -> list[str]:
        """End the device with a disconnect message to the server, and wait until it is free.

        Works from any process: a client that did not bind a device itself ends the one that it names, by `device` or
        by `backend`; a `run` that serves it returns. It is checked first that the device is still the one that was
        bound, or named, and that nobody uses it: Busy tells who does, unless `force`. Then what they have not written
        is lost, and the node is free when the last of them has closed it; those left after `seconds` are returned.

        Raises NotAttached (nothing is bound, or something else by now), Busy, TimedOut, KernelError.
        """
        _seconds("How long to wait", seconds)
        node = self.node or self.adopt()
        left = release(
            self._kernel(),
            node,
            self._bound_as,
            seconds,
            diskseq=self._diskseq,
            pid=self._pid,
            force=force,
            nudge=self._shut_down,
        )
        self.node = None
        if self._service is not None:
            # It sees the end as well, and has nothing left to do; unless somebody keeps the device.
            self._service.ended(0 if left else END_SECONDS)
            self._end_service()
            self._close_sockets()
        return left

    def clear_queue(self) -> None:
        """Do nothing: the kernel clears the request queue of a device by itself, at its end and with a new socket.

        Kept for programs that call it before `socket`, as the manual wants. The kernel's own call, NBD_CLEAR_QUE, has
        no effect any more either.
        """

    def set_timeout(self, seconds: int) -> None:
        """Set the request timeout: how many seconds a request may take before its link is given up; 0 is no limit.

        From 0 to 2,000,000 (23 days); also while the device is in use, without a pause in its I/O. A service ends when
        its last link is given up. Raises InvalidArgs, and KernelError, NotAttached, TimedOut where a device is bound.
        """
        seconds = _whole("A timeout", seconds, 0, MAX_TIMEOUT, "s")
        if self.node is not None:
            index = self._still_ours().index
            self._kernel().reconfigure(index, backend=self._bound_as, timeout=seconds, dead_timeout=self._dead_timeout)
        self._timeout = seconds
        if self.node is not None:
            self._pace(self.node)

    def set_blocksize(self, size: int) -> None:
        """Set the block size in bytes: a power of two from 512 to the page size (to 65536 from Linux 6.15 on).

        It is the smallest unit that programs can read and write. Rounds the size of the device down to a multiple.
        On a bound device it needs nobody to use it, Busy otherwise: what they have cached is in blocks of the old
        size. Raises InvalidArgs, and what `set_size` raises.
        """
        limit = largest_block_size()
        size = _whole("A block size", size, MIN_BLOCK_SIZE, limit, "bytes")
        if size & (size - 1):
            raise InvalidArgs(f"A block size of {size} bytes can't be set: it must be a power of two.")
        self._resize(self._size, size)

    def set_blocks(self, number: int) -> None:
        """Set the size of the device, in blocks of the block size. See `set_size`."""
        block_size = self._current_block_size()
        number = _whole("A size", number, 1, MAX_SIZE // block_size, f"blocks of {block_size} bytes")
        self._resize(number * block_size, block_size)

    def set_size(self, size: int) -> None:
        """Set the size of the device in bytes, rounded down to a multiple of the block size.

        From one block to 2^63 - 1 bytes. A bound device grows at once, whoever uses it; it shrinks only while nobody
        does. That the server has so many bytes is not checked: what is beyond its end fails.
        Raises InvalidArgs; where a device is bound: Busy, NotAttached, ConnectFailed (its link is dead), KernelError.
        """
        self._resize(_whole("A size", size, 1, MAX_SIZE, "bytes"), self._current_block_size())

    def run(self, *, close_fds: bool = False) -> End:
        """Bind the device, serve it, and return when that is over, with the reason; the device is free then.

        It ends when somebody disconnects the device (`disconnect`, or any other program), when the server dies or the
        last link to it, or on SIGINT, SIGTERM or SIGHUP. A signal that the program handles itself or ignores is left
        to it. To know the moment from which the device can be used, use `run_async`.

        With `close_fds` every descriptor of the process is closed first, but for 0 to 2 and what the client needs, as
        the manual says of `run`. That is for a process that does nothing else: files that other parts of it have open
        break. `run_async` always does so, in its child.

        Raises Busy, NoFreeDevice, AlreadyAttached, InvalidArgs (no socket), KernelError, TimedOut.
        """
        from nbdd.client.service import Stop  # noqa: PLC0415
        from nbdd.ipc.channel import close_all_but  # noqa: PLC0415 - only who serves pays for them

        self._prepare()
        if close_fds:
            self._drop_netlink()
            close_all_but(*(sock.fileno() for sock in self._sockets))
        with Stop() as stop:
            return self._serve(stop, lambda _node: None)

    def run_async(self) -> int:
        """Do what `run` does in a child process, and return its process id once the device is bound and usable.

        The child has no descriptor open but 0 to 2 and what it needs. It ends with this client, `kill_async` or
        `close` at the latest, and also when this process is killed. Its exit status says why it ended: 0 disconnected,
        1 the server died, 2 an error, 128 and the signal's number for a signal.

        It is a fork: call it before the program starts threads. Raises what `run` raises, as the child met it, and
        WorkerFailed where the child was killed over it; the device is free then.
        """
        from nbdd.client.service import Service  # noqa: PLC0415

        self._prepare()
        self._drop_netlink()
        service = Service.start(self.backend, self._sockets, self._serve)
        try:
            node, self._diskseq, self._pid = service.bound()
        except BaseException:
            service.end()
            if self._cut_off():
                # It was in the kernel's hands already, and is of no more use.
                self._close_sockets()
            raise
        self.node, self._bound_as = node, self.backend
        self._service = service
        # A copy of this client in a forked child ends nothing.
        self._finalizer = weakref.finalize(self, service.drop)
        # Not at the program's end: what it has open is closed, and so written, after that. Then the child sees it end.
        self._finalizer.atexit = False
        return service.pid

    def kill_async(self) -> None:
        """Kill the service that `run_async` started, whatever it does, and free its device. Without one, do nothing.

        Also the thing to do when the service died, or was killed by others. The sockets are gone afterwards: set new
        ones. Writes that are not yet at the server are lost, as with `disconnect(force=True)`.

        Raises Busy where somebody still has the node open after 10 s: it is disconnected, and free when they leave.
        """
        if self._service is None:
            return
        left = self._end_service()
        self._close_sockets()
        if left:
            raise Busy(f"The device is disconnected, and its node is taken until they leave: {'; '.join(left)}.")

    # What run and run_async are made of, for those who look after a device themselves

    @property
    def sockets(self) -> Sequence[Socket]:
        """The device's links, as far as this process has their descriptors."""
        return self._sockets

    def bind(self, index: int | None = None, *, usable_within: float = SETTLE_SECONDS) -> Node:
        """Bind the sockets to /dev/nbdX, or to a free device, and wait until it is usable. It needs no process then.

        Usable: it has its size, its partitions are there, udev has made its links. A device that can't be read
        within `usable_within` seconds is unbound again and TimedOut raised, or ConnectFailed where the server hung up.
        Raises Busy, NoFreeDevice, KernelError; of several sockets NotRead, where the kernel reads only some of them.
        That is rare, on a machine that is slow or very busy just then, and new sockets may be all it takes: each link
        has a work item of the kernel's that never ends, and where the kernel has too few threads for all of them at
        once, and makes none within 10 ms, it leaves those that wait to a single one (drivers/block/nbd.c, recv_work;
        kernel/workqueue.c, rescuer_thread). The threads that it has made too late are there for the next attempt.
        """
        if (bound := self._current()) is not None:
            raise AlreadyAttached(f"The client is bound to {bound.path} already.")
        self._check_complete()
        try:
            node = self._connect(index)
            self._make_usable(node, usable_within)
        except BaseException:
            if self.node is not None:
                # The server may not answer any more; with the links down, what waits for it fails at once.
                self._shut_down()
                self._unbind(self.node)
            raise
        return node

    def adopt(
        self,
        index: int | None = None,
        *,
        diskseq: int | None = None,
        pid: int | None = None,
        sockets: Sequence[Socket] = (),
    ) -> Node:
        """Take over a device that is bound, as it is; raises NotAttached where it is not, or not under our identifier.

        Without an `index` it is the one that was named by `device` or is found by `backend`. A client that was given
        no identifier takes whatever is bound there. `diskseq` and `pid` are what `Node` said of it when it was bound,
        to tell it from a later one. `sockets` are duplicates of its links, if somebody kept them.
        """
        if self._service is not None or self._current() is not None:
            shown = self.node.path if self.node is not None else "a device"
            raise AlreadyAttached(f"The client is bound to {shown} already.")
        node = self._named_device() if index is None else Node(index)
        bound_as = self.backend if self._named else node.backend
        identify(node, bound_as, diskseq, pid)
        self.node, self._bound_as = node, bound_as
        self._diskseq, self._pid = node.diskseq, node.pid
        self._size, self._block_size = node.size, 0
        self._sockets = list(sockets)
        return node

    def replace_links(self, sockets: Sequence[Socket]) -> None:
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
        self._sockets.extend(sockets)

    def set_dead_timeout(self, seconds: int) -> None:
        """Set how long I/O waits without a live link, in seconds; 0 fails it at once. Live on a bound device."""
        _whole("A dead timeout", seconds, 0, MAX_TIMEOUT, "s")
        self._dead_timeout = seconds
        if self.node is not None:
            node = self._still_ours()
            self._kernel().reconfigure(node.index, backend=self._bound_as, dead_timeout=seconds)

    def drop_link(self, sock: Socket) -> None:
        """Forget a dead link's descriptor."""
        self._sockets.remove(sock)
        sock.close()

    def claims(self) -> list[str]:
        """Who has the device mounted, swapped on or stacked upon, in sentences; asks nothing of the device itself."""
        return Usage().claims(self._bound())

    def link_dead(self) -> LinkDeadMonitor:
        """The kernel's own word about dying links, for devices whose links nobody here holds."""
        return self._kernel().link_dead()

    # Inside

    def _connect(self, index: int | None) -> Node:
        """Have the kernel bind the sockets."""
        known = find(self.backend) if self._named else []
        try:
            found = self._kernel().connect(
                fds=[sock.fileno() for sock in self._sockets],
                size=self._size,
                block_size=self._current_block_size(),
                server_flags=self._flags,
                timeout=self._timeout,
                dead_timeout=self._dead_timeout or 0,
                backend=self.backend,
                index=self._index if index is None else index,
            )
            node = self.node = Node(found)
            self._bound_as, self._diskseq, self._pid = self.backend, node.diskseq, node.pid
            self._pace(node)
            return node
        except TimedOut:
            self._shut_down()
            raise
        except NbddError:
            raise
        except BaseException:
            # Interrupted: the device may be bound all the same.
            self._shut_down()
            for node in find(self.backend):
                if node not in known:
                    self._unbind(node)
            raise

    def pace(self) -> None:
        """Have the kernel look as often as `io_timeout` says, on an adopted device; not while a link is dead."""
        self._pace(self._bound())

    def _pace(self, node: Node) -> None:
        """Have the kernel look as often as was asked for. Requests that it has got already keep their 30 s."""
        if self._io_timeout is not None and not self._timeout and node.io_timeout != self._io_timeout:
            # A server that keeps it waiting is not for this to find out.
            with suppress(TimedOut):
                node.set_io_timeout(self._io_timeout)

    def _make_usable(self, node: Node, seconds: float) -> None:
        """Wait until it has its size, its partitions and udev's links.

        ConnectFailed where all links are gone; NotRead where the kernel leaves some unread.
        """
        left = False

        def give_up() -> None:
            nonlocal left
            if not left and self._left_unread():
                left = True
                self._shut_down()
            # What was sent to a server that died meanwhile is never answered.
            if self._cut_off() and node.bound:
                self._kernel().disconnect(node.index)

        try:
            settle(node, seconds, nudge=give_up)
        except NbddError:
            if not left:
                raise
        if left:
            raise NotRead(
                f"The kernel does not read from all {len(self._sockets)} links of {node.path}, for want of threads at "
                "this moment."
            )
        if self._cut_off():
            raise ConnectFailed(f"The server hung up while {node.path} was being made usable.")

    def _kernel(self) -> NetlinkNBD:
        if self._netlink is not None and self._netlink_pid != os.getpid():
            # A fork of the program: two processes can't share one, each would take the other's answers.
            self._drop_netlink()
        if self._netlink is None:
            self._netlink = NetlinkNBD()
            self._netlink_pid = os.getpid()
        return self._netlink

    def _drop_netlink(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def _bound(self) -> Node:
        if self.node is None:
            raise NotAttached(f"{self.backend!r} is not bound to any device.")
        return self.node

    def _still_ours(self) -> Node:
        """The node, if it is what it was. The kernel compares identifiers only where the device has one."""
        node = self._bound()
        identify(node, self._bound_as, self._diskseq, self._pid)
        return node

    def _current(self) -> Node | None:
        """The node, or None where none is bound, or not any more."""
        with suppress(NotAttached):
            return self._still_ours()
        self.node = None
        return None

    def _named_device(self) -> Node:
        if self._index is not None:
            return Node(self._index)
        found = find(self.backend)
        if len(found) > 1:
            raise Busy(f"{self.backend!r} is bound to {' and '.join(node.path for node in found)}; name the device.")
        if not found:
            raise NotAttached(f"{self.backend!r} is not bound to any device, and no device was named.")
        return found[0]

    def _set_sockets(self, new: list[Socket]) -> None:
        for sock in new:
            check_socket(sock)
        node = self._current()
        if node is not None:
            self._renew_sockets(node, new)
            return
        if self._service is not None:
            self._end_service()
            self._close_sockets()
        self._sockets = new

    def _renew_sockets(self, node: Node, new: list[Socket]) -> None:
        dead = [sock for sock in self._sockets if hung_up(sock)]
        if self._service is not None or (self._sockets and not dead):
            raise Busy(f"{node.path} is in use with the socket that it has; disconnect it first.")
        if len(new) > max(len(dead), 1):
            raise InvalidArgs(f"{len(new)} sockets can't take the place of {max(len(dead), 1)}.")
        # The others stay dead, for sockets that come later.
        for sock in dead[: len(new)]:
            self.drop_link(sock)
        if new:
            self.replace_links(new)

    def _current_block_size(self) -> int:
        # That of a device that was adopted is read when it is wanted, and not before: from Linux 6.12 on, whoever reads
        # below queue/ waits for a write there, which waits for what is under way, which may wait for the very link that
        # the device was adopted to be given.
        if not self._block_size:
            self._block_size = self._bound().block_size
        return self._block_size

    def _resize(self, size: int, block_size: int) -> None:
        """Take a new geometry, and have the kernel take it where a device is bound. A size of 0 was never set."""
        rounded = size - size % block_size
        if size and not rounded:
            raise InvalidArgs(f"{size} bytes don't fill one block of {block_size} bytes.")
        if self.node is not None:
            node = self._still_ours()
            # What others hold cached, or rely on, would be beyond the end, or in blocks of another size.
            takes_away = rounded < node.size or block_size != node.block_size
            usage = Usage()
            with usage.claim(node, patience=1.0) if takes_away else nullcontext():
                let_udev_finish(node, usage)
                # Last, as the kernel would wait for what this link carried, and let nobody give it another one.
                if any(hung_up(sock) for sock in self._sockets):
                    raise ConnectFailed(f"The size of {node.path} can't be changed while a link to its server is dead.")
                self._kernel().reconfigure(node.index, backend=self._bound_as, size=rounded, block_size=block_size)
            # udev looks at the device again. Whoever opens it while it is open works with the block size that it had
            # when it was opened first (block/bdev.c), and gets errors.
            settle(node, SETTLE_SECONDS, new=False)
            if (node.size, node.block_size) != (rounded - rounded % MIN_BLOCK_SIZE, block_size):
                raise KernelError(
                    f"The kernel was asked for {rounded} bytes in blocks of {block_size} on {node.path}, and has "
                    f"{node.size} in blocks of {node.block_size}."
                )
        self._size, self._block_size = rounded, block_size

    def _prepare(self) -> None:
        """Refuse to serve what is served already, and what can't be served."""
        if (bound := self._current()) is not None:
            raise AlreadyAttached(f"The client is bound to {bound.path} already.")
        if self._service is not None:
            self._end_service()
            self._close_sockets()
        self._check_complete()
        if self._named and (found := find(self.backend)):
            raise Busy(f"{found[0].path} is bound as {self.backend!r} already. Take another name, or disconnect it.")

    def _check_complete(self) -> None:
        if not self._sockets:
            raise InvalidArgs(
                "There is no socket to serve; set one first, with socket(). Those of a service that has ended are gone."
            )
        if not self._size:
            raise InvalidArgs("The size of the device is not known; set it first, with set_size() or set_blocks().")
        for sock in self._sockets:
            check_socket(sock)

    def _serve(self, stop: Stop, bound: Callable[[Node], None]) -> End:
        """Bind, wait for the end, free the device."""
        from nbdd.client.service import watch  # noqa: PLC0415

        # Before the device is there, to miss no link that dies.
        with self.link_dead() as reports:
            node = self._connect(None)
            try:
                try:
                    self._make_usable(node, SETTLE_SECONDS)
                    bound(node)
                except NbddError:
                    # It may have been disconnected already: then `watch` knows.
                    if not self._cut_off():
                        raise
                return watch(node, lambda: self._current() is not None, self._sockets, reports, stop)
            finally:
                if (left := self._current()) is not None:
                    self._unbind(left)
                self._close_sockets()

    def _end_service(self) -> list[str]:
        """Kill and reap it, free its device; returns who still has that open."""
        # Interrupted, it can be done again.
        left = self._service.end() if self._service is not None else []
        self._service = self.node = None
        if self._finalizer is not None:
            self._finalizer.detach()
        return left

    def _unbind(self, node: Node) -> None:
        """Take a device away again that could not be made usable, or whose service is over."""
        if not self._cut_off():
            let_udev_finish(node, Usage())
        with suppress(NotAttached):
            release(self._kernel(), node, self.backend, END_SECONDS, force=True, nudge=self._shut_down)
        self.node = None

    def _left_unread(self) -> bool:
        """Whether an answer stays where it is, on one of several sockets."""
        before = [unread(sock) for sock in self._sockets]
        if len(before) < 2 or not any(before):
            return False
        time.sleep(UNREAD_SECONDS)
        return any(one and one == unread(sock) for one, sock in zip(before, self._sockets, strict=True))

    def _cut_off(self) -> bool:
        return all(hung_up(sock) for sock in self._sockets)

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    def _shut_down(self) -> None:
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def largest_block_size() -> int:
    """Bytes: the page size, and 64 KiB from Linux 6.15 on (BLK_MAX_BLOCK_SIZE)."""
    major, minor = (int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    return max(os.sysconf("SC_PAGE_SIZE"), 65536 if (major, minor) >= (6, 15) else 0)


def _check_backend(backend: object) -> None:
    # The kernel shows it in a page of sysfs: Linux 6.1 writes a longer one beyond the page's end, and what reads like
    # something else there is not found again.
    if not isinstance(backend, str) or not backend.isprintable() or not 0 < len(backend.encode()) <= MAX_BACKEND:
        shown = repr(backend)[:80]
        raise InvalidArgs(
            f"{shown} is no identifier: it is a text of 1 to {MAX_BACKEND} bytes without control characters. "
            "Leave it out, and one is made up."
        )


def _seconds(what: str, seconds: float) -> float:
    """The number, or InvalidArgs where it is no time to wait."""
    given: object = seconds
    if not isinstance(given, (int, float)) or not 0 <= given <= MAX_TIMEOUT:
        raise InvalidArgs(f"{what} is a number of seconds from 0 to {MAX_TIMEOUT}, not {seconds!r}.")
    return seconds


def _whole(what: str, number: int, least: int, most: int, unit: str) -> int:
    """The number, or InvalidArgs where it is not in the range, or is none."""
    given: object = number
    if not isinstance(given, int) or isinstance(given, bool):
        raise InvalidArgs(f"{what} is a whole number of {unit}, not {number!r}.")
    if not least <= number <= most:
        raise InvalidArgs(f"{what} of {number} {unit} can't be set; it goes from {least} to {most}.")
    return number


def _index_of(path: str | os.PathLike[str]) -> int:
    """X of /dev/nbdX."""
    given: object = os.fspath(path) if isinstance(path, os.PathLike) else path
    real = os.path.realpath(given) if isinstance(given, str) and "\0" not in given else ""
    found = re.fullmatch(r"/dev/nbd(0|[1-9][0-9]{0,6})", real)
    if found is None:
        raise InvalidArgs(f"{given!r} is not an NBD device; name one such as /dev/nbd0, or none to get a free one.")
    return int(found[1])
