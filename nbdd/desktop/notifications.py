# SPDX-License-Identifier: MIT
"""Notifications of a desktop, as the Desktop Notifications Specification 1.2 has them.

Whoever shows them may come, go and be replaced at any time; then the numbers that it gave mean nothing any more.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from nbdd.bus.caller.connection import CallerBus
from nbdd.bus.wire.calls import DBUS, CallError, Peer
from nbdd.bus.wire.library import Message, MessageType, Variant

APPLICATION = "Network disks"
"""What we are called in a list of notifications."""

DESKTOP_ENTRY = "org.nbdd1.open"
"""Our desktop entry without its suffix, by which settings of notifications find us."""

_NAME = "org.freedesktop.Notifications"
_SHOWER = Peer(_NAME, "/org/freedesktop/Notifications", _NAME)
_RULES = (
    f"type='signal',sender='{_NAME}',path='{_SHOWER.path}',interface='{_NAME}'",
    f"type='signal',sender='{DBUS.destination}',interface='{DBUS.interface}',member='NameOwnerChanged',arg0='{_NAME}'",
)

_ANSWER_DEADLINE = 10.0
"""Seconds for an answer; one that is only just being started by the bus needs a moment."""

_NEVER, _AS_USUAL = 0, -1
"""When a notification goes by itself."""


class Urgency(IntEnum):
    """How much it matters; CRITICAL does not go by itself."""

    LOW = 0
    NORMAL = 1
    CRITICAL = 2


@dataclass(frozen=True, slots=True)
class Notification:
    """What is shown. Plain text: markup is made of it where it is wanted."""

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
    """Whether it stays until it is closed; else it goes by itself and is not kept in a list."""


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
    """What `Notifications.shown` was when this came: a number is given again to what is shown in its place."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """Another one shows notifications now: what was shown before is gone."""

    shower: str
    """Its unique bus name."""


NotificationEvent = Invoked | Closed | Renewed


class Notifications:
    """Whoever shows notifications in this session. All methods raise NotShown where nobody does."""

    def __init__(self, bus: CallerBus) -> None:
        self._bus = bus
        self._owner = ""
        self._shown = 0
        self._capabilities: frozenset[str] | None = None
        self._events: asyncio.Queue[NotificationEvent] = asyncio.Queue()

    @property
    def shower(self) -> str:
        """The unique bus name of who shows them now; "" for nobody."""
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
        """Take a notification away; it is no fault if it is gone already."""
        try:
            await self._call("CloseNotification", "u", [number], returns="")
        except NotShown:
            return

    async def _call(self, member: str, signature: str, body: list[Any], *, returns: str) -> list[Any]:
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE):
                return await _SHOWER.call(self._bus, member, signature, body, returns=returns)
        except CallError as problem:
            raise NotShown(f"{problem.name}: {problem}") from problem
        except (TimeoutError, EOFError, OSError) as problem:
            raise NotShown("nobody answers on the session bus") from problem

    def _on_message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        signal = (message.member, message.signature)
        if message.sender == DBUS.destination:
            if signal == ("NameOwnerChanged", "sss") and message.body[0] == _NAME:
                self._owner = message.body[2]
                self._capabilities = None
                if self._owner:
                    self._events.put_nowait(Renewed(self._owner))
        elif message.sender == self._owner and message.interface == _NAME:
            if signal == ("ActionInvoked", "us"):
                self._events.put_nowait(Invoked(*message.body))
            elif signal == ("NotificationClosed", "uu"):
                self._events.put_nowait(Closed(message.body[0], self._shown))


class NotShown(Exception):
    """Nobody shows notifications, or whoever does would not."""
