# SPDX-License-Identifier: MIT
"""Authorization of callers by polkit. Root needs none, so that boot never waits for polkitd."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from nbdd.bus.daemon.service import Caller
from nbdd.bus.wire.calls import DBUS, CallError, Peer
from nbdd.bus.wire.library import MessageBus, Variant
from nbdd.errors import AccessDenied, InteractiveAuthorizationRequired

log = logging.getLogger(__name__)

_ALLOW_USER_INTERACTION = 1

_DISMISSED = "polkit.dismissed"

_ANSWER_DEADLINE = 20.0
"""Seconds for polkitd to answer if no person is asked; less than busctl's 25."""

_AUTHORITY = Peer(
    "org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority"
)


class Authority(Protocol):
    """What decides whether a caller may do something."""

    async def user(self, caller: Caller) -> int:
        """The user id of the caller; raises AccessDenied if it has left the bus."""

    async def check(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        """Return if the caller may; raise AccessDenied or InteractiveAuthorizationRequired if not."""


class Polkit:
    """The authority of a real system: org.freedesktop.PolicyKit1 on the same bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    async def check(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        """Ask polkitd about `action`, such as "org.nbdd1.attach"; a person may be asked, for as long as that takes.

        `details` are shown in the question; the keys are those that the action's message names.
        """
        if await self.user(caller) == 0:
            log.debug("%s is root and may %s", caller.name, action)
            return
        # The subject is the bus name, never a pid: the pid may be another process's when polkitd looks.
        subject = ["system-bus-name", {"name": Variant("s", caller.name)}]
        flags = _ALLOW_USER_INTERACTION if caller.interactive else 0
        try:
            async with asyncio.timeout(None if caller.interactive else _ANSWER_DEADLINE):
                [(authorized, challenge, found)] = await _AUTHORITY.call(
                    self._bus,
                    "CheckAuthorization",
                    "(sa{sv})sa{ss}us",
                    [subject, action, dict(details), flags, ""],
                    returns="(bba{ss})",
                )
        except (CallError, TimeoutError) as error:
            log.warning("polkit gave no answer about %s: %s", action, error)
            raise AccessDenied(f"Polkit can't be asked about {action}, so only root may do this.") from None
        log.debug("polkit about %s for %s: authorized %s, challenge %s", action, caller.name, authorized, challenge)
        if authorized:
            return
        if challenge and not caller.interactive:
            raise InteractiveAuthorizationRequired(
                f"{action} needs an administrator's password, and the call did not allow asking for it."
            )
        if challenge:
            raise AccessDenied(
                f"{action} needs an administrator's password, and nothing here can ask for it (no polkit agent runs "
                "for this session); run it as root."
            )
        if _DISMISSED in found:
            raise AccessDenied(f"Nothing was done: the question for a password was cancelled ({action}).")
        raise AccessDenied(f"You are not allowed to do this ({action}); run it as root, or ask an administrator.")

    async def user(self, caller: Caller) -> int:
        """The user id of the caller, as the bus knows it; raises AccessDenied if it has left the bus."""
        try:
            [uid] = await DBUS.call(self._bus, "GetConnectionUnixUser", "s", [caller.name], returns="u")
        except CallError:
            raise AccessDenied("The caller left the bus.") from None
        return int(uid)
