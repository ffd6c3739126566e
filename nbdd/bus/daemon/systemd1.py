# SPDX-License-Identifier: MIT
"""What only systemd knows: whether a SIGTERM is the end or half of a restart, and whether the machine goes down."""

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
"""Seconds between two attempts to have systemd tell of its jobs."""

_SERVICE = "org.freedesktop.systemd1"
_MANAGER = Peer(_SERVICE, "/org/freedesktop/systemd1", f"{_SERVICE}.Manager")

_SHUTDOWN = "shutdown.target"
"""Every way down leads over it (systemd.special(7))."""

_SHUTDOWN_JOB = (
    f"type='signal',sender='{_SERVICE}',path='{_MANAGER.path}',interface='{_MANAGER.interface}',member='JobNew',"
    f"arg2='{_SHUTDOWN}'"
)


async def job_type(bus: MessageBus) -> str:
    """The job that systemd has queued for our unit: "stop", "restart", …; "" for none, or where nobody knows."""
    try:
        async with asyncio.timeout(_ASK_DEADLINE):
            [unit] = await _MANAGER.call(bus, "GetUnitByPID", "u", [os.getpid()], returns="o")
            number, path = await _property(bus, unit, "Unit", "Job")
            return str(await _property(bus, path, "Job", "JobType")) if number else ""
    except (TimeoutError, CallError, EOFError, OSError):
        return ""


async def shutdown(bus: MessageBus) -> None:
    """Return when the machine begins to go down: power-off, reboot, halt or kexec, whoever asked for it.

    Long before SIGTERM: nbdd is stopped only when what is mounted on its devices is unmounted. Where nobody knows, this
    never returns.
    """
    # A hint, which any user of the machine may send us: systemd is asked what it is worth.
    hint = asyncio.Event()

    def heard(message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.member == "JobNew":
            hint.set()
        return False

    bus.add_message_handler(heard)
    try:
        await _subscribe(bus)
        while not await _has_shutdown_job(bus):
            await hint.wait()
            hint.clear()
    except (EOFError, OSError):
        await asyncio.Event().wait()
    finally:
        bus.remove_message_handler(heard)


async def _subscribe(bus: MessageBus) -> None:
    """Have systemd tell of jobs, once it can: on a bus that has just been restarted it may not be yet."""
    while True:
        try:
            await DBUS.call(bus, "AddMatch", "s", [_SHUTDOWN_JOB], returns="")
            # Without subscribers it sends no signals.
            await _MANAGER.call(bus, "Subscribe", "", [], returns="")
            return
        except CallError as error:
            log.debug("systemd does not tell of a shutdown: %s", error)
        await asyncio.sleep(_SUBSCRIBE_WAIT)


async def is_going_down(bus: MessageBus) -> bool:
    """Whether that has begun; False where nobody knows."""
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
        return False  # Nobody has needed the unit yet.
    return bool(number)


async def _property(bus: MessageBus, path: str, interface: str, name: str) -> Any:
    properties = Peer(_SERVICE, path, PROPERTIES_INTERFACE)
    [variant] = await properties.call(bus, "Get", "ss", [f"{_SERVICE}.{interface}", name], returns="v")
    return variant.value
