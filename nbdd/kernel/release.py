# SPDX-License-Identifier: MIT
"""Disconnect a device, and wait until it is free."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from nbdd.errors import KernelError, NotAttached, TimedOut
from nbdd.kernel import udev
from nbdd.kernel.sysfs import KERNEL_IO_TIMEOUT
from nbdd.kernel.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdd.kernel.netlink import NetlinkNBD
    from nbdd.kernel.sysfs import Node

_PAUSE = 0.02
_MIN_SETTLE = 1.0
_QUIET = 1.0
"""Seconds that udev gets to finish reading before the end; on a dead connection it can't."""


def release(
    netlink: NetlinkNBD,
    node: Node,
    backend: str | None,
    seconds: float,
    *,
    diskseq: int | None = None,
    pid: int | None = None,
    force: bool = False,
    patience: float = 1.0,
    nudge: Callable[[], None] | None = None,
    usage: Usage | None = None,
) -> list[str]:
    """Disconnect `node` if it is still `backend` and unused, and wait until it is free and its symlinks are gone.

    Returns who still has it open when `seconds` are over, [] when the device is free; only with `force` can there be
    any. Raises NotAttached (it is something else by now), Busy after `patience` seconds of being in use (never
    with `force`), TimedOut, KernelError. `nudge`: see `NetlinkNBD.disconnect`.
    """
    end = time.monotonic() + seconds
    look = usage if usage is not None else Usage()
    identify(node, backend, diskseq, pid)
    with nullcontext() if force else look.claim(node, patience=patience):
        # The claim may have waited; and under it the device can't become another any more.
        identify(node, backend, diskseq, pid)
        if not force:
            let_udev_finish(node, look)
        netlink.disconnect(node.index, nudge=nudge)
    # Our own descriptor was an opener: the kernel takes the rest down now that it is closed.
    while node.bound and node.backend in {backend, None}:
        # The uevent of the end comes before `pid` and `backend` go (nbd_config_put), so there is none to wait for.
        if time.monotonic() >= end:
            return look.users(node) or [f"{node.path} is still open somewhere"]
        time.sleep(_PAUSE)
    if node.bound:
        # Another program was quick and has it now. Nothing of ours is left on it.
        return []
    if node.io_timeout not in (0, KERNEL_IO_TIMEOUT):
        # A program that binds it next without a time limit would have ours.
        with suppress(KernelError, TimedOut):
            node.set_io_timeout(KERNEL_IO_TIMEOUT)
    left = max(end - time.monotonic(), _MIN_SETTLE)
    # The kernel drops the partitions of the dead device on the next open, which needs no server.
    with suppress(KernelError, TimedOut):
        udev.scan_partitions(node, left)
    udev.settle(node, left, new=False)
    return []


def identify(node: Node, backend: str | None, diskseq: int | None = None, pid: int | None = None) -> None:
    """Raise NotAttached unless `node` is bound as `backend`, and is still the same disk and the same binding.

    `backend` is None for a device that was bound without an identifier.
    `diskseq` stays if the index is bound again; `pid`, which is the thread that bound it, does not.
    """
    if not node.bound:
        known = diskseq is not None or pid is not None
        raise NotAttached(f"{node.path} is not bound{' any more' if known else ''}.")
    found = node.backend
    if found != backend:
        raise NotAttached(f"{node.path} is bound as {found!r} and not as {backend!r}.")
    if (diskseq is not None and node.diskseq != diskseq) or (pid is not None and node.pid != pid):
        raise NotAttached(f"{node.path} was disconnected and bound again as {backend!r} since.")


def let_udev_finish(node: Node, usage: Usage) -> None:
    """Wait while udev looks at what the last writer left: its reads, cut off, would be I/O errors in the log."""
    end = time.monotonic() + _QUIET
    while os.path.exists(udev.CONTROL) and usage.probed(node) and time.monotonic() < end:
        time.sleep(_PAUSE)
