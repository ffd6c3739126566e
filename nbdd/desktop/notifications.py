# SPDX-License-Identifier: MIT
"""Notifications of a desktop, as the Desktop Notifications Specification 1.2 has them.

The notification server may come, go and be replaced at any time; then the numbers that it gave are void.
"""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from nbdd.bus.caller.connection import CallerBus
from nbdd.bus.wire.calls import DBUS, CallError, Peer
from nbdd.bus.wire.library import Message, MessageType, Variant

log = logging.getLogger(__name__)

APPLICATION = "Network disks"
"""The name of our program in a list of notifications."""

DESKTOP_ENTRY = "org.nbdd1.open"
"""Our desktop entry without its suffix, by which the settings of notifications know us."""

_NAME = "org.freedesktop.Notifications"
_SERVER = Peer(_NAME, "/org/freedesktop/Notifications", _NAME)
_RULES = (
    f"type='signal',sender='{_NAME}',path='{_SERVER.path}',interface='{_NAME}'",
    f"type='signal',sender='{DBUS.destination}',interface='{DBUS.interface}',member='NameOwnerChanged',arg0='{_NAME}'",
)

_ANSWER_DEADLINE = 10.0
"""Seconds for an answer; a server that the bus has to start needs a moment."""

_NEVER, _AS_USUAL = 0, -1
"""When a notification closes by itself."""


class Urgency(IntEnum):
    """How much it matters; a CRITICAL one does not close by itself."""

    LOW = 0
    NORMAL = 1
    CRITICAL = 2


@dataclass(frozen=True, slots=True)
class Notification:
    """What is shown, in plain text; it becomes markup if the server wants that."""

    summary: str
    body: str
    icon: str
    """A name of the icon theme."""
    urgency: Urgency = Urgency.NORMAL
    category: str = ""
    """Of the specification's list, such as "device.error"."""
    actions: Sequence[tuple[str, str]] = ()
    """Key and label of each button."""
    lasting: bool = True
    """Whether it stays until it is closed; else it closes by itself and is not kept in a list."""


@dataclass(frozen=True, slots=True)
class Invoked:
    """A person chose an action of a notification."""

    number: int
    action: str


@dataclass(frozen=True, slots=True)
class Closed:
    """A notification is gone."""

    number: int
    shown: int
    """`Notifications.shown` when this came: a notification that replaces another has its number."""


@dataclass(frozen=True, slots=True)
class ServerChanged:
    """There is another notification server: what was shown before is gone."""

    server: str
    """Its unique bus name."""


NotificationEvent = Invoked | Closed | ServerChanged


class Notifications:
    """The notification server of this session. All methods raise NotShown if there is none."""

    def __init__(self, bus: CallerBus) -> None:
        self._bus = bus
        self._owner = ""
        self._shown = 0
        self._capabilities: frozenset[str] | None = None
        self._events: asyncio.Queue[NotificationEvent] = asyncio.Queue()

    @property
    def server(self) -> str:
        """The unique bus name of the notification server; "" if there is none."""
        return self._owner

    @property
    def shown(self) -> int:
        """How many notifications were shown until now."""
        return self._shown

    async def subscribe(self) -> None:
        """Start to collect events."""
        self._bus.add_message_handler(self._on_message)
        for rule in _RULES:
            await DBUS.call(self._bus, "AddMatch", "s", [rule], returns="")
        try:
            [self._owner] = await DBUS.call(self._bus, "GetNameOwner", "s", [_NAME], returns="s")
        except CallError:
            self._owner = ""

    async def event(self) -> NotificationEvent:
        """The next event; needs `subscribe` first."""
        return await self._events.get()

    async def show(self, notification: Notification, replaces: int = 0) -> int:
        """Show it, in place of the one with the number `replaces` if that is not 0; returns its number."""
        if self._capabilities is None:
            [found] = await self._call("GetCapabilities", "", [], returns="as")
            self._capabilities = frozenset(found)
        body = notification.body
        if "body-markup" in self._capabilities:
            body = html.escape(body, quote=False)
        hints = {
            "urgency": Variant("y", int(notification.urgency)),
            "desktop-entry": Variant("s", DESKTOP_ENTRY),
        }
        if notification.category:
            hints["category"] = Variant("s", notification.category)
        if not notification.lasting:
            hints["transient"] = Variant("b", True)
        wanted = notification.actions if "actions" in self._capabilities else ()
        [number] = await self._call(
            "Notify",
            "susssasa{sv}i",
            [
                APPLICATION,
                replaces,
                notification.icon,
                notification.summary,
                body,
                [text for action in wanted for text in action],
                hints,
                _NEVER if notification.lasting else _AS_USUAL,
            ],
            returns="u",
        )
        self._shown += 1
        return int(number)

    async def close(self, number: int) -> None:
        """Close a notification; it is no fault if it is gone already."""
        try:
            await self._call("CloseNotification", "u", [number], returns="")
        except NotShown:
            return

    async def _call(self, member: str, signature: str, body: list[Any], *, returns: str) -> list[Any]:
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE):
                return await _SERVER.call(self._bus, member, signature, body, returns=returns)
        except CallError as problem:
            raise NotShown(f"{problem.name}: {problem}") from problem
        except (TimeoutError, EOFError, OSError) as problem:
            raise NotShown("no answer on the session bus") from problem

    def _on_message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        signal = (message.member, message.signature)
        if message.sender == DBUS.destination:
            if signal == ("NameOwnerChanged", "sss") and message.body[0] == _NAME:
                self._owner = message.body[2]
                log.debug("notification server: %s", self._owner or "none")
                self._capabilities = None
                if self._owner:
                    self._events.put_nowait(ServerChanged(self._owner))
        elif message.sender == self._owner and message.interface == _NAME:
            if signal == ("ActionInvoked", "us"):
                self._events.put_nowait(Invoked(*message.body))
            elif signal == ("NotificationClosed", "uu"):
                self._events.put_nowait(Closed(message.body[0], self._shown))


class NotShown(Exception):
    """There is no notification server, or it refused."""
