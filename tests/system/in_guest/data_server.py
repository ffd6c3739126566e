# SPDX-License-Identifier: MIT
"""An NBD server of one's own: a child process that speaks the transmission phase on sockets it is given.

For scripts in a guest, on a socket pair or on TCP, without any negotiation. What it was asked is counted in memory
that both processes see. (Transmission phase: doc/proto.md of the NBD project, simple replies only.)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from types import TracebackType
from typing import Self

REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
READ, WRITE, DISC, FLUSH, TRIM = range(5)
EINVAL = 22

FLAGS = 0b101
"""NBD_FLAG_HAS_FLAGS and NBD_FLAG_SEND_FLUSH."""
MULTI = FLAGS | 1 << 8
"""The same and NBD_FLAG_CAN_MULTI_CONN."""


class DataServer:
    """`size` bytes of zeroes that can be written. `sockets` are the client's ends of its `connections`.

    `way` is "pair" (socket pairs, made before the server starts), "unix" or "tcp": to these `connect` makes more. Or
    "thread": socket pairs, served in this very process.
    """

    def __init__(self, size: int = 1 << 20, *, connections: int = 1, way: str = "pair") -> None:
        self.size = size
        self._counters = mmap.mmap(-1, 4096)
        self._data = mmap.mmap(-1, min(size, 1 << 24))
        pairs = [socket.socketpair() for _ in range(connections)] if way in {"pair", "thread"} else []
        listener = None if pairs else _listen(way)
        self._address: bytes | tuple[str, int] = listener.getsockname() if listener is not None else b""
        self.sockets = [ours for ours, _ in pairs]
        self.pid = 0
        if way == "thread":
            for _, theirs in pairs:
                threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for ours, _ in pairs:
                    ours.close()
                self._run([theirs for _, theirs in pairs], listener)
            finally:
                os._exit(0)
        for _, theirs in pairs:
            theirs.close()
        if listener is not None:
            listener.close()
            self.sockets = [self.connect() for _ in range(connections)]

    def connect(self) -> socket.socket:
        """One more connection."""
        sock = socket.socket(socket.AF_UNIX if isinstance(self._address, bytes) else socket.AF_INET)
        sock.connect(self._address)
        return sock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it as a crash does; may be called twice."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        for sock in self.sockets:
            sock.close()

    def asked(self, command: int) -> int:
        """How many requests of this kind it has got."""
        return int(struct.unpack_from("=Q", self._counters, command * 8)[0])

    def data(self, offset: int, length: int) -> bytes:
        """What it holds."""
        return self._data[offset : offset + length]

    def _run(self, sockets: list[socket.socket], listener: socket.socket | None) -> None:
        threads = [threading.Thread(target=self._serve, args=(sock,), daemon=True) for sock in sockets]
        for thread in threads:
            thread.start()
        while listener is not None:
            threading.Thread(target=self._serve, args=(listener.accept()[0],), daemon=True).start()
        for thread in threads:
            thread.join()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(EOFError, OSError):
            while True:
                magic, _, kind, cookie, offset, length = REQUEST.unpack(_exactly(sock, REQUEST.size))
                assert magic == REQUEST_MAGIC
                struct.pack_into("=Q", self._counters, kind * 8, self.asked(kind) + 1)
                if kind == DISC:
                    return
                content = _exactly(sock, length) if kind == WRITE else b""
                error = 0 if offset + length <= self.size and kind in {READ, WRITE, FLUSH} else EINVAL
                inside = max(0, min(length, len(self._data) - offset))
                if kind == WRITE and not error:
                    self._data[offset : offset + inside] = content[:inside]
                reply = REPLY.pack(REPLY_MAGIC, error, cookie)
                if kind == READ and not error:
                    reply += self._data[offset : offset + inside] + bytes(length - inside)
                sock.sendall(reply)


def _exactly(sock: socket.socket, count: int) -> bytes:
    octets = b""
    while len(octets) < count:
        more = sock.recv(count - len(octets))
        if not more:
            raise EOFError
        octets += more
    return octets


def _listen(way: str) -> socket.socket:
    if way == "tcp":
        return socket.create_server(("127.0.0.1", 0))
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")  # The kernel picks an abstract address.
    sock.listen()
    return sock
