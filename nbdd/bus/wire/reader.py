# SPDX-License-Identifier: MIT
"""Messages from the bus, within limits: every user of the machine may send us some, and must not block us with them.

dbus-next reads messages of any size, item by item in Python, while the loop waits: one of 28 MB, which every user
may send, blocked it for 40 s and took a gigabyte. And it ends the connection at any message that it can't read.
"""

from __future__ import annotations

import io
import logging
from struct import unpack_from

from dbus_next._private.constants import LITTLE_ENDIAN
from dbus_next._private.unmarshaller import Unmarshaller

from nbdd.bus.wire.library import Message, MessageType

log = logging.getLogger(__name__)

MAX_BODY = 64 << 10
"""Bytes of arguments in a message for us. The longest that makes sense is a URI with a few options."""

_FIXED = 16
"""Bytes of a header before its fields (D-Bus specification, "Message Format")."""


class Reader:
    """Reads messages from a stream that does not block.

    With `long_replies`, replies to our own calls may be of any size: the bus passes on only those that we asked for.
    """

    def __init__(self, stream: io.BufferedIOBase, *, long_replies: bool) -> None:
        self._stream = stream
        self._long_replies = long_replies
        self._octets = bytearray()

    def next(self) -> Message | None:
        """The next message, or None if none is complete yet; raises EOFError at the end, and OSError.

        What can't be read is skipped, and so is a signal with a body of more than MAX_BODY bytes; any other message
        loses such a body.
        """
        while (octets := self._message()) is not None:
            if not octets:
                continue
            try:
                message: Message | None = Unmarshaller(io.BytesIO(octets)).unmarshall()
            except Exception as error:  # noqa: BLE001 - dbus-next raises all sorts
                # Not for the journal: it is no fault of ours, and could be sent over and over.
                log.debug("skipped a message that can't be read: %r", error)
            else:
                if message is not None:
                    return message
        return None

    def _message(self) -> bytes | None:
        """The octets of one whole message; none for one that is skipped."""
        if not self._fill(_FIXED):
            return None
        order = "<" if self._octets[0] == LITTLE_ENDIAN else ">"
        body, _serial, fields = unpack_from(f"{order}III", self._octets, 4)
        header = _FIXED + (fields + 7) // 8 * 8
        if not self._fill(header + body):
            return None
        octets, self._octets = self._octets, bytearray()
        kind = octets[1]
        if body > MAX_BODY and kind == MessageType.SIGNAL.value:
            return b""
        reply = kind in (MessageType.METHOD_RETURN.value, MessageType.ERROR.value)
        if body > MAX_BODY and not (reply and self._long_replies):
            octets[4:8] = bytes(4)
            del octets[header:]
        return bytes(octets)

    def _fill(self, size: int) -> bool:
        missing = size - len(self._octets)
        if missing <= 0:
            return True
        more = self._stream.read(missing)
        if more == b"":
            raise EOFError
        self._octets += more or b""
        return len(self._octets) == size
