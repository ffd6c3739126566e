# SPDX-License-Identifier: MIT
"""A socket for dbus-next's writer, which mistakes a full socket for a broken one."""

from __future__ import annotations

import socket


class PatientSocket:
    """The socket as the writer sees it: a full one takes nothing, and the writer tries again when it has room."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, data: memoryview) -> int:
        """Send what fits; return how many bytes that was, 0 if the socket is full."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
