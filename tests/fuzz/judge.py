# SPDX-License-Identifier: MIT
"""What holds for every negotiation, whatever the server says. Nothing here is shared with what it judges but names."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any, Protocol, cast

from nbdd.errors import NegotiationFailed, NoSuchExport, ServerError, TimedOut, TLSFailed
from nbdd.protocol import Export, Flags, Steps, go, info, list_exports, negotiation
from nbdd.protocol.constants import REPLY_MAGIC, HandshakeFlags, Info, Opt, Rep, RepErr
from nbdd.server.connect import Deadline, negotiate
from tests.fakes.servers import parse_client

LIST, INFO, GO, EXPORT_NAME, ABORT = (
    int(option)
    for option in (
        Opt.NBD_OPT_LIST,
        Opt.NBD_OPT_INFO,
        Opt.NBD_OPT_GO,
        Opt.NBD_OPT_EXPORT_NAME,
        Opt.NBD_OPT_ABORT,
    )
)

NEGOTIATIONS: dict[str, Callable[[str], Steps[Any]]] = {
    "go": go,
    "info": info,
    "list": lambda _: list_exports(),
}

GREETING_BYTES = 18
OLD_REPLY_BYTES = 134
"""The longest answer to NBD_OPT_EXPORT_NAME."""

MAX_READ = 16 << 10
"""Bytes that may be asked for, and so allocated, at once."""

MAX_MESSAGE = 5000
"""Characters of an error's text: at most two strings of a stranger, 200 characters of each, escaped with up to 10."""

REFUSALS = (NegotiationFailed, NoSuchExport, TLSFailed, TimedOut)
SECONDS = 3600.0
ADDRESS = "server.example:10809"


class Server(Protocol):
    """Who is at the other end of a `Wire`."""

    def hear(self, octets: bytes) -> None:
        """Take what the client sent, or raise OSError as its socket would."""

    def say(self) -> bytes:
        """The next words; none at all to hang up. May raise OSError."""

    def piece(self, count: int) -> int:
        """How many bytes of `count` arrive at once, at least 1."""


class Wire:
    """Stands in for the connected socket, and notes what goes over it."""

    family = socket.AF_UNIX

    def __init__(self, server: Server) -> None:
        self.sent = bytearray()
        self.read = bytearray()
        self.largest = 0
        """Most bytes that were asked for at once: what one allocation may take."""
        self._server = server
        self._said = bytearray()
        self._seconds: float | None = None

    def settimeout(self, seconds: float | None) -> None:
        self._seconds = seconds

    def _waits(self) -> None:
        assert self._seconds is not None, "it would wait for ever"
        assert 0 < self._seconds <= SECONDS

    def sendall(self, octets: bytes) -> None:
        self._waits()
        self._server.hear(octets)
        self.sent += octets

    def recv(self, count: int) -> bytes:
        self._waits()
        assert count > 0
        self.largest = max(self.largest, count)
        if not self._said:
            self._said += self._server.say()
        octets = bytes(self._said[: self._server.piece(min(count, len(self._said)) or 1)])
        del self._said[: len(octets)]
        self.read += octets
        return octets


def judge(kind: str, export: str, server: Server) -> Export | list[Export] | ServerError:
    """Run one negotiation and return how it ended; AssertionError where a promise is broken."""
    wire = Wire(server)
    outcome: Export | list[Export] | ServerError
    try:
        outcome = negotiate(cast(socket.socket, wire), NEGOTIATIONS[kind](export), Deadline(SECONDS), address=ADDRESS)
    except ServerError as error:
        outcome = error
        _check_error(error)
    _check_bounds(wire)
    flags, options = _check_sent(kind, wire)
    if not isinstance(outcome, ServerError):
        _check_result(outcome, wire, export, flags, options)
    return outcome


def _check_error(error: ServerError) -> None:
    text = str(error)
    assert type(error) in REFUSALS, repr(error)
    assert text.isprintable(), repr(text)
    assert text.startswith(f"The NBD server {ADDRESS} "), text
    assert text.endswith("."), text
    assert len(text) <= MAX_MESSAGE, len(text)


def _check_bounds(wire: Wire) -> None:
    assert wire.largest <= MAX_READ
    assert len(wire.read) <= GREETING_BYTES + negotiation.MAX_NEGOTIATION + OLD_REPLY_BYTES


def _check_sent(kind: str, wire: Wire) -> tuple[int, list[int]]:
    """The client's own words have their form and their order; returns its flags and options."""
    if not wire.sent:
        return 0, []
    flags, asked = parse_client(bytes(wire.sent))
    options = [option for option, _ in asked]
    assert flags in (1, 3)
    body = options[:-1] if options[-1:] == [ABORT] else options
    if kind == "go":
        assert body in ([], [GO], [GO, EXPORT_NAME])
        assert options != [GO, EXPORT_NAME, ABORT]
    elif kind == "info":
        assert body in ([], [INFO])
    else:
        assert body in ([], [LIST, *[INFO] * (len(body) - 1)])
        assert len(body) <= 1 + negotiation.MAX_DESCRIBED
    return flags, options


def _check_result(result: Export | list[Export], wire: Wire, export: str, flags: int, options: list[int]) -> None:
    """It is what the server said, by a second reading of the same bytes."""
    offered = int.from_bytes(wire.read[16:GREETING_BYTES], "big")
    assert wire.read[:16] == b"NBDMAGICIHAVEOPT"
    assert offered & HandshakeFlags.NBD_FLAG_FIXED_NEWSTYLE
    assert flags == offered & 3
    said = Said(bytes(wire.read[GREETING_BYTES:]))
    if isinstance(result, list):
        _check_list(result, said)
    elif options == [GO, EXPORT_NAME]:
        kind, _ = said.answer(GO)
        assert kind == RepErr.NBD_REP_ERR_UNSUP
        size, transmission = struct.unpack(">QH", said.take(10))
        assert result == Export(export, size, Flags(transmission))
        if not flags & 2:
            said.take(124)
    else:
        assert result == said.export(options[0], export)
    assert said.over, "more was read than the handshake has"
    for one in result if isinstance(result, list) else [result]:
        _check_export(one)


def _check_list(result: list[Export], said: Said) -> None:
    entries = said.entries()
    assert [export.name.encode("utf-8", "surrogateescape") for export in result] == [name for name, _ in entries]
    assert len(result) <= negotiation.MAX_EXPORTS
    in_time = True
    for number, (export, (_, description)) in enumerate(zip(result, entries, strict=True)):
        if in_time and "not described in time" in export.problem:
            assert number > 0, "nothing was described, and it passed for a list"
            in_time = False
            # The last answer may be cut off anywhere.
            said.drop()
        assert in_time == ("not described in time" not in export.problem)
        sent = None if said.over else said.export(INFO, export.name)
        shown = description.decode("utf-8", "surrogateescape")
        if sent is None:
            assert export == Export(export.name, 0, Flags(0), description=shown, problem=export.problem)
            assert export.problem
        else:
            assert (export.size, export.flags) == (sent.size, sent.flags)
            assert (export.minimum, export.preferred, export.maximum) == (
                sent.minimum,
                sent.preferred,
                sent.maximum,
            )
            assert export.description == (sent.description or shown)
            assert bool(export.problem) == (export.size == 0)


def _check_export(export: Export) -> None:
    assert 0 <= export.size < 1 << 63
    sizes = (export.minimum, export.preferred, export.maximum)
    if sizes != (None, None, None):
        minimum, preferred, maximum = (size or 0 for size in sizes)
        assert minimum.bit_count() == preferred.bit_count() == 1
        assert minimum <= 65536
        assert max(minimum, 512) <= preferred <= maximum < 1 << 32
    wire = json.dumps(export.to_wire())
    assert wire.isascii()
    assert Export.from_wire(json.loads(wire)) == export
    assert export.problem.isprintable()
    for text in (export.name, export.description):
        assert "\0" not in text
        assert len(text.encode("utf-8", "surrogateescape")) <= 4096


class Said:
    """What a server said after its greeting, read for a second time, by other code."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._at = 0

    @property
    def over(self) -> bool:
        return self._at == len(self._octets)

    def drop(self) -> None:
        """Read no further."""
        self._at = len(self._octets)

    def take(self, count: int) -> bytes:
        octets = self._octets[self._at : self._at + count]
        self._at += count
        assert len(octets) == count
        return octets

    def answer(self, option: int) -> tuple[int, list[tuple[int, bytes]]]:
        """The kind of the last reply to `option`, and those before it."""
        before: list[tuple[int, bytes]] = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, echoed) == (REPLY_MAGIC, option)
            data = self.take(length)
            if kind == Rep.NBD_REP_ACK or kind >> 31:
                assert kind >> 31 or not data, "an acknowledgement has no data"
                assert len(before) < negotiation.MAX_INFOS or option == LIST
                return kind, before
            before.append((kind, data))

    def entries(self) -> list[tuple[bytes, bytes]]:
        """Name and description of each."""
        kind, replies = self.answer(LIST)
        assert kind == Rep.NBD_REP_ACK
        found = []
        for number, data in replies:
            if number == Rep.NBD_REP_SERVER:
                end = 4 + int.from_bytes(data[:4], "big")
                assert 4 <= end <= len(data)
                found.append((data[4:end], data[end:]))
        return found

    def export(self, option: int, name: str) -> Export | None:
        """What it said of an export, or None where it refused."""
        kind, replies = self.answer(option)
        if kind != Rep.NBD_REP_ACK:
            return None
        sent: dict[int, bytes] = {}
        for number, data in replies:
            if number == Rep.NBD_REP_INFO:
                info_type, payload = int.from_bytes(data[:2], "big"), data[2:]
                if info_type in set(Info):
                    assert sent.setdefault(info_type, payload) == payload, "a contradiction was believed"
        size, flags = struct.unpack(">QH", sent[Info.NBD_INFO_EXPORT])
        minimum = preferred = maximum = None
        if Info.NBD_INFO_BLOCK_SIZE in sent:
            minimum, preferred, maximum = struct.unpack(">III", sent[Info.NBD_INFO_BLOCK_SIZE])
        called = sent.get(Info.NBD_INFO_NAME)
        text = name if called is None else called.decode("utf-8", "surrogateescape")
        description = sent.get(Info.NBD_INFO_DESCRIPTION, b"").decode("utf-8", "surrogateescape")
        return Export(text, size, Flags(flags), minimum, preferred, maximum, description)
