# SPDX-License-Identifier: MIT
"""The end of waiting: a link without a server, that answers every request of the kernel with an error.

The kernel fails what it holds back when the dead timeout is over, but not what it had sent already: without a request
timeout that waits for ever, and programs with it, beyond any signal. A link that refuses ends both at once, and leaves
the device bound, to be mended when its server is back.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress

from nbdd.ipc.poller import Loop
from nbdd.protocol.constants import NBD_CMD_DISC, NBD_CMD_WRITE, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC
from nbdd.protocol.transmission import REQUEST, SIMPLE_REPLY

WITHDRAW_SECONDS = 2.0
"""For the kernel to see that a refuser has gone; it only has to run."""

_CHUNK = 65536


class Refuser:
    """Our end of such a link. `gone` is called when the kernel has closed the other."""

    def __init__(self, loop: Loop, sock: socket.socket, gone: Callable[[], None]) -> None:
        self._loop = loop
        self._sock = sock
        self._gone = gone
        self._buffer = bytearray()
        # Of a write that is refused: what of its data is still to come.
        self._skip = 0
        sock.setblocking(False)
        loop.watch(sock.fileno(), select.POLLIN, self._readable)

    def fileno(self) -> int:
        """The descriptor of our end."""
        return self._sock.fileno()

    def close(self) -> None:
        """Go away; the kernel counts the link as dead from then on."""
        self._loop.forget(self._sock.fileno())
        self._sock.close()

    def _readable(self, _events: int) -> None:
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._gone()
            return
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += memoryview(data)[skipped:]
        while len(self._buffer) >= REQUEST.size:
            self._refuse()

    def _refuse(self) -> None:
        """Answer the request at the head of the buffer."""
        magic, _, kind, cookie, _, length = REQUEST.unpack_from(self._buffer)
        del self._buffer[: REQUEST.size]
        if kind == NBD_CMD_WRITE:
            skipped = min(length, len(self._buffer))
            del self._buffer[:skipped]
            self._skip = length - skipped
        # One that is on its way out takes no answer. Else there is room: the kernel has some hundred requests under
        # way at most, of 16 bytes of answer each, and reads them all the time.
        if magic == REQUEST_MAGIC and kind != NBD_CMD_DISC:
            with suppress(OSError):
                self._sock.send(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno.EIO, cookie))


def withdraw(fd: int) -> None:
    """Have the kernel take a refuser's link for dead, and wait until it does; `fd` is a duplicate of our end."""
    with socket.socket(fileno=os.dup(fd)) as sock, suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(WITHDRAW_SECONDS)
        # It reads our end, and closes its own: only then will it take a new link in this one's place.
        while sock.recv(_CHUNK):
            pass
