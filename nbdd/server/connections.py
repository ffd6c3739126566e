# SPDX-License-Identifier: MIT
"""Links: connections to a server, negotiated and checked against what the device is to be."""

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
    """Open links to one export, all of one mind about it."""

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
        """Take leave of the server and close; only for links that the kernel never got."""
        for sock in self.sockets:
            disconnect(sock)


Check: TypeAlias = Callable[[Connections], None]
"""Raises a ServerError where a server has not what is wanted."""


def open_connections(
    definition: Definition, deadline: Deadline, connections: int | None = None, *, check: Check | None = None
) -> Connections:
    """Connect to the first server of the definition that gives what it asks for, and that `check` lets pass.

    `connections` is how many links to open, where it is not the definition's number.
    Raises the ServerError of the only server, or one that tells of each: ExportChanged, where that is one of them.
    """
    failures: list[ServerError] = []
    for number, uri in enumerate(definition.uri):
        try:
            # A server that is silent must leave time for the next one.
            left = len(definition.uri) - number
            share = deadline if left == 1 else Deadline(deadline.remaining() / left)
            links = _open(definition, uri, share, connections or definition.connections)
            try:
                if check is not None:
                    check(links)
            except BaseException:
                links.close()
                raise
            return links
        except ServerError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if not failures:
        raise ConnectFailed(f"{definition.name!r} names no server.")
    # Every one is told; the class is the gravest, or the last one's, which the person just waited for.
    grave = any(isinstance(failure, ExportChanged) for failure in failures)
    raise (ExportChanged if grave else type(failures[-1]))(" ".join(str(failure) for failure in failures))


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
        for opened in sockets:
            disconnect(opened)
        raise


def disconnect(sock: socket.socket) -> None:
    """Close a link that never carried a request, in good order: without the farewell servers log an error."""
    with suppress(OSError):
        sock.send(DISCONNECT, socket.MSG_DONTWAIT)
    sock.close()


def disconnect_reason(sock: socket.socket) -> str:
    """Why a link of the kernel is dead, as a part of a sentence, as far as its socket still knows."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error == errno.ECONNRESET:
        return "the server reset it"
    if error not in (0, errno.ETIMEDOUT, errno.EPIPE):
        return os.strerror(error)[:1].lower() + os.strerror(error)[1:]
    # The driver reads the same error, and who comes first takes it away. What TCP noted down stays.
    state, silent, patience = _tcp(sock)
    if error == errno.ETIMEDOUT or (state == _CLOSED and 0 < patience * 0.9 <= silent):
        return f"the other machine gave no sign of life for {patience // 1000} s"
    if state in (_FIN_WAIT1, _FIN_WAIT2, _CLOSING):
        return "the kernel gave it up, since a request took too long or got no proper answer"
    return "the server closed it"


def _tcp(sock: socket.socket) -> tuple[int, int, int]:
    """State, milliseconds since the last acknowledgement, and how many are allowed; all 0 for Unix sockets."""
    if sock.family == socket.AF_UNIX:
        return 0, 0, 0
    state, silent = _TCP_INFO.unpack_from(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    return state, silent, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def export_difference(one: Export, other: Export) -> str:
    """What makes two answers about an export different for a block device; "" where nothing does."""
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
