# SPDX-License-Identifier: MIT
"""The connections of a device: negotiated, and checked against its definition."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self, TypeAlias

from nbdd.config.definition import Definition
from nbdd.errors import ConnectFailed, ExportChanged, NegotiationFailed, ServerError
from nbdd.limits import MIN_BLOCK_SIZE
from nbdd.protocol import Export, Flags
from nbdd.protocol.transmission import DISCONNECT
from nbdd.server.connect import Deadline, open_export
from nbdd.uri import URI

# include/net/tcp_states.h; `struct tcp_info` of linux/tcp.h begins with the state.
_FIN_WAIT1, _FIN_WAIT2, _CLOSED, _CLOSING = 4, 5, 7, 11
_TCP_INFO = struct.Struct("=B55xI")
"""tcpi_state, and tcpi_last_ack_recv in milliseconds."""


@dataclass(frozen=True, slots=True)
class Connections:
    """Negotiated connections to one export, which is the same on all of them."""

    uri: URI
    export: Export
    sockets: tuple[socket.socket, ...]
    block_size: int
    """Logical block size in bytes."""
    read_only: bool
    warnings: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect and close; only for connections that the kernel never got."""
        for sock in self.sockets:
            disconnect(sock)


Check: TypeAlias = Callable[[Connections], None]
"""Raises a ServerError if a server does not have what is wanted."""


def open_connections(
    definition: Definition, deadline: Deadline, connections: int | None = None, *, check: Check | None = None
) -> Connections:
    """Connect to the first server of the definition that offers what it asks for, and that passes `check`.

    `connections` is how many to open, by default the definition's number.
    Raises the ServerError of the only server, or one with the text of each: ExportChanged, if one of them is that, and
    otherwise the class of the last.
    """
    failures: list[ServerError] = []
    for number, uri in enumerate(definition.uri):
        try:
            # A server that is silent must leave time for the next one.
            left = len(definition.uri) - number
            share = deadline if left == 1 else Deadline(deadline.remaining() / left)
            opened = _open(definition, uri, share, connections or definition.connections)
            try:
                if check is not None:
                    check(opened)
            except BaseException:
                opened.close()
                raise
            return opened
        except ServerError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if not failures:
        raise ConnectFailed(f"{definition.name!r} names no server.")
    # ExportChanged says that data is at risk; else the last error is the one that the person just waited for.
    changed = any(isinstance(failure, ExportChanged) for failure in failures)
    raise (ExportChanged if changed else type(failures[-1]))(" ".join(str(failure) for failure in failures))


def _open(definition: Definition, uri: URI, deadline: Deadline, wanted: int) -> Connections:
    sock, export = open_export(uri, deadline, network_timeout=definition.network_timeout)
    sockets = [sock]
    try:
        block_size = _block_size(definition, uri, export)
        read_only = _read_only(definition, uri, export)
        if export.size == 0:
            raise NegotiationFailed(f"{uri} has a size of 0 bytes; there is nothing to attach.")
        if export.size < block_size:
            raise NegotiationFailed(f"{uri} has {export.size} bytes, less than one block of {block_size}.")
        warnings = []
        if wanted > 1 and not export.flags & Flags.NBD_FLAG_CAN_MULTI_CONN:
            warnings.append(f"{uri} does not allow several connections; one is used instead of {wanted}.")
            wanted = 1
        if export.size % block_size:
            warnings.append(
                f"{uri} has {export.size} bytes, no multiple of the block size {block_size}; "
                f"the last {export.size % block_size} are not reachable."
            )
        for _ in range(wanted - 1):
            other, other_export = open_export(uri, deadline, network_timeout=definition.network_timeout)
            sockets.append(other)
            difference = export_difference(export, other_export)
            if difference:
                raise NegotiationFailed(f"{uri} is not the same on every connection: {difference}.")
        return Connections(uri, export, tuple(sockets), block_size, read_only, tuple(warnings))
    except BaseException:
        for sock in sockets:
            disconnect(sock)
        raise


def disconnect(sock: socket.socket) -> None:
    """Send NBD_CMD_DISC and close a connection that never carried a request; servers log an error without it."""
    with suppress(OSError):
        sock.send(DISCONNECT, socket.MSG_DONTWAIT)
    sock.close()


def disconnect_reason(sock: socket.socket) -> str:
    """Why a connection of the kernel is dead, as a part of a sentence, as far as its socket still knows."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error == errno.ECONNRESET:
        return "the server reset it"
    if error not in (0, errno.ETIMEDOUT, errno.EPIPE):
        return os.strerror(error)[:1].lower() + os.strerror(error)[1:]
    # Reading the error clears it, and the driver may have read it first. The state of TCP stays.
    state, silent, patience = _tcp(sock)
    if error == errno.ETIMEDOUT or (state == _CLOSED and 0 < patience * 0.9 <= silent):
        return f"the server's machine was silent for {patience // 1000} s"
    if state in (_FIN_WAIT1, _FIN_WAIT2, _CLOSING):
        return "the kernel closed it, since a request took too long or got no proper answer"
    return "the server closed it"


def _tcp(sock: socket.socket) -> tuple[int, int, int]:
    """State, milliseconds since the last acknowledgement, and how many are allowed; all 0 for Unix sockets."""
    if sock.family == socket.AF_UNIX:
        return 0, 0, 0
    state, silent = _TCP_INFO.unpack_from(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    return state, silent, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def export_difference(one: Export, other: Export) -> str:
    """What differs for a block device between two descriptions of an export, as a part of a sentence; "" if nothing."""
    for what in ("size", "flags", "minimum", "maximum"):
        before, now = getattr(one, what), getattr(other, what)
        if before != now:
            name = what if what in ("size", "flags") else f"{what} block size"
            return f"the {name} was {before!r} and is {now!r}"
    return ""


def _read_only(definition: Definition, uri: URI, export: Export) -> bool:
    offered = bool(export.flags & Flags.NBD_FLAG_READ_ONLY)
    if offered and definition.read_only is False:
        raise NegotiationFailed(
            f"{uri} is offered read-only, and {definition.name!r} says 'read-only: false'. "
            "Make the export writable on the server, or leave the key out or say 'read-only: true' to attach it so."
        )
    return offered or bool(definition.read_only)


def _block_size(definition: Definition, uri: URI, export: Export) -> int:
    minimum = max(export.minimum or 1, MIN_BLOCK_SIZE)
    wanted = definition.block_size
    if wanted is None:
        return minimum
    if wanted < minimum:
        raise NegotiationFailed(
            f"{uri} takes no requests below {minimum} bytes, and {definition.name!r} says 'block-size: {wanted}'."
        )
    return wanted
