# SPDX-License-Identifier: MIT
"""What a person attached and then unmounted in the file manager is detached: the other half of "Unmount" there.

A file manager knows how to eject a drive, and an NBD device is none to UDisks. So nbdd-notify looks on.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbdd.bus.caller.client import Client
from nbdd.bus.caller.device import Device
from nbdd.desktop.disks import Disks, is_own, one_at_a_time
from nbdd.desktop.udisks import UDisks


class Unmounted:
    """Which of the disks that this person attached were unmounted, and their end. All methods raise NbddError."""

    def __init__(self, client: Client, udisks: UDisks) -> None:
        self._client = client
        self._disks = Disks(client, udisks)
        self._mounted: set[tuple[str, int]] = set()

    async def look(self, devices: Iterable[Device]) -> list[Device]:
        """Those that were mounted when this was called last and are no more; `devices` are all there are."""
        now = {_key(device): device for device in devices if device.node and is_own(device)}
        mounted = {key for key, device in now.items() if await self._disks.mounted(device)}
        left = (self._mounted & now.keys()) - mounted
        self._mounted = mounted
        return [now[key] for key in left]

    async def detach(self, device: Device) -> bool:
        """Detach it, without asking anybody; False where it was mounted again, or detached, while we came to it."""
        async with one_at_a_time():
            found = Device.of(await self._client.device(device.name))
            if _key(found) != _key(device) or await self._disks.mounted(device):
                return False
            await self._disks.detach(device)
            return True


def _key(device: Device) -> tuple[str, int]:
    """What tells one attachment from the next: the name may be another disk's then."""
    return device.name, device.attached_since
