# SPDX-License-Identifier: MIT
"""The handshake phase of fixed newstyle NBD, as a client, without any I/O.

Each of `go`, `info` and `list_exports` is a generator. It yields a `Send` or a `Receive`, and is sent the bytes that
were received: exactly as many as it asked for, so that no byte of the transmission phase is read here. After `go` the
connection belongs to the kernel. If the request fails, the driver throws a `ServerError` into the generator.

The text of an error begins with a verb: the driver puts "The NBD server <address>" before it.

Structured replies, extended headers and metadata contexts are never negotiated: the kernel's driver has none.
Sections named here are those of doc/proto.md.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Generator
from dataclasses import replace
from typing import TypeAlias, TypeVar

from nbdd.errors import NegotiationFailed, ServerError, TimedOut
from nbdd.protocol.constants import (
    EXPORT_NAME_PADDING,
    IHAVEOPT,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    REP_FLAG_ERROR,
    REPLY_MAGIC,
    ClientFlags,
    Flags,
    HandshakeFlags,
    Info,
    Opt,
    Rep,
    RepErr,
)
from nbdd.protocol.error_reply import ErrorReply
from nbdd.protocol.export import Export, Infos, parse_size_and_flags
from nbdd.protocol.text import MAX_SHOWN, MAX_STRING, decode, encode
from nbdd.text import quoted

MAX_REPLY = 4 * MAX_STRING
"""Bytes in one reply. The longest known one holds two strings; the rest is for unknown ones, which are skipped."""

MAX_INFOS = 256
"""Replies to one question about an export. Four are requested; a server may add some, which are skipped."""

MAX_EXPORTS = 100_000
"""Names in a list: far beyond what any server offers, and still a list that this machine can hold."""

MAX_LIST = 16 << 20
"""Bytes of all names and descriptions in a list: 160 for each of MAX_EXPORTS, so that one does not imply gigabytes."""

MAX_DESCRIBED = 1000
"""Exports of a list whose size is asked for. Each costs a round trip, since the protocol allows one open option."""

MAX_NEGOTIATION = 32 << 20
"""Bytes of all replies in one negotiation, the skipped ones too. MAX_LIST, the headers of MAX_EXPORTS replies, and the
longest names and descriptions for MAX_DESCRIBED exports come to 26 MiB; replies to skip could be gigabytes."""

REQUESTED = (Info.NBD_INFO_EXPORT, Info.NBD_INFO_BLOCK_SIZE, Info.NBD_INFO_NAME, Info.NBD_INFO_DESCRIPTION)

_NOT_ASKED = f"It was not asked: nbdd asks for the first {MAX_DESCRIBED} exports of a list."

_TOO_SLOW = "It was not described in time: the server took too long over this one and those before it."

_TOO_OLD = "The server is too old to describe an export without opening it."

_SIZE_ZERO = "The server gives its size as 0; nbd-server does that for every export until it is opened."
# Measured with nbd-server 3.24. The size in its answer to NBD_OPT_GO is right, but only if NBD_OPT_INFO did not come
# before it on that connection.

_REPLY = struct.Struct(">QIII")


class Send:
    """Asks the driver to send `data`, called `what` in messages."""

    __slots__ = ("data", "what")

    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.what = what


class Receive:
    """Asks the driver to receive exactly `count` bytes; `hint` is a sentence for the error if nothing comes at all."""

    __slots__ = ("count", "hint", "what")

    def __init__(self, count: int, what: str, hint: str = "") -> None:
        self.count = count
        self.what = what
        self.hint = hint


_T = TypeVar("_T")
Steps: TypeAlias = Generator[Send | Receive, bytes, _T]
"""A negotiation that ends with a `_T`."""


def go(export: str) -> Steps[Export]:
    """Open `export` (empty: the server's default). When this returns the connection is in the transmission phase.

    NBD_OPT_GO is used, and NBD_OPT_EXPORT_NAME only if the server says that it does not know NBD_OPT_GO: any other
    error is final, above all the demand for TLS.
    Raises `NoSuchExport`, `TLSFailed`, and `NegotiationFailed` for the rest.
    """
    no_zeroes = yield from _greet()
    answer = yield from _describe(Opt.NBD_OPT_GO, export, _Budget())
    if isinstance(answer, Export):
        return answer
    if answer.kind == RepErr.NBD_REP_ERR_UNSUP:
        return (yield from _export_name(export, no_zeroes))
    yield from _abort()
    raise answer.error(export)


def info(export: str) -> Steps[Export]:
    """Ask what `go` would give, and end the session. Raises what `go` raises, and if there is no NBD_OPT_INFO."""
    yield from _greet()
    answer = yield from _describe(Opt.NBD_OPT_INFO, export, _Budget())
    yield from _abort()
    if isinstance(answer, Export):
        return answer
    raise answer.error(export)


def list_exports() -> Steps[list[Export]]:
    """List all exports that the server shows, in its order, each described as far as possible, and end the session.

    An export that the server does not describe has a `problem`, and so have those after MAX_DESCRIBED and those for
    which there was no time left. Raises `NegotiationFailed` if the server does not list, `TLSFailed` if it wants TLS.
    """
    yield from _greet()
    budget = _Budget()
    listed = yield from _list(budget)
    if isinstance(listed, ErrorReply):
        yield from _abort()
        raise listed.error("")
    exports: list[Export] = []
    undescribed = ""
    for name, description in listed:
        if not undescribed and len(exports) >= MAX_DESCRIBED:
            undescribed = _NOT_ASKED
        if not undescribed:
            try:
                answer = yield from _describe(Opt.NBD_OPT_INFO, name, budget)
            except TimedOut:
                if not exports:
                    raise
                # A question costs a round trip, and a thousand of them to a server far away more than the time allows.
                # The descriptions that came are worth more than an error.
                undescribed = _TOO_SLOW
        if undescribed:
            exports.append(Export(name, 0, Flags(0), description=description, problem=undescribed))
            continue
        if isinstance(answer, Export):
            # Keep the name of the list, by which the export can be opened. INFO's may be the same for several.
            problem = "" if answer.size else _SIZE_ZERO
            described = answer.description or description
            exports.append(replace(answer, name=name, description=described, problem=problem))
            continue
        if answer.kind == RepErr.NBD_REP_ERR_SHUTDOWN:
            yield from _abort()
            raise answer.error(name)
        if answer.kind == RepErr.NBD_REP_ERR_UNSUP:
            undescribed = _TOO_OLD
        problem = f"The server {answer.error(name)}"
        exports.append(Export(name, 0, Flags(0), description=description, problem=problem))
    yield from _abort()
    return exports


def _greet() -> Steps[bool]:
    """Exchange greetings (Newstyle negotiation); return whether both sides set NO_ZEROES."""
    what = "its greeting"
    magic = yield Receive(8, what, "Perhaps it is not an NBD server, or does not let this machine in.")
    if magic != NBDMAGIC:
        kind = " but a web server" if magic.startswith(b"HTTP") else ""
        raise NegotiationFailed(f"is not an NBD server{kind}: its first bytes are {quoted(magic, MAX_SHOWN)}.")
    style = yield Receive(8, what)
    if style == OLDSTYLE_MAGIC:
        raise NegotiationFailed("speaks the oldstyle NBD protocol, which has no export names; nbdd needs newstyle.")
    if style != IHAVEOPT:
        raise NegotiationFailed(f"greeted with {quoted(style, MAX_SHOWN)} instead of 'IHAVEOPT'.")
    offered = HandshakeFlags(int.from_bytes((yield Receive(2, what)), "big"))
    if HandshakeFlags.NBD_FLAG_FIXED_NEWSTYLE not in offered:
        raise NegotiationFailed("speaks newstyle NBD as it was before 2012; nbdd needs the fixed newstyle.")
    no_zeroes = HandshakeFlags.NBD_FLAG_NO_ZEROES in offered
    flags = ClientFlags.NBD_FLAG_C_FIXED_NEWSTYLE
    if no_zeroes:
        flags |= ClientFlags.NBD_FLAG_C_NO_ZEROES
    yield Send(int(flags).to_bytes(4, "big"), "our greeting")
    return no_zeroes


def _option(option: Opt, data: bytes = b"") -> Send:
    return Send(IHAVEOPT + struct.pack(">II", option, len(data)) + data, option.name)


class _Budget:
    """How many bytes of replies are still accepted."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_NEGOTIATION

    def spend(self, count: int) -> int:
        """Return the count if the budget has room for it; otherwise raise `NegotiationFailed`."""
        self.left -= count
        if self.left < 0:
            raise NegotiationFailed(f"sent replies without end; nbdd reads {MAX_NEGOTIATION >> 20} MiB of them.")
        return count


def _reply(option: Opt, budget: _Budget) -> Steps[tuple[int, bytes]]:
    """Type and data of one reply to `option` (Fixed newstyle negotiation)."""
    what = f"its reply to {option.name}"
    magic, echoed, kind, length = _REPLY.unpack((yield Receive(budget.spend(_REPLY.size), what)))
    if magic != REPLY_MAGIC:
        raise NegotiationFailed(f"sent something else than {what}: it does not begin with the magic number of replies.")
    if echoed != option:
        raise NegotiationFailed(f"answered option {echoed} when {option.name} ({int(option)}) was open.")
    if length > MAX_REPLY:
        raise NegotiationFailed(f"announced {what} with {length} bytes; nbdd reads up to {MAX_REPLY}.")
    data = (yield Receive(budget.spend(length), what)) if length else b""
    if kind == Rep.NBD_REP_ACK and data:
        # "No data." After NBD_OPT_GO the next byte belongs to the kernel, so there must be no doubt about which it is.
        raise NegotiationFailed(f"sent {length} bytes of data with the end of {what}, which has none.")
    return kind, data


def _describe(option: Opt, export: str, budget: _Budget) -> Steps[Export | ErrorReply]:
    """NBD_OPT_GO or NBD_OPT_INFO, which have the same question and answers."""
    name = encode(export)
    wanted = struct.pack(f">H{len(REQUESTED)}H", len(REQUESTED), *REQUESTED)
    yield _option(option, struct.pack(">I", len(name)) + name + wanted)
    infos = Infos()
    for _ in range(MAX_INFOS):
        kind, data = yield from _reply(option, budget)
        if kind == Rep.NBD_REP_ACK:
            return infos.export(export)
        if kind & REP_FLAG_ERROR:
            return ErrorReply(option, kind, data)
        if kind == Rep.NBD_REP_INFO:
            infos.add(data)
        else:
            _skip(option, kind)
    raise NegotiationFailed(f"sent more than {MAX_INFOS} replies to {option.name}.")


def _list(budget: _Budget) -> Steps[list[tuple[str, str]] | ErrorReply]:
    """NBD_OPT_LIST: name and description of each export."""
    option = Opt.NBD_OPT_LIST
    yield _option(option)
    found: list[tuple[str, str]] = []
    octets = 0
    for _ in range(MAX_EXPORTS + MAX_INFOS):
        kind, data = yield from _reply(option, budget)
        if kind == Rep.NBD_REP_ACK:
            return found
        if kind & REP_FLAG_ERROR:
            return ErrorReply(option, kind, data)
        if kind != Rep.NBD_REP_SERVER:
            _skip(option, kind)
            continue
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 or length > len(data) - 4:
            raise NegotiationFailed("sent an entry of its list whose name is longer than the entry.")
        found.append((decode(data[4 : 4 + length], "an export name"), decode(data[4 + length :], "a description")))
        octets += len(data)
        if len(found) > MAX_EXPORTS or octets > MAX_LIST:
            break
    raise NegotiationFailed(f"lists too much: nbdd reads {MAX_EXPORTS} exports and {MAX_LIST >> 20} MiB of names.")


def _skip(option: Opt, kind: int) -> None:
    """Skip a reply of an unknown type; raise `NegotiationFailed` for a known type, which is out of place here."""
    if kind in (Rep.NBD_REP_SERVER, Rep.NBD_REP_INFO, Rep.NBD_REP_META_CONTEXT):
        raise NegotiationFailed(f"answered {option.name} with {Rep(kind).name}, which is no answer to that.")


def _export_name(export: str, no_zeroes: bool) -> Steps[Export]:
    """NBD_OPT_EXPORT_NAME. A server that does not have the export can only close the connection."""
    yield _option(Opt.NBD_OPT_EXPORT_NAME, encode(export))
    name = quoted(export, MAX_SHOWN) if export else "a default export"
    what = f"its reply to {Opt.NBD_OPT_EXPORT_NAME.name}"
    payload = yield Receive(10, what, f"Most likely it does not have {name}; a server this old can't say so.")
    size, flags = parse_size_and_flags(payload)
    if not no_zeroes:
        yield Receive(EXPORT_NAME_PADDING, what)
    return Export(export, size, flags)


def _abort() -> Steps[None]:
    """End the session with NBD_OPT_ABORT, as a client must if there was no error (Termination of the session).

    The acknowledgement is not awaited: some servers just close, and a timeout would discard what a slow one has sent.
    """
    with contextlib.suppress(ServerError):
        yield _option(Opt.NBD_OPT_ABORT)
