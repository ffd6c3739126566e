# SPDX-License-Identifier: MIT
"""Calls to other services on the bus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbdd.bus.wire import names
from nbdd.bus.wire.library import Message, MessageBus, MessageFlag, MessageType

_DO_NOT_QUEUE = 4
_PRIMARY_OWNER = 1


class CallError(Exception):
    """The other service answered with an error.

    `name` is its D-Bus name, `text` what it says, "" for nothing, and `sender` the service, or the bus itself.
    """

    def __init__(self, name: str, text: str, sender: str = "") -> None:
        super().__init__(text or name)
        self.name = name
        self.text = text
        self.sender = sender


class WrongReply(CallError):
    """The other service answered with values of the types `found`, which are not those of the method."""

    def __init__(self, member: str, found: str, expected: str) -> None:
        text = f"{member} returned the types {found!r}, not {expected!r}."
        super().__init__(names.DBUS_ERROR + "InvalidSignature", text)
        self.found = found


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

        Raises CallError, or EOFError or OSError when the bus is gone.
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
            text = str(reply.body[0]) if reply.signature.startswith("s") else ""
            raise CallError(reply.error_name, text, reply.sender)
        if reply.signature != returns:
            raise WrongReply(member, reply.signature, returns)
        return reply.body


DBUS = Peer(names.DBUS_NAME, "/org/freedesktop/DBus", names.DBUS_NAME)
"""The bus itself."""


async def own_name(bus: MessageBus, name: str) -> bool:
    """Own a well-known name; False if another connection has it. Raises CallError if the bus forbids it."""
    [answer] = await DBUS.call(bus, "RequestName", "su", [name, _DO_NOT_QUEUE], returns="u")
    return bool(answer == _PRIMARY_OWNER)
