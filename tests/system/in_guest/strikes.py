# SPDX-License-Identifier: MIT
"""Runs in a guest: strikes at nbdd or at servers, one after the other, and how long each device took to recover.

    strikes.py <STRIKES

STRIKES is a JSON object: the name of an attached device, letters and digits alone, and its strikes, each of them what
must be new before the next one ("connection" or "worker") and a shell command; {worker} is the device's worker. The
devices are struck side by side. Prints one JSON object: for each device and strike, the seconds until it had recovered,
the same from the start of the manager that ran by then, and who had bound its node.

D-Bus calls never start nbdd: to start it again after a crash is systemd's business.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from dbus_next import Message
from dbus_next.aio import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType

LIMIT = 300.0
"""Seconds for one recovery; what nbd-server computes at its start takes long where processors are emulated."""

LOOK = 0.02
"""Seconds between two looks."""


class Device:
    """One device, as the bus and sysfs show it."""

    def __init__(self, bus: MessageBus, name: str) -> None:
        self._bus = bus
        self._name = name
        self._path = f"/org/nbdd1/device/{name}"

    async def properties(self) -> dict[str, Any]:
        """All of them; nothing while nobody answers."""
        reply = await self._bus.call(
            Message(
                "org.nbdd1",
                self._path,
                "org.freedesktop.DBus.Properties",
                "GetAll",
                flags=MessageFlag.NO_AUTOSTART,
                signature="s",
                body=["org.nbdd1.Device"],
            )
        )
        if reply is None or reply.message_type is MessageType.ERROR:
            return {}
        return {key: variant.value for key, variant in reply.body[0].items()}

    async def strike(self, new: str, command: str) -> dict[str, Any]:
        """Strike, and wait until the device has recovered."""
        key = {"connection": "Reconnects", "worker": "WorkerPID"}[new]
        before = await self.properties()
        start = time.monotonic()
        process = await asyncio.create_subprocess_shell(command.replace("{worker}", str(before["WorkerPID"])))
        while True:
            found = await self.properties()
            if found.get("State") == "attached" and found[key] not in (0, before[key]):
                break
            if time.monotonic() > start + LIMIT:
                raise TimeoutError(f"{self._name}: not within {LIMIT:g} s of {command!r}: {found}")
            await asyncio.sleep(LOOK)
        end = time.monotonic()
        if await process.wait():
            raise ChildProcessError(f"{command!r} failed")
        return {"seconds": end - start, "since_start": end - await self._service_start(), "bound_by": bound_by(found)}

    async def _service_start(self) -> float:
        """When systemd started the manager that runs now, monotonic."""
        show = ("systemctl", "show", "-P", "ExecMainStartTimestampMonotonic", "nbdd")
        process = await asyncio.create_subprocess_exec(*show, stdout=asyncio.subprocess.PIPE)
        told, _ = await process.communicate()
        return int(told) / 1e6


def bound_by(properties: dict[str, Any]) -> str:
    """The thread that gave the kernel the device; the next binding has another."""
    return Path("/sys/block", Path(properties["Node"]).name, "pid").read_text().strip()


async def main() -> None:
    """See above."""
    strikes: dict[str, list[tuple[str, str]]] = json.load(sys.stdin)
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()

    async def strike(name: str) -> list[dict[str, Any]]:
        device = Device(bus, name)
        return [await device.strike(new, command) for new, command in strikes[name]]

    told = await asyncio.gather(*map(strike, strikes))
    print(json.dumps(dict(zip(strikes, told, strict=True))))


if __name__ == "__main__":
    asyncio.run(main())
