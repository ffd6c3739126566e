# SPDX-License-Identifier: MIT
"""Servers that mean harm, over sockets: what each says, and what becomes of it."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nbdd.errors import NegotiationFailed, NoSuchExport, ServerError, TLSFailed
from nbdd.protocol import Flags
from nbdd.protocol.constants import NBDMAGIC, OLDSTYLE_MAGIC, Info, Opt, Rep, RepErr
from tests.fakes.servers import (
    GO,
    HAS_FLAGS,
    MIB,
    accepts,
    ack,
    entry,
    greeting,
    info,
    info_blocks,
    info_export,
    receive,
    reply,
    says,
    says_and_closes,
)

ABORT, LIST, INFO = int(Opt.NBD_OPT_ABORT), int(Opt.NBD_OPT_LIST), int(Opt.NBD_OPT_INFO)
CAN_MULTI_CONN = HAS_FLAGS | int(Flags.NBD_FLAG_CAN_MULTI_CONN)

ESCAPES = b"\x1b]0;owned\x07\x1b[2J\x1b[31m\r\n\x9b\xff \xe2\x80\xae\xe2\x81\xa6"
"""A terminal that sees this changes its title, its colours and its contents, rings and turns the text around."""

MANY = 1_000_000

Serve = Callable[[socket.socket], None]


def listen(conn: socket.socket) -> None:
    """Until the client leaves. After NBD_OPT_GO, what it sends are no options any more."""
    while conn.recv(65536):
        pass
    raise ConnectionAbortedError


def answers(answer: Callable[[int], Iterable[bytes]]) -> Serve:
    """A server that greets well and says `answer(option)` to each option, and goes when asked to."""

    def serve(conn: socket.socket) -> None:
        conn.sendall(greeting())
        receive(conn, 4)
        while True:
            option, length = struct.unpack(">8xII", receive(conn, 16))
            receive(conn, length)
            if option == ABORT:
                conn.sendall(ack(option))
                return
            for octets in answer(option):
                conn.sendall(octets)
            if option == GO:
                listen(conn)

    return serve


@dataclass(frozen=True)
class Misdeed:
    """What a server does to an option, and how that ends."""

    answer: Callable[[int], Iterable[bytes]]
    words: str
    error: type[ServerError] = NegotiationFailed
    options: tuple[int, ...] = (GO, LIST, INFO)
    """Where it makes sense."""

    def server(self, at: int) -> Serve:
        """One that behaves well until it is asked `at`."""
        return answers(lambda option: self.answer(option) if option == at else [entry(b"x") + ack(option)])


def closes(conn: socket.socket) -> None:
    conn.shutdown(socket.SHUT_RDWR)


def leaves(octets: bytes) -> Iterable[bytes]:
    """Say this and close the connection."""
    yield octets
    raise ConnectionAbortedError


DESCRIBING = (GO, INFO)


def blocks(minimum: int, preferred: int, maximum: int) -> Misdeed:
    """Block sizes that no export can have."""
    return Misdeed(
        lambda option: [info_blocks(option, minimum, preferred, maximum) + accepts(option)],
        f"(minimum {minimum}, preferred {preferred}, maximum {maximum})",
        options=DESCRIBING,
    )


MISDEEDS: dict[str, Misdeed] = {
    # Replies as such.
    "four-gigabytes": Misdeed(
        lambda option: [reply(option, 3, length=0xFFFFFFFF)], "with 4294967295 bytes; nbdd reads"
    ),
    "two-gigabytes": Misdeed(lambda option: [reply(option, 99, length=1 << 31)], "with 2147483648 bytes; nbdd reads"),
    "one-byte-too-many": Misdeed(lambda option: [reply(option, 99, length=16385)], "with 16385 bytes; nbdd reads"),
    "wrong-magic": Misdeed(lambda option: [reply(option, 1, magic=1)], "does not begin with the magic number"),
    "wrong-option": Misdeed(lambda option: [reply(option + 1, 1)], "answered option"),
    "no-option": Misdeed(lambda _: [reply(0, 1)], "answered option 0 when"),
    "a-web-page": Misdeed(lambda _: [b"HTTP/1.1 400 Bad Request\r\n\r\n"], "does not begin with the magic number"),
    "a-second-greeting": Misdeed(lambda _: [greeting() + bytes(20)], "does not begin with the magic number"),
    "data-at-the-end": Misdeed(lambda option: [reply(option, 1, b"data")], "sent 4 bytes of data with the end"),
    "meta-context": Misdeed(lambda option: [reply(option, Rep.NBD_REP_META_CONTEXT)], "which is no answer to that"),
    "a-million-replies": Misdeed(
        lambda option: itertools.repeat(1000 * reply(option, 99), MANY // 1000),
        "sent more than 256",
        options=DESCRIBING,
    ),
    "a-million-large-replies": Misdeed(
        lambda option: itertools.repeat(reply(option, 99, bytes(16384)), MANY),
        "sent replies without end",
        options=(LIST,),
    ),
    "closes": Misdeed(lambda _: leaves(b""), "closed the connection when its reply to NBD_OPT_"),
    "closes-in-a-header": Misdeed(lambda option: leaves(ack(option)[:13]), "after only 13 of 20 bytes of its reply"),
    "closes-before-the-data": Misdeed(lambda option: leaves(reply(option, 3, length=12)), "when its reply to NBD_OPT_"),
    "closes-in-the-data": Misdeed(
        lambda option: leaves(reply(option, 3, b"data", length=12)), "after only 4 of 12 bytes of its reply"
    ),
    # What is said of an export.
    "size-negative": Misdeed(lambda option: [accepts(option, 1 << 63)], "more than any device", options=DESCRIBING),
    "size-minus-one-block": Misdeed(
        lambda option: [accepts(option, (1 << 64) - 512)], "more than any device", options=DESCRIBING
    ),
    "no-size": Misdeed(lambda option: [ack(option)], "without saying its size", options=DESCRIBING),
    "a-short-size": Misdeed(lambda option: [info(option, 0, bytes(9))], "it must be 10", options=DESCRIBING),
    "a-long-size": Misdeed(lambda option: [info(option, 0, bytes(11))], "it must be 10", options=DESCRIBING),
    "an-info-of-nothing": Misdeed(lambda option: [reply(option, 3, b"\0")], "without its type", options=DESCRIBING),
    "minimum-0": blocks(0, 512, 512),
    "minimum-3": blocks(3, 512, 512),
    "minimum-4294967295": blocks(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    "minimum-2147483648": blocks(1 << 31, 1 << 31, 1 << 31),
    "preferred-0": blocks(512, 0, 4096),
    "preferred-3": blocks(512, 3, 4096),
    "preferred-4294967295": blocks(512, 0xFFFFFFFF, 0xFFFFFFFF),
    "maximum-0": blocks(512, 4096, 0),
    "maximum-3": blocks(512, 4096, 3),
    "two-sizes": Misdeed(
        lambda option: [info_export(option, MIB), accepts(option, 2 * MIB)], "twice for one export", options=DESCRIBING
    ),
    "two-block-sizes": Misdeed(
        lambda option: [info_blocks(option, 1, 512, 512), info_blocks(option, 512, 512, 512)],
        "sent NBD_INFO_BLOCK_SIZE twice for one export, with different content",
        options=DESCRIBING,
    ),
    "two-names": Misdeed(
        lambda option: [info(option, 1, b"one"), info(option, 1, ESCAPES)], "NBD_INFO_NAME twice", options=DESCRIBING
    ),
    "a-name-too-long": Misdeed(
        lambda option: [info(option, 1, b"n" * 4097)], "an export name of 4097 bytes", options=DESCRIBING
    ),
    "a-name-with-a-nul": Misdeed(
        lambda option: [info(option, 1, ESCAPES + b"\0")], "a NUL character in it: '\\x1b]0;owned", options=DESCRIBING
    ),
    "a-description-with-a-nul": Misdeed(
        lambda option: [info(option, 2, b"\0" + ESCAPES)], "a NUL character in it", options=DESCRIBING
    ),
    # Refusals. In a list they are about one export, and harm no other.
    "unknown": Misdeed(
        lambda option: [reply(option, RepErr.NBD_REP_ERR_UNKNOWN, ESCAPES)],
        "It says: '\\x1b]0;owned\\x07\\x1b[2J\\x1b[31m\\r\\n\\x9b\\xff \\u202e\\u2066'.",
        NoSuchExport,
        (GO, LIST),
    ),
    "policy": Misdeed(
        lambda option: [reply(option, RepErr.NBD_REP_ERR_POLICY, ESCAPES * 500)],
        "It says: '\\x1b]0;",
        options=(GO, LIST),
    ),
    "tls": Misdeed(
        lambda option: [reply(option, RepErr.NBD_REP_ERR_TLS_REQD, ESCAPES)], "(TLS)", TLSFailed, (GO, LIST)
    ),
    "a-new-error": Misdeed(
        lambda option: [reply(option, 0xFFFFFFFF, ESCAPES)], "the unknown error 0xffffffff", options=(GO, LIST)
    ),
    "a-long-error": Misdeed(
        lambda option: [reply(option, 0x80000002, length=1 << 20)], "with 1048576 bytes; nbdd reads"
    ),
    # Lists.
    "a-million-exports": Misdeed(
        lambda _: itertools.repeat(1000 * entry(b"x"), MANY // 1000), "lists too much", options=(LIST,)
    ),
    "a-million-long-names": Misdeed(
        lambda _: itertools.repeat(entry(b"n" * 4096, b"d" * 4096), MANY), "lists too much", options=(LIST,)
    ),
    "a-name-longer-than-its-entry": Misdeed(
        lambda _: [reply(LIST, 2, b"\xff\xff\xff\xff" + bytes(20))], "longer than the entry", options=(LIST,)
    ),
    "an-entry-without-a-name": Misdeed(lambda _: [reply(LIST, 2, b"\0\0\0")], "longer than the entry", options=(LIST,)),
    "a-listed-name-too-long": Misdeed(lambda _: [entry(b"n" * 4097)], "name of 4097 bytes", options=(LIST,)),
    "a-listed-name-with-a-nul": Misdeed(lambda _: [entry(ESCAPES + b"\0")], "a NUL character", options=(LIST,)),
    "a-list-of-infos": Misdeed(lambda option: [info_export(option)], "which is no answer to that", options=(LIST,)),
}
"""By name. The error of each has these words, and ends the negotiation without a deadline."""

IMPOSTORS: dict[str, tuple[Serve, str]] = {
    # Before any option.
    "closes": (closes, "the connection"),
    "closes-in-the-greeting": (says_and_closes(NBDMAGIC + b"IHAVE"), "after only 5 of 8 bytes of its greeting"),
    "closes-after-the-greeting": (says_and_closes(greeting(), after=4), "the connection"),
    "web-server": (says_and_closes(b"HTTP/1.1 408 Request Timeout\r\n\r\n"), "not an NBD server but a web server"),
    "escapes": (says_and_closes(ESCAPES), "its first bytes are '\\x1b]0;owne'"),
    "oldstyle": (says(NBDMAGIC + OLDSTYLE_MAGIC + bytes(136)), "speaks the oldstyle NBD protocol"),
    "not-fixed": (says(greeting(2)), "as it was before 2012"),
    "wrong-second-magic": (says(NBDMAGIC + ESCAPES), "greeted with '\\x1b]0;owne'"),
    "nothing-but-zeroes": (says(bytes(4096)), "is not an NBD server"),
}
"""What they do, and words of the sentence."""

GOOD: dict[int, bytes] = {
    GO: info(GO, Info.NBD_INFO_NAME, b"name")
    + info(GO, Info.NBD_INFO_DESCRIPTION, b"description")
    + info_blocks(GO, 512, 4096, 1 << 25)
    + info(GO, 99, b"unknown")
    + accepts(GO, flags=CAN_MULTI_CONN),
    LIST: entry(b"x", b"described") + entry(b"") + ack(LIST),
    INFO: info_blocks(INFO, 512, 4096, 1 << 25) + accepts(INFO),
}
"""What a good server answers."""


def dialogue(option: int) -> int:
    """Bytes that a good server says to a client that begins with this option, but for the farewell."""
    return len(greeting() + GOOD[option]) + (2 * len(GOOD[INFO]) if option == LIST else 0)


def good_until(count: int, then: Callable[[socket.socket, bytes], None]) -> Serve:
    """A good server for its first `count` bytes; what follows in the same message goes to `then`."""

    def serve(conn: socket.socket) -> None:
        left = count

        def say(octets: bytes) -> None:
            nonlocal left
            conn.sendall(octets[:left])
            if octets[left:]:
                then(conn, octets[left:])
            left = max(0, left - len(octets))

        say(greeting())
        receive(conn, 4)
        while True:
            option, length = struct.unpack(">8xII", receive(conn, 16))
            receive(conn, length)
            say(GOOD.get(option, b""))
            if option == GO:
                listen(conn)

    return serve


def cut(counts: Iterable[int]) -> Serve:
    """A server that closes each connection after the next of so many bytes."""
    turns = iter(counts)

    def leave(_conn: socket.socket, _octets: bytes) -> None:
        raise ConnectionAbortedError

    def serve(conn: socket.socket) -> None:
        good_until(next(turns), leave)(conn)

    return serve


class Patience:
    """Servers that take their time, all of it; they end when `over` is set."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def silent(self, count: int) -> Serve:
        """Say so many bytes and no more."""
        return good_until(count, lambda _conn, _octets: self._wait(None))

    def slow(self, count: int, pause: float) -> Serve:
        """Say so many bytes at once, and each of the others after a pause, in seconds."""

        def drip(conn: socket.socket, octets: bytes) -> None:
            for octet in octets:
                self._wait(pause)
                conn.sendall(bytes([octet]))

        return good_until(count, drip)

    def deaf(self, option: int) -> Serve:
        """Read nothing, and say what a client that begins with this option waits for, but for the last byte."""

        def serve(conn: socket.socket) -> None:
            conn.sendall(greeting() + GOOD[option][:-1])
            self._wait(None)

        return serve

    def _wait(self, seconds: float | None) -> None:
        if self.over.wait(seconds):
            raise ConnectionAbortedError
