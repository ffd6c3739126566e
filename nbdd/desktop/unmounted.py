# SPDX-License-Identifier: MIT
"""Detach disks that their user has unmounted in the file manager.

A file manager ejects drives, but to UDisks an NBD device is no drive. So nbdd-notify watches mounts.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbdd.bus.caller.client import ManagerProxy
from nbdd.bus.caller.device import DeviceView
from nbdd.desktop.disks import Disks, is_own, one_at_a_time
from nbdd.desktop.udisks import UDisks


class Unmounted:
    """Finds and detaches disks of this user that were unmounted. All methods raise NbddError."""

    def __init__(self, client: ManagerProxy, udisks: UDisks) -> None:
        self._client = client
        self._disks = Disks(client, udisks)
        self._mounted: set[tuple[str, int]] = set()

    async def look(self, devices: Iterable[DeviceView]) -> list[DeviceView]:
        """The devices that were mounted at the last call and are not now; `devices` are all there are."""
        now = {_key(device): device for device in devices if device.node and is_own(device)}
        mounted = {key for key, device in now.items() if await self._disks.mounted(device)}
        left = (self._mounted & now.keys()) - mounted
        self._mounted = mounted
        return [now[key] for key in left]

    async def detach(self, device: DeviceView) -> bool:
        """Detach it without asking for a password; False if it was mounted again, or detached, meanwhile."""
        async with one_at_a_time():
            found = await self._client.device(device.name)
            if _key(found) != _key(device) or await self._disks.mounted(device):
                return False
            await self._disks.detach(device)
            return True


def _key(device: DeviceView) -> tuple[str, int]:
    """Identifies one attachment: a later one may have the same name."""
    return device.name, device.attached_since
