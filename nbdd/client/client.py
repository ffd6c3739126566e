# SPDX-License-Identifier: MIT
"""Client: the device side of one network block device, for programs.

Its methods are those of the Perl module Linux::NBD::Client, on today's kernel: see docs/client.md. They are a face of
`nbdd.kernel.binding.KernelDevice`, with a service process for `run_async`. The kernel does all I/O of a
bound device; the service process only waits for the end.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Sequence
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Self, TypeAlias

from nbdd.errors import AlreadyAttached, Busy, InvalidArgs
from nbdd.kernel.arguments import check_integer, check_seconds
from nbdd.kernel.binding import END_SECONDS, KernelDevice
from nbdd.kernel.node_name import node_index, node_path
from nbdd.kernel.sockets import check_socket, hung_up
from nbdd.kernel.sysfs import find
from nbdd.kernel.usable import SETTLE_SECONDS
from nbdd.limits import MAX_SIZE, MIN_BLOCK_SIZE

if TYPE_CHECKING:
    from nbdd.client.service import End, Service
    from nbdd.kernel.connection_watch import LinkDeadMonitor
    from nbdd.kernel.sysfs import Node

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
    `dead_timeout`: seconds that I/O waits for a new socket when the last one has died; 0 fails it at once. None is 0
    for a device that is bound, and leaves one that is adopted as it is.
    `io_timeout`: milliseconds between two checks of the kernel whether the connection of a request was replaced; then
    the request is sent again. In force while no `timeout` is set. It is for a device of one socket: with several, the
    kernel would give up the connection of a request that takes so long. None leaves it at the kernel's 30 s.

    Sizes in bytes, times in seconds. Nothing reaches the kernel before `run`, `run_async` or `bind`; from then on the
    set methods act on the device at once. If the kernel refuses, a `KernelError` says why; values out of range are
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
        self._device = KernelDevice(
            backend,
            timeout=timeout,
            block_size=blocksize,
            flags=flags,
            read_only=read_only,
            dead_timeout=dead_timeout,
            io_timeout=io_timeout,
        )
        self._index: int | None = None
        self._service: Service | None = None
        self._finalizer: weakref.finalize[[], Client] | None = None
        self.device(device)
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
        """End the service that this client started, if any, and close the sockets. A device that was only bound stays.

        May be called twice. Raises Busy as `kill_async` does.
        """
        try:
            self.kill_async()
        finally:
            self._device.close()

    # The methods of the manual

    def socket(self, new: Socket | list[Socket] | tuple[Socket, ...] | EllipsisType | None = ...) -> Socket | None:
        """Return the current socket, after setting a new one if there is an argument; None if there is none.

        It must be a connected stream socket, TCP or Unix (a socket pair as well), on which the transmission phase of
        the NBD protocol comes next. Several, one for each connection, are given as a list or tuple; the first is
        returned then, and `sockets` has all. The client closes its sockets at the end of `run`, in `kill_async` and in
        `close`.

        None takes the sockets away again, unclosed. On a device that `bind` made or `adopt` took over, new sockets
        replace the dead ones. A service, and a device whose connections all live, refuse them: Busy.

        Raises InvalidArgs (anything else than such a socket), ConnectFailed (its other end has hung up).
        """
        if not isinstance(new, EllipsisType):
            self._set_sockets(_socket_list(new))
        return self.sockets[0] if self.sockets else None

    def device(self, new: str | os.PathLike[str] | EllipsisType | None = ...) -> str:
        """Return the device node, such as "/dev/nbd2", after setting another one if there is an argument.

        None leaves the choice to the kernel: it takes a free device, or makes one, in the same moment in which it
        binds it, so that no other program can be quicker. Until then, and after the end, "" is returned.

        A link to a node, as in /dev/disk/by-nbd, is followed. Whether the node is free turns out when it is bound:
        Busy then, or NoFreeDevice if the kernel should have chosen. Raises InvalidArgs (not an NBD device),
        AlreadyAttached (while it is bound).
        """
        bound = self._device.current()
        if not isinstance(new, EllipsisType):
            if bound is not None:
                raise AlreadyAttached(f"The client is bound to {bound.path}; it can't take another device meanwhile.")
            self._index = None if new is None else _index_of(new)
        if bound is not None:
            return bound.path
        return "" if self._index is None else node_path(self._index)

    def disconnect(self, *, seconds: float = END_SECONDS, force: bool = False) -> list[str]:
        """End the device with a disconnect message to the server, and wait until it is free.

        Works from any process: a client that did not bind a device itself ends the one that it names, by `device` or
        by `backend`; a `run` that serves it returns. It is checked first that the device is still the one that was
        bound, or named, and unused: Busy names the users, unless `force`. Then what they have not written
        is lost, and the node is free when the last of them has closed it; those left after `seconds` are returned.

        Raises NotAttached (nothing is bound, or something else by now), Busy, TimedOut, KernelError.
        """
        check_seconds("How long to wait", seconds)
        if self.node is None:
            self.adopt()
        left = self._device.disconnect(seconds=seconds, force=force)
        if self._service is not None:
            # It sees the end as well, and has nothing left to do; unless somebody keeps the device.
            self._service.ended(0 if left else END_SECONDS)
            self._end_service()
        return left

    def clear_queue(self) -> None:
        """Do nothing: the kernel clears the request queue of a device by itself, at its end and with a new socket.

        Kept for programs that call it, as the manual wants. The kernel's own call, NBD_CLEAR_QUE, does nothing either.
        """

    def set_timeout(self, seconds: int) -> None:
        """Set the request timeout: how many seconds a request may take before its connection is given up; 0 is none.

        From 0 to 2,000,000 (23 days); also while the device is in use, without a pause in its I/O. A service ends when
        its last connection is given up. Raises InvalidArgs; on a bound device KernelError, NotAttached, TimedOut.
        """
        self._device.set_timeout(seconds)

    def set_blocksize(self, size: int) -> None:
        """Set the block size in bytes: a power of two from 512 to the page size (to 65536 from Linux 6.15 on).

        It is the smallest unit that programs can read and write. Rounds the size of the device down to a multiple.
        Raises Busy if somebody uses a bound device: what they have cached is in blocks of the old size.
        Raises InvalidArgs, and what `set_size` raises.
        """
        self._device.set_block_size(size)

    def set_blocks(self, number: int) -> None:
        """Set the size of the device, in blocks of the block size. See `set_size`."""
        block_size = self._device.block_size
        number = check_integer("A size", number, 1, MAX_SIZE // block_size, f"blocks of {block_size} bytes")
        self._device.set_size(number * block_size)

    def set_size(self, size: int) -> None:
        """Set the size of the device in bytes, rounded down to a multiple of the block size.

        From one block to 2^63 - 1 bytes. A bound device grows at once, whoever uses it; it shrinks only while nobody
        does. That the server has so many bytes is not checked: what is beyond its end fails.
        Raises InvalidArgs; on a bound device Busy, NotAttached, ConnectFailed (a connection is dead), KernelError.
        """
        self._device.set_size(size)

    def run(self, *, close_fds: bool = False) -> End:
        """Bind the device, serve it, and return when that is over, with the reason; the device is free then.

        It ends when somebody disconnects the device (`disconnect`, or any other program), when the server or the last
        connection to it dies, or on SIGINT, SIGTERM or SIGHUP; a signal that the program handles itself or ignores is
        left to it. `run_async` says when the device can be used.

        With `close_fds` every descriptor of the process is closed first, but for 0 to 2 and what the client needs, as
        the manual wants. That is for a process that does nothing else: files that other parts of it have open break.

        Raises Busy, NoFreeDevice, AlreadyAttached, InvalidArgs (no socket), KernelError, TimedOut.
        """
        from nbdd.client.service import Stop, serve  # noqa: PLC0415 - only who serves pays for them
        from nbdd.ipc.processes import close_all_but  # noqa: PLC0415

        self._prepare()
        if close_fds:
            self._device.close_netlink()
            close_all_but(*(sock.fileno() for sock in self.sockets))
        with Stop() as stop:
            return serve(self._device, stop, lambda _node: None, index=self._index)

    def run_async(self) -> int:
        """Do what `run` does in a child process, and return its process id once the device is bound and usable.

        The child has no descriptor open but 0 to 2 and what it needs. It ends with this client, `kill_async` or
        `close` at the latest, and also when this process is killed. Its exit status says why it ended: 0 disconnected,
        1 the server died, 2 an error, 128 and the signal's number for a signal.

        It is a fork: call it before the program starts threads. Raises what `run` raises, as the child met it, and
        WorkerFailed if the child was killed meanwhile; the device is free then.
        """
        from nbdd.client.service import Service, serve  # noqa: PLC0415 - only who serves pays for them

        self._prepare()
        self._device.close_netlink()
        service = Service.start(self.backend, self.sockets, partial(serve, self._device, index=self._index))
        try:
            bound = service.bound()
        except BaseException:
            service.end()
            if self._device.is_cut_off():
                # It was in the kernel's hands already, and is of no more use.
                self._device.close_sockets()
            raise
        self._device.bound_by_child(*bound)
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

        Raises Busy if somebody still has the node open after 10 s: it is disconnected, and free when they leave.
        """
        if self._service is None:
            return
        left = self._end_service()
        if left:
            raise Busy(f"The device is disconnected, and its node is taken until they leave: {'; '.join(left)}.")

    # For programs that look after a device themselves, without a service

    @property
    def backend(self) -> str:
        """The identifier that the kernel keeps with the device."""
        return self._device.backend

    @property
    def node(self) -> Node | None:
        """The node that is bound, with what the kernel says about it; None if none is."""
        return self._device.node

    @property
    def sockets(self) -> Sequence[Socket]:
        """The device's connections, as far as this process has their descriptors."""
        return self._device.sockets

    def bind(self, index: int | None = None, *, usable_within: float = SETTLE_SECONDS) -> Node:
        """Bind the sockets to /dev/nbdX, or to a free device, and wait until it is usable. It needs no process then.

        Usable: it has its size, its partitions are there, udev has made its symlinks. A device that can't be read
        within `usable_within` seconds is unbound again and TimedOut raised, or ConnectFailed if the server hung up.
        Raises AlreadyAttached, InvalidArgs (no socket, no size), Busy, NoFreeDevice, KernelError. Of several sockets
        ConnectionNotServiced, if the kernel reads only some of them: that is rare, and new sockets may be all it takes.
        """
        return self._device.bind(self._index if index is None else index, usable_within=usable_within)

    def adopt(
        self,
        index: int | None = None,
        *,
        diskseq: int | None = None,
        pid: int | None = None,
        sockets: Sequence[Socket] = (),
    ) -> Node:
        """Take over a device that is bound, as it is; raises NotAttached if it is not, or not under our identifier.

        Without an `index` it is the one that was named by `device` or is found by `backend`. A client that was given
        no identifier takes whatever is bound there. `diskseq` and `pid` are what `Node` said of it when it was bound,
        to tell it from a later one. `sockets` are duplicates of its connections, if somebody kept them.
        """
        if self._service is not None:
            raise AlreadyAttached(f"The client is bound to {self.node.path if self.node else 'a device'} already.")
        index = self._index if index is None else index
        return self._device.adopt(index, diskseq=diskseq, pid=pid, sockets=sockets)

    def replace_connections(self, sockets: Sequence[Socket]) -> None:
        """Give the kernel new sockets for its dead ones; raises NotAttached, KernelError, TimedOut."""
        self._device.replace_connections(sockets)

    def drop_connection(self, sock: Socket) -> None:
        """Close the descriptor of a dead connection and take it out of `sockets`."""
        self._device.drop_connection(sock)

    def set_dead_timeout(self, seconds: int) -> None:
        """Set how long I/O waits without a live connection, in seconds; 0 fails it at once. Live on a bound device."""
        self._device.set_dead_timeout(seconds)

    def claims(self) -> list[str]:
        """Who has the device mounted, swapped on or stacked upon, in sentences; asks nothing of the device itself."""
        return self._device.claims()

    def watch_connections(self) -> LinkDeadMonitor:
        """The kernel's own reports of connections that die, whichever process has their descriptors."""
        return self._device.watch_connections()

    # Inside

    def _set_sockets(self, new: list[Socket]) -> None:
        for sock in new:
            check_socket(sock)
        node = self._device.current()
        if node is not None:
            dead = [sock for sock in self.sockets if hung_up(sock)]
            if self._service is not None or (self.sockets and not dead):
                raise Busy(f"{node.path} is in use with the socket that it has; disconnect it first.")
            _replace_dead(self._device, dead, new)
            return
        if self._service is not None:
            self._end_service()
        self._device.sockets = new

    def _prepare(self) -> None:
        """Refuse to serve what is served already, and what can't be served."""
        if (bound := self._device.current()) is not None:
            raise AlreadyAttached(f"The client is bound to {bound.path} already.")
        if self._service is not None:
            self._end_service()
        self._device.check_complete()
        if self._device.has_name and (found := find(self.backend)):
            raise Busy(f"{found[0].path} is bound as {self.backend!r} already. Take another name, or disconnect it.")

    def _end_service(self) -> list[str]:
        """Kill and reap it, free its device, close its sockets; return who still has the device open."""
        # Interrupted, it can be done again.
        left = self._service.end() if self._service is not None else []
        self._service = self._device.node = None
        if self._finalizer is not None:
            self._finalizer.detach()
        self._device.close_sockets()
        return left


def _socket_list(new: Socket | list[Socket] | tuple[Socket, ...] | None) -> list[Socket]:
    if new is None:
        return []
    if not isinstance(new, (list, tuple)):
        return [new]
    if not new:
        raise InvalidArgs("An empty list is no socket; None takes the sockets away.")
    return list(new)


def _replace_dead(device: KernelDevice, dead: list[Socket], new: list[Socket]) -> None:
    """Replace as many dead connections as there are new sockets; the others stay dead, for sockets that come later."""
    if len(new) > max(len(dead), 1):
        raise InvalidArgs(f"{len(new)} sockets can't take the place of {max(len(dead), 1)}.")
    for sock in dead[: len(new)]:
        device.drop_connection(sock)
    if new:
        device.replace_connections(new)


def _index_of(path: str | os.PathLike[str]) -> int:
    """X of /dev/nbdX, or of a link to it."""
    given: object = os.fspath(path) if isinstance(path, os.PathLike) else path
    real = os.path.realpath(given) if isinstance(given, str) and "\0" not in given else ""
    index = node_index(real)
    if index is None:
        raise InvalidArgs(
            f"{given!r} is not an NBD device; name one such as {node_path(0)}, or none to get a free one."
        )
    return index
