# SPDX-License-Identifier: MIT
"""dbus-next's connection, with the faults of its message layer mended; the service and its callers build on it."""

from __future__ import annotations

import asyncio
from typing import Any

from nbdd.bus.wire.library import MessageBus
from nbdd.bus.wire.patient_socket import PatientSocket
from nbdd.bus.wire.reader import Reader

_AT_ONCE = 8
"""Messages read in one turn of the loop, so that a flood of them leaves turns for everything else."""


class MessageBusFixes(MessageBus):
    """A connection that no user of the machine can block or end by what they send. Make it in a running loop."""

    def __init__(self, *, long_replies: bool, **how: Any) -> None:
        super().__init__(**how)
        # Its writer takes a full socket for a broken one, and a few hundred messages fill it.
        self._writer.sock = PatientSocket(self._sock)
        self._reader = Reader(self._stream, long_replies=long_replies)
        self._turn: asyncio.Handle | None = None

    async def _auth_readline(self) -> str:
        # dbus-next waits for the end of the line even after the end of the stream, and blocks the loop meanwhile.
        line = b""
        while not line.endswith(b"\r\n"):
            more = await self._loop.sock_recv(self._sock, 1)
            if not more:
                raise EOFError
            line += more
        return line.decode().removesuffix("\r\n")

    def _message_reader(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._disconnected:
            return
        try:
            for _ in range(_AT_ONCE):
                message = self._reader.next()
                if message is None:
                    return
                self._on_message(message)
        except (EOFError, OSError) as error:
            self._finalize(error)
        else:
            # The stream may hold what the socket no longer announces.
            self._turn = self._loop.call_soon(self._message_reader)
