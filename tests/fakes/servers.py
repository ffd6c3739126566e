# SPDX-License-Identifier: MIT
"""NBD servers that do what a test wants of them, good or bad: their bytes, and sockets that say them."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from nbdd.errors import NegotiationFailed, ServerError, TimedOut
from nbdd.protocol import Receive, Steps
from nbdd.protocol.constants import IHAVEOPT, NBDMAGIC, REPLY_MAGIC, HandshakeFlags, Info, Opt, Rep, RepErr
from nbdd.uri import URI

_T = TypeVar("_T")

FIXED = HandshakeFlags.NBD_FLAG_FIXED_NEWSTYLE
NO_ZEROES = HandshakeFlags.NBD_FLAG_NO_ZEROES
GO = int(Opt.NBD_OPT_GO)
HAS_FLAGS = 1
MIB = 1 << 20


# What servers say.


def greeting(flags: int = FIXED | NO_ZEROES) -> bytes:
    return NBDMAGIC + IHAVEOPT + struct.pack(">H", flags)


def reply(option: int, kind: int, data: bytes = b"", *, magic: int = REPLY_MAGIC, length: int | None = None) -> bytes:
    return struct.pack(">QIII", magic, option, kind, len(data) if length is None else length) + data


def ack(option: int) -> bytes:
    return reply(option, Rep.NBD_REP_ACK)


def info(option: int, number: int, payload: bytes) -> bytes:
    return reply(option, Rep.NBD_REP_INFO, struct.pack(">H", number) + payload)


def info_export(option: int, size: int = MIB, flags: int = HAS_FLAGS) -> bytes:
    return info(option, Info.NBD_INFO_EXPORT, struct.pack(">QH", size, flags))


def info_blocks(option: int, minimum: int, preferred: int, maximum: int) -> bytes:
    return info(option, Info.NBD_INFO_BLOCK_SIZE, struct.pack(">III", minimum, preferred, maximum))


def entry(name: bytes, description: bytes = b"") -> bytes:
    data = struct.pack(">I", len(name)) + name + description
    return reply(Opt.NBD_OPT_LIST, Rep.NBD_REP_SERVER, data)


def accepts(option: int, size: int = MIB, flags: int = HAS_FLAGS) -> bytes:
    """All that a good server answers to NBD_OPT_GO or NBD_OPT_INFO."""
    return info_export(option, size, flags) + ack(option)


# What clients say.


class Asked(NamedTuple):
    option: int
    data: bytes


def parse_client(octets: bytes) -> tuple[int, list[Asked]]:
    """The client's flags and options, out of all that it sent."""
    (flags,) = struct.unpack_from(">I", octets)
    at = 4
    asked = []
    while at < len(octets):
        magic, option, length = struct.unpack_from(">8sII", octets, at)
        assert magic == IHAVEOPT
        asked.append(Asked(option, octets[at + 16 : at + 16 + length]))
        assert len(asked[-1].data) == length
        at += 16 + length
    return flags, asked


# Without sockets.


class Play:
    """Run a negotiation against a server whose every word is known beforehand.

    After its last word it hangs up, or is silent until the time is over, or it hangs up before it takes the message
    called `hangs_up_before`.
    """

    def __init__(self, server: bytes, hangs_up_before: str = "", *, silent: bool = False) -> None:
        self.server = server
        self.hangs_up_before = hangs_up_before
        self.silent = silent
        self.sent = b""
        self.read = 0

    def run(self, steps: Steps[_T]) -> _T:
        try:
            request = next(steps)
            while True:
                if not isinstance(request, Receive):
                    if request.what == self.hangs_up_before:
                        request = steps.throw(NegotiationFailed(f"closed the connection before {request.what}."))
                        continue
                    self.sent += request.data
                    request = steps.send(b"")
                elif self.read + request.count > len(self.server) and self.silent:
                    request = steps.throw(TimedOut("took too long."))
                elif self.read + request.count > len(self.server):
                    request = steps.throw(NegotiationFailed(f"hung up. {request.hint}"))
                else:
                    self.read += request.count
                    request = steps.send(self.server[self.read - request.count : self.read])
        except StopIteration as end:
            result: _T = end.value
            return result

    @property
    def asked(self) -> list[int]:
        """The options in the order they were sent."""
        return [asked.option for asked in parse_client(self.sent)[1]]

    @property
    def rest(self) -> bytes:
        """What the server sent and the client did not read."""
        return self.server[self.read :]


def refusal_of(server: bytes, steps: Steps[object]) -> tuple[ServerError, Play]:
    """The error that the negotiation ends with."""
    play = Play(server)
    try:
        result = play.run(steps)
    except ServerError as error:
        return error, play
    raise AssertionError(f"not refused: {result!r}")


# With sockets.


def receive(conn: socket.socket, count: int) -> bytes:
    octets = b""
    while len(octets) < count:
        chunk = conn.recv(count - len(octets))
        if not chunk:
            raise ConnectionError("the client hung up")
        octets += chunk
    return octets


def says(octets: bytes) -> Callable[[socket.socket], None]:
    """A server that says this whatever it is asked, and listens until the client hangs up."""

    def serve(conn: socket.socket) -> None:
        conn.sendall(octets)
        while conn.recv(65536):
            pass

    return serve


def says_and_closes(octets: bytes, after: int = 0) -> Callable[[socket.socket], None]:
    """A server that says this, reads `after` bytes, so that it closes in good order, and goes."""

    def serve(conn: socket.socket) -> None:
        conn.sendall(octets)
        receive(conn, after)

    return serve


def offers(exports: Mapping[bytes, int], flags: int = HAS_FLAGS) -> Callable[[socket.socket], None]:
    """A good server of these names and sizes. Of the transmission phase it knows nothing: it waits for the end."""

    def serve(conn: socket.socket) -> None:
        conn.sendall(greeting())
        receive(conn, 4)
        while True:
            option, length = struct.unpack(">8xII", receive(conn, 16))
            data = receive(conn, length)
            if option in (Opt.NBD_OPT_GO, Opt.NBD_OPT_INFO):
                name = data[4 : 4 + int.from_bytes(data[:4], "big")]
                if name not in exports:
                    conn.sendall(reply(option, RepErr.NBD_REP_ERR_UNKNOWN))
                    continue
                conn.sendall(accepts(option, exports[name], flags))
                if option == Opt.NBD_OPT_GO:
                    while conn.recv(65536):
                        pass
                    return
            elif option == Opt.NBD_OPT_LIST:
                conn.sendall(b"".join(entry(name) for name in exports) + ack(option))
            elif option == Opt.NBD_OPT_ABORT:
                conn.sendall(ack(option))
                return
            else:
                conn.sendall(reply(option, RepErr.NBD_REP_ERR_UNSUP))

    return serve


class Server:
    """A listening socket; every connection gets a thread that runs `serve` on it. Use it as a context manager.

    `family` is AF_INET, AF_INET6 or AF_UNIX. `connected` is set as soon as a client has connected.
    """

    def __init__(self, serve: Callable[[socket.socket], None], family: int = socket.AF_INET) -> None:
        self.connected = threading.Event()
        self._serve = serve
        self._threads: list[threading.Thread] = []
        self._conns: list[socket.socket] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        if family == socket.AF_UNIX:
            self._directory = tempfile.TemporaryDirectory(prefix="nbd-")
            self.path = str(Path(self._directory.name, "s"))
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self.path)
            self._listener.listen()
            self.port = 0
        else:
            self.path = ""
            host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
            self._listener = socket.create_server((host, 0), family=family)
            self.port = self._listener.getsockname()[1]

    def uri(self, export: str = "") -> URI:
        if self.path:
            return URI(tls=False, host=None, port=10809, socket=self.path, export=export)
        host = "::1" if self._listener.family == socket.AF_INET6 else "127.0.0.1"
        return URI(tls=False, host=host, port=self.port, socket=None, export=export)

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._accept)
        self._threads.append(thread)
        thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # shutdown() wakes a thread that waits in accept() or recv(); close() would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        for conn in self._conns:
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()
        if self._directory is not None:
            self._directory.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            self._conns.append(conn)
            thread = threading.Thread(target=self._run, args=(conn,))
            self._threads.append(thread)
            thread.start()
            self.connected.set()

    def _run(self, conn: socket.socket) -> None:
        with conn, contextlib.suppress(OSError):
            if self.port:
                # What a test says in pieces shall arrive in pieces, and at once.
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve(conn)
