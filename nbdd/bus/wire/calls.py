# SPDX-License-Identifier: MIT
"""Calls that nbdd makes to other services on the bus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dbus_next import Message, MessageFlag, MessageType
from dbus_next.aio import MessageBus

_INVALID_SIGNATURE = "org.freedesktop.DBus.Error.InvalidSignature"


class CallError(Exception):
    """The other service answered with an error; `name` is its D-Bus name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Peer:
    """One interface of one object of another service."""

    destination: str
    path: str
    interface: str

    async def call(
        self,
        bus: MessageBus,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        returns: str,
        flags: MessageFlag = MessageFlag.NONE,
    ) -> list[Any]:
        """Call a method and return its out-arguments, which are of the types `returns`.

        Raises CallError, or EOFError when the bus is gone.
        """
        # dbus-next: a call on a bus that has ended waits for ever. Only `connected` knows at once.
        if not bus.connected:
            raise EOFError
        reply = await bus.call(
            Message(
                destination=self.destination,
                path=self.path,
                interface=self.interface,
                member=member,
                flags=flags,
                signature=signature,
                body=list(body),
            )
        )
        if reply is None:
            raise EOFError
        if reply.message_type is MessageType.ERROR:
            raise CallError(reply.error_name, str(reply.body[0]) if reply.body else reply.error_name)
        if reply.signature != returns:
            raise CallError(_INVALID_SIGNATURE, f"{member} returned the types {reply.signature!r}, not {returns!r}.")
        return reply.body


DBUS = Peer("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
