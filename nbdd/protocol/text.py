# SPDX-License-Identifier: MIT
"""Strings of the NBD protocol, and the bytes that they are on the wire."""

from __future__ import annotations

from nbdd.errors import NegotiationFailed
from nbdd.text import quoted

MAX_STRING = 4096
"""Bytes of a string: "MUST be no longer than 4096 bytes" (proto.md, Conventions)."""

MAX_SHOWN = 200
"""Characters of a server's string that a message repeats."""


def decode(octets: bytes, what: str) -> str:
    """The string that a server sent; `NegotiationFailed` if it breaks the rules of the protocol.

    It should be UTF-8. Bytes that are not become lone surrogates, as in file names, so that `encode` gives the same
    bytes again and an export with such a name can be listed. Its control characters stay: `quoted` escapes them.
    """
    if len(octets) > MAX_STRING:
        raise NegotiationFailed(f"sent {what} of {len(octets)} bytes; NBD allows {MAX_STRING}.")
    if 0 in octets:
        raise NegotiationFailed(f"sent {what} with a NUL character in it: {quoted(octets, MAX_SHOWN)}.")
    return octets.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """The inverse of `decode`; `NegotiationFailed` if the text can't be the name of an export."""
    try:
        octets = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise NegotiationFailed(f"can't be asked for {quoted(text, MAX_SHOWN)}: that is not valid UTF-8.") from None
    if len(octets) > MAX_STRING:
        raise NegotiationFailed(f"can't be asked for a name of {len(octets)} bytes; NBD allows {MAX_STRING}.")
    return octets
