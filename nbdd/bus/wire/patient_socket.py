# SPDX-License-Identifier: MIT
"""A socket for dbus-next's writer, which takes a full one for a broken one."""

from __future__ import annotations

import socket


class PatientSocket:
    """The socket as the writer sees it: one that has no room takes nothing, and is tried again when it has."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, data: memoryview) -> int:
        """How many bytes were taken; 0 where there is no room now."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
