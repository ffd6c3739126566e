# SPDX-License-Identifier: MIT
"""Ask the running nbdd for its devices and counters, in bounded time, without starting it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdd.bus.caller.client import ManagerProxy
from nbdd.bus.caller.device import DeviceView
from nbdd.errors import NbddError

LIST_SECONDS = 3.0
"""Seconds that the bus and nbdd may take to list the devices. Both limits together stay below the ten seconds that
Prometheus gives a scrape."""

COUNTS_SECONDS = 3.0
"""Seconds that all devices together may take to return their counters: they are asked at the same time."""

_AT_ONCE = 100
"""Calls under way on one connection; dbus-daemon allows 128."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The answers of nbdd at one moment."""

    at: float
    """Seconds since 1970."""
    problem: str = ""
    """Why there is no answer, in a sentence; "" if nbdd answered."""
    version: str = ""
    devices: tuple[DeviceView, ...] = ()
    """Sorted by name."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Name of a device to the counters of GetStatistics; a device that did not answer in time is missing."""

    @property
    def up(self) -> bool:
        """Whether nbdd answered."""
        return not self.problem


async def gather(list_seconds: float = LIST_SECONDS, counts_seconds: float = COUNTS_SECONDS) -> Snapshot:
    """Ask nbdd; a service that does not run, or does not answer, is a `Snapshot` with a problem."""
    try:
        # New connections each time: no hung call, and no bus that was restarted, affects the next scrape.
        async with asyncio.timeout(list_seconds), ManagerProxy(activate=False) as client:
            version = await client.version()
            found = await client.devices()
    except TimeoutError:
        return Snapshot(time.time(), f"nbdd did not answer within {list_seconds:g} seconds.")
    except NbddError as error:
        return Snapshot(time.time(), str(error))
    at = time.time()
    devices = tuple(sorted(found, key=lambda device: device.name))
    counts = await _counts([device.name for device in devices if device.node], counts_seconds)
    return Snapshot(at, version=version, devices=devices, counts=counts)


async def _counts(names: Sequence[str], seconds: float) -> dict[str, dict[str, int]]:
    """The counters of the devices that answer in time: a worker that hangs costs the others nothing."""
    found: dict[str, dict[str, int]] = {}
    batches = (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))
    await asyncio.gather(*(_ask(batch, seconds, found) for batch in batches))
    return found


async def _ask(names: Sequence[str], seconds: float, found: dict[str, dict[str, int]]) -> None:
    async def ask(client: ManagerProxy, name: str) -> None:
        with contextlib.suppress(NbddError):  # it was detached meanwhile, or has no worker just now
            found[name] = await client.statistics(name)

    with contextlib.suppress(TimeoutError, NbddError):
        async with asyncio.timeout(seconds), ManagerProxy(activate=False) as client:
            await asyncio.gather(*(ask(client, name) for name in names))
