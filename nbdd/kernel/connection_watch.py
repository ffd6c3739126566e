# SPDX-License-Identifier: MIT
"""LinkDeadMonitor: the kernel's reports of connections that die, from the multicast group of its NBD driver."""

from __future__ import annotations

import errno
import select
import struct
from typing import TYPE_CHECKING, Self

from nbdd.errors import KernelError
from nbdd.kernel import genl, sysfs
from nbdd.kernel.family import Attr, Cmd

if TYPE_CHECKING:
    import socket


class LinkDeadMonitor:
    """Reports which devices lost a connection (NBD_CMD_LINK_DEAD, one message for each socket)."""

    def __init__(self, sock: socket.socket, family: int, *, sysfs_root: str = sysfs.SYSFS) -> None:
        self._socket = sock
        self._family = family
        self._sysfs = sysfs_root

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def wait(self, seconds: float) -> list[int]:
        """`read`, once there is something or `seconds` have passed."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return self.read() if poll.poll(max(seconds, 0) * 1000) else []

    def read(self) -> list[int]:
        """The indexes reported so far, in order and with repeats; never waits.

        If the kernel had to drop reports, every bound device is listed: each may be meant.
        """
        found: list[int] = []
        while True:
            try:
                data = genl.receive(self._socket)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(
                        f"Reports of dead connections can't be read: {genl.reason(error)}.", error.errno
                    ) from error
                found += [node.index for node in sysfs.nodes(sysfs=self._sysfs) if node.bound]
                continue
            if not data:
                return found
            for kind, _, _, content in genl.messages(data):
                message = genl.generic(content) if kind == self._family else None
                if message is not None and message.command == Cmd.LINK_DEAD:
                    raw = message.attributes.get(Attr.INDEX, b"")
                    if len(raw) == 4:
                        found.append(struct.unpack("=I", raw)[0])
