# SPDX-License-Identifier: MIT
"""Questions to systemd: is a SIGTERM a stop or half of a restart, and does the machine shut down?"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from nbdd.bus.wire.calls import DBUS, CallError, Peer
from nbdd.bus.wire.library import Message, MessageBus, MessageType
from nbdd.bus.wire.names import PROPERTIES_INTERFACE

log = logging.getLogger(__name__)

_ASK_DEADLINE = 5.0
"""Seconds to wait for systemd; it may be busy shutting the machine down."""

_SUBSCRIBE_WAIT = 5.0
"""Seconds between two attempts to subscribe to the jobs of systemd."""

_SERVICE = "org.freedesktop.systemd1"
_MANAGER = Peer(_SERVICE, "/org/freedesktop/systemd1", f"{_SERVICE}.Manager")

_SHUTDOWN = "shutdown.target"
"""Every kind of shutdown starts it (systemd.special(7))."""

_SHUTDOWN_JOB = (
    f"type='signal',sender='{_SERVICE}',path='{_MANAGER.path}',interface='{_MANAGER.interface}',member='JobNew',"
    f"arg2='{_SHUTDOWN}'"
)


async def job_type(bus: MessageBus) -> str:
    """The job that systemd has queued for our unit: "stop", "restart", …; "" for none, or without an answer."""
    try:
        async with asyncio.timeout(_ASK_DEADLINE):
            [unit] = await _MANAGER.call(bus, "GetUnitByPID", "u", [os.getpid()], returns="o")
            number, path = await _property(bus, unit, "Unit", "Job")
            return str(await _property(bus, path, "Job", "JobType")) if number else ""
    except (TimeoutError, CallError, EOFError, OSError):
        return ""


async def shutdown(bus: MessageBus) -> None:
    """Return when the machine begins to shut down: power-off, reboot, halt or kexec.

    Long before SIGTERM: nbdd is stopped only when what is mounted on its devices is unmounted. If systemd does not
    answer, this never returns.
    """
    # Only a hint, as any user of the machine may send us such a signal: systemd is asked.
    hint = asyncio.Event()

    def on_message(message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.member == "JobNew":
            hint.set()
        return False

    bus.add_message_handler(on_message)
    try:
        await _subscribe(bus)
        while not await _has_shutdown_job(bus):
            await hint.wait()
            hint.clear()
    except (EOFError, OSError):
        await asyncio.Event().wait()
    finally:
        bus.remove_message_handler(on_message)


async def _subscribe(bus: MessageBus) -> None:
    """Subscribe to the jobs of systemd, as soon as it is there: on a bus that was just restarted it may not be yet."""
    while True:
        try:
            await DBUS.call(bus, "AddMatch", "s", [_SHUTDOWN_JOB], returns="")
            # Without subscribers it sends no signals.
            await _MANAGER.call(bus, "Subscribe", "", [], returns="")
            return
        except CallError as error:
            log.debug("systemd sends no signals about its jobs yet: %s", error)
        await asyncio.sleep(_SUBSCRIBE_WAIT)


async def is_going_down(bus: MessageBus) -> bool:
    """Whether the machine is shutting down; False if systemd does not answer."""
    try:
        async with asyncio.timeout(_ASK_DEADLINE):
            return await _has_shutdown_job(bus)
    except (TimeoutError, EOFError, OSError):
        return False


async def _has_shutdown_job(bus: MessageBus) -> bool:
    # Not SystemState: it stays "starting" for a machine that goes down before it was quite up.
    try:
        [unit] = await _MANAGER.call(bus, "GetUnit", "s", [_SHUTDOWN], returns="o")
        number, _ = await _property(bus, unit, "Unit", "Job")
    except CallError:
        return False  # The unit is not loaded yet.
    return bool(number)


async def _property(bus: MessageBus, path: str, interface: str, name: str) -> Any:
    properties = Peer(_SERVICE, path, PROPERTIES_INTERFACE)
    [variant] = await properties.call(bus, "Get", "ss", [f"{_SERVICE}.{interface}", name], returns="v")
    return variant.value
