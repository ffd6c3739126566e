# SPDX-License-Identifier: MIT
"""The error server: our end of a connection on which every request of the kernel is answered with an error.

The kernel fails what it holds back when the dead timeout is over, but not what it had sent already: without a request
timeout that waits for ever, and programs with it, beyond any signal. The error server ends both at once, and leaves
the device bound, to be mended when its server is back.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress

from nbdd.ipc.poller import Poller
from nbdd.protocol.constants import NBD_CMD_DISC, NBD_CMD_WRITE, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC
from nbdd.protocol.transmission import REQUEST, SIMPLE_REPLY

REMOVE_SECONDS = 2.0
"""For the kernel to see that an error server has closed; it only has to run."""

_CHUNK = 65536


class ErrorServer:
    """Our end of such a connection. `on_closed` is called when the kernel has closed the other end."""

    def __init__(self, poller: Poller, sock: socket.socket, on_closed: Callable[[], None]) -> None:
        self._poller = poller
        self._sock = sock
        self._on_closed = on_closed
        self._buffer = bytearray()
        # Bytes of the data of a write that are still to come.
        self._skip = 0
        sock.setblocking(False)
        poller.register(sock.fileno(), select.POLLIN, self._readable)

    def fileno(self) -> int:
        """The descriptor of our end."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close our end; the kernel counts the connection as dead from then on."""
        self._poller.unregister(self._sock.fileno())
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
            self._on_closed()
            return
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += memoryview(data)[skipped:]
        while len(self._buffer) >= REQUEST.size:
            self._answer()

    def _answer(self) -> None:
        """Answer the request at the head of the buffer with EIO."""
        magic, _, kind, cookie, _, length = REQUEST.unpack_from(self._buffer)
        del self._buffer[: REQUEST.size]
        if kind == NBD_CMD_WRITE:
            skipped = min(length, len(self._buffer))
            del self._buffer[:skipped]
            self._skip = length - skipped
        # A disconnect takes no answer. Else there is room: the kernel has some hundred requests under
        # way at most, of 16 bytes of answer each, and reads them all the time.
        if magic == REQUEST_MAGIC and kind != NBD_CMD_DISC:
            with suppress(OSError):
                self._sock.send(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno.EIO, cookie))


def remove(fd: int) -> None:
    """Have the kernel count an error server's connection as dead, and wait until it does; `fd` duplicates our end."""
    with socket.socket(fileno=os.dup(fd)) as sock, suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(REMOVE_SECONDS)
        # It reads our end, and closes its own: only then does it take a new connection in this one's place.
        while sock.recv(_CHUNK):
            pass
