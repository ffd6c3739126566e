# SPDX-License-Identifier: MIT
"""Ask the running nbdd for all there is to tell; bounded in time, and never the cause of its start."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdd.bus.caller.client import Client
from nbdd.bus.caller.device import Device
from nbdd.errors import NbddError

LIST_SECONDS = 3.0
"""How long the bus and nbdd may take to list the devices. With the other limit it stays below the ten seconds that
Prometheus gives a scrape."""

COUNTS_SECONDS = 3.0
"""How long all devices together may take to tell what the kernel counted: they are asked side by side."""

_AT_ONCE = 100
"""Calls under way on one connection; dbus-daemon lets nobody have more than 128."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What nbdd told at one moment."""

    at: float
    """Seconds since 1970."""
    problem: str = ""
    """Why nothing is told, in a sentence; "" where nbdd answered."""
    version: str = ""
    devices: tuple[Device, ...] = ()
    """Sorted by name."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Name of a device to the counters of GetStatistics; those that were not told in time are not there."""

    @property
    def up(self) -> bool:
        """Whether nbdd answered."""
        return not self.problem


async def gather(list_seconds: float = LIST_SECONDS, counts_seconds: float = COUNTS_SECONDS) -> Snapshot:
    """Ask nbdd; a service that does not run, or does not answer, is a `Snapshot` with a problem."""
    try:
        # Connections for each look: nothing of a hung call, or of a bus that was restarted, is left for the next one.
        async with asyncio.timeout(list_seconds), Client(activate=False) as client:
            version = await client.version()
            found = await client.devices()
    except TimeoutError:
        return Snapshot(time.time(), f"nbdd did not answer within {list_seconds:g} seconds.")
    except NbddError as error:
        return Snapshot(time.time(), str(error))
    at = time.time()
    devices = tuple(sorted(map(Device.of, found), key=lambda device: device.name))
    counts = await _counts([device.name for device in devices if device.node], counts_seconds)
    return Snapshot(at, version=version, devices=devices, counts=counts)


async def _counts(names: Sequence[str], seconds: float) -> dict[str, dict[str, int]]:
    """What the kernel counted, for those that tell it in time: one whose worker hangs costs the others nothing."""
    found: dict[str, dict[str, int]] = {}
    batches = (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))
    await asyncio.gather(*(_ask(batch, seconds, found) for batch in batches))
    return found


async def _ask(names: Sequence[str], seconds: float, found: dict[str, dict[str, int]]) -> None:
    async def ask(client: Client, name: str) -> None:
        with contextlib.suppress(NbddError):  # it was detached meanwhile, or has no worker just now
            found[name] = await client.statistics(name)

    with contextlib.suppress(TimeoutError, NbddError):
        async with asyncio.timeout(seconds), Client(activate=False) as client:
            await asyncio.gather(*(ask(client, name) for name in names))
