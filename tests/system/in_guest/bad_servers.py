# SPDX-License-Identifier: MIT
"""NBD servers that misbehave, each in its own way and on a port of its own; run in a guest, standard library alone.

    bad_servers.py FIRST_PORT    serve BEHAVIOURS in their order on 127.0.0.1, the first one there, until killed

What a server says is written out here in bytes: nothing of nbdd is used, so that a mistake can't be made twice alike.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)  # fixed newstyle, no zeroes
OPTION = struct.Struct(">8sII")
REPLY = struct.Struct(">QIII")
REPLY_MAGIC = 0x3E889045565A9
REQUEST_BYTES = 28
GO = 7
REP_ACK, REP_INFO = 1, 3
ERR_TLS_REQUIRED, ERR_SHUTDOWN = (1 << 31) + 5, (1 << 31) + 7
INFO_EXPORT = 0
HAS_FLAGS, READ_ONLY = 1, 2
SIZE = 64 << 20
SECOND_BETWEEN_BYTES = 1.0


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data


def export(size: int = SIZE, flags: int = HAS_FLAGS) -> bytes:
    """What a good server says to NBD_OPT_GO before its acknowledgement."""
    return reply(GO, REP_INFO, struct.pack(">HQH", INFO_EXPORT, size, flags))


def exactly(sock: socket.socket, count: int) -> bytes:
    """Read so many bytes; the client may leave, and then this thread has nothing more to do."""
    octets = b""
    while len(octets) < count:
        more = sock.recv(count - len(octets))
        if not more:
            raise SystemExit
        octets += more
    return octets


def until_go(sock: socket.socket) -> None:
    """Greet, and answer nothing until the client has asked for NBD_OPT_GO."""
    sock.sendall(GREETING)
    exactly(sock, 4)
    while True:
        _magic, option, length = OPTION.unpack(exactly(sock, OPTION.size))
        exactly(sock, length)
        if option == GO:
            return


def stay(sock: socket.socket) -> None:
    """Take what comes, answer nothing, until the client leaves."""
    while sock.recv(1 << 16):
        pass


def silent(sock: socket.socket) -> None:
    stay(sock)


def slowly(sock: socket.socket) -> None:
    for octet in GREETING:
        sock.sendall(bytes([octet]))
        time.sleep(SECOND_BETWEEN_BYTES)
    stay(sock)


def http(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")


def garbage(sock: socket.socket) -> None:
    sock.sendall(bytes(range(256)) * 16)
    stay(sock)


def closes_at_once(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_RDWR)


def resets(sock: socket.socket) -> None:
    until_go(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def closes_in_greeting(sock: socket.socket) -> None:
    sock.sendall(GREETING[:11])


def closes_after_greeting(sock: socket.socket) -> None:
    sock.sendall(GREETING)
    exactly(sock, 4)


def closes_when_asked(sock: socket.socket) -> None:
    until_go(sock)


def closes_in_reply(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(export()[:13])


def closes_before_acknowledgement(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(export())


def closes_after_acknowledgement(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(export() + reply(GO, REP_ACK))


def closes_at_first_read(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(export() + reply(GO, REP_ACK))
    exactly(sock, REQUEST_BYTES)


def never_reads(sock: socket.socket) -> None:
    """Negotiate well, then take requests and answer none."""
    until_go(sock)
    sock.sendall(export() + reply(GO, REP_ACK))
    stay(sock)


def empty(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(export(size=0) + reply(GO, REP_ACK))
    stay(sock)


def read_only(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(export(flags=HAS_FLAGS | READ_ONLY) + reply(GO, REP_ACK))
    stay(sock)


def wants_tls(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(reply(GO, ERR_TLS_REQUIRED))
    stay(sock)


def shuts_down(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(reply(GO, ERR_SHUTDOWN))
    stay(sock)


def huge_reply(sock: socket.socket) -> None:
    until_go(sock)
    sock.sendall(REPLY.pack(REPLY_MAGIC, GO, REP_INFO, 0xFFFFFFFF))
    stay(sock)


def too_large(sock: socket.socket) -> None:
    """An export that no kernel can address."""
    until_go(sock)
    sock.sendall(export(size=(1 << 64) - 512) + reply(GO, REP_ACK))
    stay(sock)


BEHAVIOURS: tuple[Callable[[socket.socket], None], ...] = (
    *(silent, slowly, http, garbage, closes_at_once, resets, closes_in_greeting, closes_after_greeting),
    *(closes_when_asked, closes_in_reply, closes_before_acknowledgement, closes_after_acknowledgement),
    *(closes_at_first_read, never_reads, empty, read_only, wants_tls, shuts_down, huge_reply, too_large),
)

PORTS = {behaviour.__name__: number for number, behaviour in enumerate(BEHAVIOURS)}
"""Offset of each behaviour's port from the first one."""


def answer(sock: socket.socket, behaviour: Callable[[socket.socket], None]) -> None:
    with sock:
        try:
            behaviour(sock)
        except OSError:
            return


def listen(port: int, behaviour: Callable[[socket.socket], None]) -> None:
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            sock, _ = server.accept()
            threading.Thread(target=answer, args=(sock, behaviour), daemon=True).start()


def main() -> None:
    first = int(sys.argv[1])
    threads = [threading.Thread(target=listen, args=(first + n, known)) for n, known in enumerate(BEHAVIOURS)]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
