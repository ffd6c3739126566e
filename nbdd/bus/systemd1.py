# SPDX-License-Identifier: MIT
"""Why are we being stopped? Only systemd knows whether a SIGTERM is the end or half of a restart."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from dbus_next.aio import MessageBus

from nbdd.bus.calls import CallError, Peer

_ASK_DEADLINE = 5.0
"""Seconds to wait for systemd; it may be busy shutting the machine down."""

_SERVICE = "org.freedesktop.systemd1"
_MANAGER = Peer(_SERVICE, "/org/freedesktop/systemd1", f"{_SERVICE}.Manager")


async def job_type(bus: MessageBus) -> str:
    """The job that systemd has queued for our unit: "stop", "restart", …; "" for none, or where nobody knows."""
    try:
        async with asyncio.timeout(_ASK_DEADLINE):
            [unit] = await _MANAGER.call(bus, "GetUnitByPID", "u", [os.getpid()], returns="o")
            number, path = await _property(bus, unit, "Unit", "Job")
            return str(await _property(bus, path, "Job", "JobType")) if number else ""
    except (TimeoutError, CallError, EOFError, OSError):
        return ""


async def _property(bus: MessageBus, path: str, interface: str, name: str) -> Any:
    properties = Peer(_SERVICE, path, "org.freedesktop.DBus.Properties")
    [variant] = await properties.call(bus, "Get", "ss", [f"{_SERVICE}.{interface}", name], returns="v")
    return variant.value
