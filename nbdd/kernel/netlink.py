# SPDX-License-Identifier: MIT
"""Netlink commands to the kernel's NBD driver: bind, change and disconnect a /dev/nbdX.

Source: drivers/block/nbd.c and include/uapi/linux/nbd-netlink.h. Every call is bounded in time and every errno
becomes a sentence. The module is not loaded from here; newer kernels load it themselves when the family is asked for
(Debian 13's does, Debian 12's doesn't).
"""

from __future__ import annotations

import errno
import os
import struct
import time
from typing import TYPE_CHECKING, Self

from nbdd.errors import Busy, KernelError, NoFreeDevice, NotAttached
from nbdd.kernel import genl, sysfs
from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.family import (
    FAMILY,
    GROUP,
    NBD_SOCK_FD,
    NBD_SOCK_ITEM,
    SERVER_FLAGS,
    VERSION,
    Attr,
    Cmd,
    ServerFlags,
)
from nbdd.kernel.usage import Usage
from nbdd.limits import BLK_MAX_BLOCK_SIZE, MAX_SIZE, MIN_BLOCK_SIZE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

COMMAND_SECONDS = 15.0
"""How long one command may take. It waits for the commands of others too: generic netlink runs one at a time."""
BUSY_SECONDS = 2.0
"""How long CONNECT is tried again on an index that somebody only opened: udev looks at every device it hears of."""
_BUSY_PAUSE = 0.05


class NetlinkNBD:
    """The one long-lived connection to the kernel's "nbd" family; one command at a time, one thread.

    Keep it open as long as the devices it made are managed. `sock` and `sysfs_root` are for tests.
    """

    def __init__(
        self, *, seconds: float = COMMAND_SECONDS, sock: socket.socket | None = None, sysfs_root: str = sysfs.SYSFS
    ) -> None:
        self._seconds = seconds
        self._sysfs = sysfs_root
        try:
            self._genl = genl.GenericNetlink(sock if sock is not None else genl.open_socket())
        except OSError as error:
            raise KernelError(f"No generic netlink socket: {genl.reason(error)}.", error.errno) from error
        try:
            self._family = self._genl.family(FAMILY, seconds)
        except OSError as error:
            self._genl.close()
            if error.errno == errno.ENOENT:
                raise KernelError(
                    "The kernel has no NBD driver loaded; load it with 'modprobe nbd'.", error.errno
                ) from error
            raise KernelError(
                f"The kernel doesn't say what its NBD driver offers: {genl.reason(error)}.", error.errno
            ) from error
        except BaseException:
            self._genl.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the netlink socket; bound devices live on."""
        self._genl.close()

    def connect(
        self,
        *,
        fds: Sequence[int],
        size: int,
        block_size: int,
        server_flags: int,
        timeout: int,
        dead_timeout: int,
        backend: str,
        index: int | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> int:
        """Bind negotiated sockets to a device and return its index (X of /dev/nbdX).

        Sizes in bytes, time limits in seconds. With `index` None the kernel picks a free device, or makes one.
        `timeout` 0 is no limit; `queue/io_timeout` is then left as it stands, so that it can be written before this
        call (on a named index) as well as after it: the value of an earlier use survives in the kernel.

        Raises Busy (a named index is taken), NoFreeDevice, KernelError, or TimedOut: then the device may still come
        up later, to be found by `sysfs.find(backend)`.
        """
        _check_geometry(size, block_size, fds, server_flags)
        if index is not None and not 0 <= index <= sysfs.highest_index(sysfs=self._sysfs):
            highest = sysfs.highest_index(sysfs=self._sysfs)
            raise KernelError(f"There can be no /dev/nbd{index}; the last is /dev/nbd{highest}.", errno.EINVAL)
        payload = (
            genl.u64(Attr.SIZE_BYTES, size)
            + genl.u64(Attr.BLOCK_SIZE_BYTES, block_size)
            + genl.u64(Attr.SERVER_FLAGS, server_flags & SERVER_FLAGS)
            # Always there: left out, the flags of the device's last use would stay (DESTROY_ON_DISCONNECT).
            + genl.u64(Attr.CLIENT_FLAGS, 0)
            + genl.u64(Attr.DEAD_CONN_TIMEOUT, dead_timeout)
            + genl.string(Attr.BACKEND_IDENTIFIER, backend)
        )
        if timeout:
            # 0 is what a free device has; sending it would put io_timeout back to 30 s (nbd_set_cmd_timeout).
            payload += genl.u64(Attr.TIMEOUT, timeout)
        if index is not None:
            payload = genl.u32(Attr.INDEX, index) + payload
        end = time.monotonic() + busy_seconds
        while True:
            try:
                answers = self._command(Cmd.CONNECT, payload, fds)
                break
            except OSError as error:
                # EEXIST: somebody made the device of this index at the same moment.
                bound = index is not None and self._node(index).bound
                if error.errno not in {errno.EBUSY, errno.EEXIST} or bound or time.monotonic() >= end:
                    raise self._connect_error(error, index, size, block_size) from error
            # There is no event for the last close of a device.
            time.sleep(_BUSY_PAUSE)
        for answer in answers:
            raw = answer.attributes.get(Attr.INDEX, b"")
            if len(raw) == 4:
                return int(struct.unpack("=I", raw)[0])
        # The answer is lost when the socket overflows; the device isn't.
        found = sysfs.find(backend, sysfs=self._sysfs)
        if len(found) == 1:
            return found[0].index
        raise KernelError(f"The kernel bound {backend!r} but did not say to which device.")

    def reconfigure(
        self,
        index: int,
        *,
        backend: str | None,
        fds: Sequence[int] = (),
        timeout: int | None = None,
        dead_timeout: int | None = None,
        size: int | None = None,
        block_size: int | None = None,
    ) -> None:
        """Change a bound device live: new sockets for its dead ones, time limits in seconds, sizes in bytes.

        None leaves a thing as it is; `backend` is None for a device that was bound without one. With no dead socket
        the kernel takes a new one and throws it away, and reports no error. `timeout` 0 puts `queue/io_timeout` back to
        30 s: write it again afterwards. Another size waits, from Linux 6.9 on, for all requests in flight
        (nbd_set_size freezes the queue) and holds up every other command for the device meanwhile: never ask for one
        while a connection is dead. Raises NotAttached (not bound, or bound as something else), KernelError, TimedOut.
        """
        payload = genl.u32(Attr.INDEX, index)
        if backend is not None:
            payload += genl.string(Attr.BACKEND_IDENTIFIER, backend)
        if size is not None:
            payload += genl.u64(Attr.SIZE_BYTES, size)
        if block_size is not None:
            payload += genl.u64(Attr.BLOCK_SIZE_BYTES, block_size)
        if timeout is not None:
            payload += genl.u64(Attr.TIMEOUT, timeout)
        if dead_timeout is not None:
            payload += genl.u64(Attr.DEAD_CONN_TIMEOUT, dead_timeout)
        try:
            self._command(Cmd.RECONFIGURE, payload, fds)
        except OSError as error:
            raise self._reconfigure_error(error, index, backend) from error

    def disconnect(self, index: int, *, nudge: Callable[[], None] | None = None) -> None:
        """End a device: every request in flight fails, the sockets are shut down. Fine if nothing is bound.

        There is no identity check in the kernel: look at `Node.backend` first (`release` does). With openers left
        the node stays taken until the last of them closes it.

        The driver first says goodbye to the server, and on a full socket that waits without end, holding up every
        other generic netlink command of the system. `nudge` is called after two seconds of that: shut the sockets
        down in it. Raises KernelError, TimedOut.
        """
        try:
            self._command(Cmd.DISCONNECT, genl.u32(Attr.INDEX, index), (), nudge=nudge)
        except OSError as error:
            node = self._node(index)
            # EINVAL is also the answer for a device that isn't there, or is on its way out.
            if error.errno == errno.EINVAL and not node.exists:
                return
            raise KernelError(_refusal(error, f"disconnect {node.path}"), error.errno) from error

    def watch_connections(self) -> LinkDeadMonitor:
        """A new monitor for connections that die; open it before CONNECT to miss none."""
        group = self._family.groups.get(GROUP)
        if group is None:
            raise KernelError(f"The kernel's NBD driver has no multicast group {GROUP!r}.")
        try:
            sock = genl.open_socket()
        except OSError as error:
            raise KernelError(f"No generic netlink socket: {genl.reason(error)}.", error.errno) from error
        try:
            sock.setsockopt(genl.SOL_NETLINK, genl.NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            sock.close()
            raise KernelError(
                f"The kernel doesn't report dead connections: {genl.reason(error)}.", error.errno
            ) from error
        return LinkDeadMonitor(sock, self._family.identifier, sysfs_root=self._sysfs)

    def _node(self, index: int) -> sysfs.Node:
        return sysfs.Node(index, sysfs=self._sysfs)

    def _command(
        self, command: Cmd, payload: bytes, fds: Sequence[int], *, nudge: Callable[[], None] | None = None
    ) -> list[genl.Message]:
        # The kernel looks descriptors up while it runs the command. Ours could have been closed and their numbers
        # given to other files by then, if we stopped waiting: so the command gets its own.
        own: list[int] = []

        def sockets() -> bytes:
            own.extend(os.dup(fd) for fd in fds)
            return genl.nested(Attr.SOCKETS, *(genl.nested(NBD_SOCK_ITEM, genl.u32(NBD_SOCK_FD, fd)) for fd in own))

        def sent() -> None:
            for fd in own:
                os.close(fd)

        return self._genl.request(
            self._family.identifier,
            command,
            VERSION,
            payload,
            self._seconds,
            more=sockets if fds else None,
            sent=sent,
            nudge=nudge,
        )

    def _connect_error(self, error: OSError, index: int | None, size: int, block_size: int) -> KernelError | Busy:
        number = error.errno
        if index is None:
            if number in {errno.ENOSPC, errno.ENOMEM, errno.EBUSY, errno.EEXIST}:
                return NoFreeDevice(
                    f"The kernel has no free NBD device and can't make one ({genl.reason(error)}). "
                    "Detach one that isn't needed.",
                    number,
                )
            what = "bind a free NBD device"
        else:
            node = self._node(index)
            what = f"bind {node.path}"
            if number in {errno.EBUSY, errno.EEXIST}:
                return Busy(f"{node.path} is taken: {_who(node)}. Name another device, or none to get a free one.")
            if number in {errno.ENOSPC, errno.ENOMEM}:
                return KernelError(f"The kernel can't make {node.path}: {genl.reason(error)}.", number)
        if number == errno.EINVAL:
            page = os.sysconf("SC_PAGE_SIZE")
            causes = ["the socket is neither TCP nor a Unix stream"]
            if block_size > page:
                causes.insert(0, f"this kernel takes no block size above {page} bytes, and {block_size} was asked")
            if index is not None:
                causes.append(f"/dev/nbd{index} is being removed")
            return KernelError(
                f"The kernel won't {what} with {size} bytes in blocks of {block_size}: {'; or '.join(causes)}.", number
            )
        return KernelError(_refusal(error, what), number)

    def _reconfigure_error(self, error: OSError, index: int, backend: str | None) -> KernelError | NotAttached:
        node = self._node(index)
        if error.errno == errno.EINVAL:
            if not node.bound:
                return NotAttached(f"{node.path} is not bound any more, so {backend!r} can't be changed on it.")
            if node.backend != backend:
                return NotAttached(f"{node.path} is bound as {node.backend!r} and not as {backend!r}.")
            return KernelError(
                f"The kernel won't change {node.path}: it is being disconnected, or the new socket is "
                "neither TCP nor a Unix stream, or it takes no such block size.",
                error.errno,
            )
        return KernelError(_refusal(error, f"change {node.path}"), error.errno)


def _check_geometry(size: int, block_size: int, fds: Sequence[int], server_flags: int) -> None:
    """Raise KernelError for what the kernel would refuse without a reason, or take and get wrong."""
    if size <= 0:
        raise KernelError("The export has a size of 0 bytes; there is nothing to attach.", errno.EINVAL)
    if size > MAX_SIZE:
        raise KernelError(f"The export claims {size} bytes, more than the kernel can address.", errno.EINVAL)
    if block_size & (block_size - 1) or not MIN_BLOCK_SIZE <= block_size <= BLK_MAX_BLOCK_SIZE:
        raise KernelError(
            f"A block size of {block_size} bytes can't be used: it must be a power of two from {MIN_BLOCK_SIZE} "
            f"to {BLK_MAX_BLOCK_SIZE}.",
            errno.EINVAL,
        )
    if size < block_size:
        raise KernelError(
            f"The export's {size} bytes don't fill one block of {block_size}; set a smaller block size.", errno.EINVAL
        )
    if not fds:
        raise KernelError("No connection to bind.", errno.EINVAL)
    if len(fds) > 1 and not server_flags & ServerFlags.CAN_MULTI_CONN:
        raise KernelError(
            "The server doesn't allow several connections to this export; set connections to 1.", errno.EINVAL
        )


def _who(node: sysfs.Node) -> str:
    """Who has a device, as far as the kernel shows it."""
    if node.bound and node.backend:
        return f"it is bound as {node.backend!r}"
    # `pid` alone proves nothing: a program that binds by netlink may end, and its number be given to another. A program
    # that binds by ioctl has the device open for as long as it is bound.
    users = Usage(sysfs_root=node.sysfs).users(node)
    if node.bound and not users:
        return "it is bound by another program, which gave it no name"
    return "; ".join(users) if users else "it was disconnected and is still open somewhere, or udev looks at it"


def _refusal(error: OSError, what: str) -> str:
    if error.errno in {errno.EPERM, errno.EACCES}:
        return f"The kernel lets only root (CAP_SYS_ADMIN in the initial user namespace) {what}."
    if error.errno in {errno.ENOENT, errno.ENODEV}:
        return f"The kernel's NBD driver went away before it could {what}; load it again with 'modprobe nbd'."
    if error.errno in {errno.EBADF, errno.ENOTSOCK}:
        return f"The kernel can't {what}: what it was given is not an open socket."
    return f"The kernel can't {what}: {genl.reason(error)}."
