# SPDX-License-Identifier: MIT
"""Make a bound device usable, after its binding and after a change of its geometry."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from nbdd.errors import ConnectFailed, ConnectionNotServiced, KernelError, NbddError
from nbdd.kernel.release import let_udev_finish
from nbdd.kernel.sockets import all_hung_up, hung_up, shut_down, unread
from nbdd.kernel.udev import settle
from nbdd.kernel.usage import Usage
from nbdd.limits import MIN_BLOCK_SIZE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from nbdd.kernel.netlink import NetlinkNBD
    from nbdd.kernel.sysfs import Node

SETTLE_SECONDS = 15.0
"""How long udev may take over a device that is new or has changed; after that it counts as unusable."""

UNREAD_SECONDS = 0.5
"""After this time an answer that is still in the socket counts as one that the kernel does not read."""


def make_usable(
    node: Node, sockets: Sequence[socket.socket], seconds: float, *, disconnect: Callable[[], None]
) -> None:
    """Wait until a device that was just bound has its size, its partitions and udev's symlinks.

    `disconnect` is called if the server has hung up, for what waits for it to fail. Raises ConnectFailed then,
    ConnectionNotServiced, TimedOut, KernelError.

    ConnectionNotServiced: the kernel reads only from some of several sockets. That is rare, on a machine that is slow
    or very busy just then, and new sockets may be all it takes. Each connection has a work item of the kernel's that
    never ends. If the kernel has too few threads for all of them at once, and makes none within 10 ms, it leaves those
    that wait to a single one (drivers/block/nbd.c, recv_work; kernel/workqueue.c, rescuer_thread). The threads that it
    has made too late are there for the next attempt.
    """
    not_read = False

    def give_up() -> None:
        nonlocal not_read
        if not not_read and _left_unread(sockets):
            not_read = True
            shut_down(sockets)
        # What was sent to a server that died meanwhile is never answered.
        if all_hung_up(sockets) and node.bound:
            disconnect()

    try:
        settle(node, seconds, nudge=give_up)
    except NbddError:
        if not not_read:
            raise
    if not_read:
        raise ConnectionNotServiced(
            f"The kernel does not read from all {len(sockets)} connections of {node.path}, for want of threads at this "
            "moment."
        )
    if all_hung_up(sockets):
        raise ConnectFailed(f"The server hung up while {node.path} was being made usable.")


def change_geometry(
    netlink: NetlinkNBD,
    node: Node,
    backend: str | None,
    sockets: Sequence[socket.socket],
    *,
    size: int,
    block_size: int,
) -> None:
    """Give a bound device another size and block size, in bytes; `size` is a multiple of the block size.

    It grows under I/O; for all else it must be unused. Raises Busy, ConnectFailed (one of the sockets is dead),
    NotAttached, KernelError (also if the kernel does not do as it was asked), TimedOut.
    """
    # What others hold cached, or rely on, would be beyond the end, or in blocks of another size.
    takes_away = size < node.size or block_size != node.block_size
    usage = Usage()
    with usage.claim(node, patience=1.0) if takes_away else nullcontext():
        let_udev_finish(node, usage)
        # Last: the kernel would wait for what a dead connection carried, and take no other one meanwhile.
        if any(hung_up(sock) for sock in sockets):
            raise ConnectFailed(f"The size of {node.path} can't be changed while a connection to its server is dead.")
        netlink.reconfigure(node.index, backend=backend, size=size, block_size=block_size)
    # udev looks at the device again. A program that opens it while udev has it open works with the block size that it
    # had at the first open (block/bdev.c), and gets errors.
    settle(node, SETTLE_SECONDS, new=False)
    if (node.size, node.block_size) != (size - size % MIN_BLOCK_SIZE, block_size):
        raise KernelError(
            f"The kernel was asked for {size} bytes in blocks of {block_size} on {node.path}, and has {node.size} in "
            f"blocks of {node.block_size}."
        )


def _left_unread(sockets: Sequence[socket.socket]) -> bool:
    """Whether an answer stays unread, on one of several sockets."""
    before = [unread(sock) for sock in sockets]
    if len(before) < 2 or not any(before):
        return False
    time.sleep(UNREAD_SECONDS)
    return any(one and one == unread(sock) for one, sock in zip(before, sockets, strict=True))
