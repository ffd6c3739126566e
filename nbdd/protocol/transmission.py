# SPDX-License-Identifier: MIT
"""The part of the transmission phase that nbdd needs: reads before the kernel gets the connection, and NBD_CMD_DISC.

Simple replies only, as nothing else was negotiated. Like the negotiation it is a generator without any I/O.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from nbdd.errors import NegotiationFailed, ServerError
from nbdd.protocol.constants import NBD_CMD_DISC, NBD_CMD_READ, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC
from nbdd.protocol.negotiation import Receive, Send, Steps

REQUEST = struct.Struct(">IHHQQI")
"""Magic, command flags, type, cookie, offset, length."""

SIMPLE_REPLY = struct.Struct(">IIQ")
"""Magic, error, cookie."""

DISCONNECT = REQUEST.pack(REQUEST_MAGIC, 0, NBD_CMD_DISC, 0, 0, 0)
"""The request of type NBD_CMD_DISC, after which a client closes its connection."""


def read(places: Sequence[tuple[int, int]]) -> Steps[list[bytes]]:
    """Read at these offsets and lengths, in bytes, all requested at once; no request is open when this returns.

    Raises NegotiationFailed if something else than a reply comes, and ServerError if the server can't read. The
    connection is of no use then.
    """
    requests = b"".join(
        REQUEST.pack(REQUEST_MAGIC, 0, NBD_CMD_READ, cookie, offset, length)
        for cookie, (offset, length) in enumerate(places)
    )
    yield Send(requests, "a request to read")
    found: dict[int, bytes] = {}
    while len(found) < len(places):
        magic, error, cookie = SIMPLE_REPLY.unpack((yield Receive(SIMPLE_REPLY.size, "its reply to a request to read")))
        if magic != SIMPLE_REPLY_MAGIC or cookie >= len(places) or cookie in found:
            raise NegotiationFailed("answers a request to read with something else than a reply to it.")
        if error:
            raise ServerError(f"could not read the export: {os.strerror(error)}.")
        found[cookie] = yield Receive(places[cookie][1], "what was read")
    return [found[cookie] for cookie in range(len(places))]
