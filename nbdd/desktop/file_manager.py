# SPDX-License-Identifier: MIT
"""The file manager of a session, as freedesktop.org's File Manager D-Bus Interface has it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nbdd.bus.caller.connection import CallerBus
from nbdd.bus.wire.calls import CallError, Peer

_NAME = "org.freedesktop.FileManager1"
_MANAGER = Peer(_NAME, "/org/freedesktop/FileManager1", _NAME)
_ANSWER_DEADLINE = 25.0
"""Seconds; the bus may have to start it."""


async def show_folder(bus: CallerBus, folder: Path) -> bool:
    """Open a window with `folder`; False if no file manager answers."""
    try:
        async with asyncio.timeout(_ANSWER_DEADLINE):
            await _MANAGER.call(bus, "ShowFolders", "ass", [[folder.as_uri()], ""], returns="")
    except (CallError, TimeoutError, EOFError, OSError):
        return False
    return True
