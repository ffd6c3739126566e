# SPDX-License-Identifier: MIT
"""JSON lines over a socket pair, descriptors beside them: the protocol between manager, fork server and workers.

No pickle: a worker reads what a hostile server sends, and a worker that is taken over must not be able to take over
the manager.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

MAX_LINE = 64 << 20
"""Bytes in one message at most: a list of 100,000 exports fits, a runaway does not."""

_CHUNK = 1 << 16
_MAX_FDS = 64
_MAX_WAITING_FDS = 256

Message = dict[str, Any]


class ChannelError(Exception):
    """The other side broke the framing; nothing that it sends can be used any more."""


class Channel:
    """One end of a connection between two of nbdd's own processes.

    `send` and `receive` work on a blocking and on a non-blocking socket alike. Descriptors travel in the order of
    the messages; the key ``fds`` of a message is how many of them are its own.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer that are known to hold no end of a line
        self._fds: deque[int] = deque()

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """Two connected sockets, one for each side."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def fileno(self) -> int:
        """The descriptor to poll for input."""
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        """As for sockets."""
        self._sock.setblocking(flag)

    def close(self) -> None:
        """Close the socket and every descriptor that was not taken."""
        self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message; the descriptors are duplicated by the kernel and stay open here.

        Raises OSError when the other side is gone, BlockingIOError when a non-blocking socket has no room.
        """
        if fds:
            message = {**message, "fds": len(fds)}
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        view = memoryview(data)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        # MSG_NOSIGNAL is Python's default (SIGPIPE is ignored); a vanished reader is an OSError.
        sent = self._sock.sendmsg([view], ancillary)
        if sent < len(view):
            self._sock.sendall(view[sent:])

    def receive(self) -> bool:
        """Read once what is there; False at the end of the stream.

        Raises BlockingIOError when a non-blocking socket has nothing, ChannelError when a line is too long or
        descriptors come that no message announces.
        """
        try:
            data, ancillary, _flags, _ = self._sock.recvmsg(
                _CHUNK, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds.extend(fds)
        if not data:
            return False
        self._buffer += data
        if len(self._buffer) > MAX_LINE:
            raise ChannelError("message too long")
        if len(self._fds) > _MAX_WAITING_FDS:
            raise ChannelError("too many descriptors")
        return True

    def pop(self) -> tuple[Message, list[int]] | None:
        """The next whole message with its descriptors, now the caller's to close; None if there is none yet."""
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ChannelError("not JSON") from error
        if not isinstance(message, dict):
            raise ChannelError("not a JSON object")
        count = message.pop("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise ChannelError("descriptors are missing")
        return message, [self._fds.popleft() for _ in range(count)]

    def wait(self) -> tuple[Message, list[int]] | None:
        """Block until a message is there; None at the end of the stream. For blocking sockets."""
        while (found := self.pop()) is None:
            if not self.receive():
                return None
        return found
