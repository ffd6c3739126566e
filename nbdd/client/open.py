# SPDX-License-Identifier: MIT
"""Sockets for a `Client`: connect to a server by its URI, and open an export."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Self

from nbdd.config.definition import Definition
from nbdd.errors import InvalidArgs, InvalidURI
from nbdd.limits import MAX_CONNECTIONS
from nbdd.protocol import Flags
from nbdd.server.connect import Deadline
from nbdd.server.connections import open_connections
from nbdd.uri import URI

MAX_SECONDS = 86400.0
"""A day; a longer wait is as good as none at all."""


@dataclass(frozen=True, slots=True)
class Connection:
    """One export of a server, open, and what the server says about it. Sizes in bytes.

    The sockets are ready for `Client`, which closes them; if no client takes them, use this as a context manager.
    """

    sockets: tuple[socket.socket, ...]
    """One for each connection; on each the transmission phase of the NBD protocol comes next."""
    name: str
    """As the server calls the export; from a stranger, and not for a terminal."""
    size: int
    """More than 0."""
    flags: Flags
    """The transmission flags, those unknown to the kernel included."""
    blocksize: int
    """The smallest block size that suits server and kernel, 512 at least."""
    minimum: int | None
    """As the server said it, as are the next two; None if it said nothing."""
    preferred: int | None
    maximum: int | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets, which ends the connections unless a device holds them."""
        for sock in self.sockets:
            sock.close()


def connect(uri: str, *, timeout: float = 15.0, connections: int = 1) -> Connection:
    """Connect to an NBD server, negotiate, and open the export that the URI names.

    `uri` is nbd://host[:port]/export or nbd+unix:///export?socket=/path. `timeout`: seconds for all of it.
    `connections`: how many to open; one if the server doesn't allow more.
    Raises InvalidURI, InvalidArgs (not 1 to 16 connections, no time at all), or the ServerError of the step that
    failed: ConnectFailed, NegotiationFailed, NoSuchExport, TLSFailed, TimedOut.
    """
    _check(uri, timeout, connections)
    opened = open_connections(Definition("", (URI.parse(uri),), connections=connections), Deadline(timeout))
    export = opened.export
    return Connection(
        sockets=opened.sockets,
        name=export.name,
        size=export.size,
        flags=export.flags,
        blocksize=opened.block_size,
        minimum=export.minimum,
        preferred=export.preferred,
        maximum=export.maximum,
    )


def _check(uri: object, timeout: object, connections: object) -> None:
    if not isinstance(uri, str):
        raise InvalidURI(f"{uri!r} is not an NBD URI; it is a text such as nbd://storage.example/backup.")
    if type(connections) is not int or not 1 <= connections <= MAX_CONNECTIONS:
        raise InvalidArgs(f"{connections!r} connections can't be opened: it goes from 1 to {MAX_CONNECTIONS}.")
    if not isinstance(timeout, (int, float)) or not 0 < timeout <= MAX_SECONDS:
        raise InvalidArgs(f"{timeout!r} is no time to connect in: it is a number of seconds, more than 0.")
