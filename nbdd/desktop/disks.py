# SPDX-License-Identifier: MIT
"""From a link to a mounted network disk and back: attach and mount, unmount and detach.

nbdd attaches and UDisks mounts; polkit asks for a password if one of them needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

from nbdd.bus.caller.client import ManagerProxy
from nbdd.bus.caller.device import DeviceView
from nbdd.desktop import notice
from nbdd.desktop.udisks import Block, UDisks
from nbdd.errors import AlreadyAttached, InvalidURI, NbddError, NoSuchDevice
from nbdd.text import one_line
from nbdd.uri import URI

KNOWN_SECONDS = 10.0
"""How long UDisks may take to list a disk that udev knows."""

LEAVE_SECONDS = 5
"""How long a program that opened the disk for a moment, such as udev, may take to close it."""

_LOCK_INTERVAL = 0.1
"""Seconds between two tries to take the lock; a wait in the kernel could not be interrupted."""

_SYS = Path("/sys/class/block")

_PASSING = {"detaching": "being detached", "connecting": "being adopted by nbdd"}
"""Short states of a device that has its node."""

log = logging.getLogger("nbdd-open")


@contextlib.asynccontextmanager
async def one_at_a_time() -> AsyncIterator[None]:
    """Lock out other instances of the same user that open or detach a disk.

    Two clicks on one link attach one disk: the second waits, and finds what the first has attached.
    """
    place = Path(os.environ.get("XDG_RUNTIME_DIR", ""), "nbdd-open.lock")
    lock = None
    with contextlib.suppress(OSError):  # There is no session, or it belongs to another user.
        if place.is_absolute():
            lock = os.open(place, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if lock is None:
        yield
        return
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_INTERVAL)
        yield
    finally:
        os.close(lock)


def link(text: str) -> URI:
    """The URI in a link. Raises InvalidURI if it is none, or one that a web page must not make a user open."""
    uri = URI.parse(text)
    if uri.user or uri.options:
        # The author of a link could choose which of this machine's keys are used for which server.
        raise InvalidURI(
            "A link must not name a user or a file with keys; somebody who trusts it writes it into /etc/nbdd instead."
        )
    return uri


class Disks:
    """Network disks of this machine, as a desktop uses them. All methods raise NbddError."""

    def __init__(self, client: ManagerProxy, udisks: UDisks) -> None:
        self._client = client
        self._udisks = udisks

    async def attach(self, uri: URI) -> DeviceView:
        """The device of an export: the existing one, or else a new one for this desktop.

        Two devices of one export, both mounted, would destroy the filesystem.
        """
        for device in await self._devices():
            if not device.is_at(str(uri)):
                continue
            if device.node:
                if device.state in _PASSING:
                    raise NbddError(f"{notice.title(device)} is {_PASSING[device.state]}; try again in a moment.")
                if not notice.works(device):
                    raise NbddError(
                        f"{notice.title(device)} is attached as {device.node}, but {notice.server(device)} does not "
                        "answer; nbdd keeps trying."
                    )
                return device
            if device.configured or device.state == "connecting":
                try:
                    return await self._client.device_at(await self._client.attach(device.name, {}))
                except AlreadyAttached:
                    return await self._client.device(device.name)
        path = await self._client.attach_uri(str(uri), {"desktop": {}})
        return await self._client.device_at(path)

    async def mount(self, device: DeviceView) -> Path:
        """Mount every filesystem on the device that can be; returns where the largest of them is."""
        partitions = {f"/dev/{path.name}" for path in _SYS.joinpath(Path(device.node).name).glob("nbd*p*")}

        def known(blocks: list[Block]) -> bool:
            there = {block.node for block in blocks if block.size}
            return {device.node, *partitions} <= there and any(block.usage for block in blocks)

        blocks = await self._udisks.blocks_when(device.node, known, KNOWN_SECONDS)
        wanted = [block for block in blocks if block.mountable and not block.ignored]
        if not wanted:
            raise NbddError(_nothing_to_mount(device, blocks))
        wanted.sort(key=lambda block: block.size, reverse=True)
        for block in wanted:
            for twin in () if block.mount_points else await self._udisks.mounted_twins(block):
                raise NbddError(
                    f"{notice.title(device)} holds the same filesystem as {twin.node}, which is mounted at "
                    f"{twin.mount_points[0]}; mounted twice, it would be destroyed. If it is a copy, mount it by hand; "
                    f"'nbdd-open --detach {device.name}' takes it away again."
                )
        folders: list[str] = []
        problems: list[NbddError] = []
        for block in wanted:
            try:
                folders.append(await self._udisks.mount(block))
            except NbddError as problem:
                problems.append(problem)
        if not folders:
            raise problems[0]
        for left in problems:
            log.warning("nbdd-open: %s", one_line(str(left), notice.MAX_TEXT))
        return Path(folders[0])

    async def find(self, target: str) -> list[DeviceView]:
        """The devices that a name, a link, a node or a folder means; "" means all that this user attached."""
        if not target:
            return [device for device in await self._devices() if device.node and is_own(device)]
        attached = [device for device in await self._devices() if device.node]
        place = os.path.realpath(target) if target.startswith("/") else ""  # noqa: ASYNC240 - one call, nothing waits
        for device in attached:
            if target == device.name or device.is_at(target) or (place and await self._is_place_of(device, place)):
                return [device]
        raise NoSuchDevice(
            f"{one_line(target, notice.MAX_TEXT)} is no network disk that is attached; 'nbdctl list' shows them."
        )

    async def mounted(self, device: DeviceView) -> bool:
        """Whether the device, or a partition of it, is mounted anywhere."""
        return any(block.mount_points for block in await self._udisks.blocks(device.node))

    async def _is_place_of(self, device: DeviceView, place: str) -> bool:
        """Whether `place` is a node of the device, or a folder where it is mounted."""
        blocks = await self._udisks.blocks(device.node)
        return place == device.node or any(place == block.node or place in block.mount_points for block in blocks)

    async def detach(self, device: DeviceView) -> None:
        """Unmount what is mounted of the device, then detach it."""
        for block in await self._udisks.blocks(device.node):
            await self._udisks.unmount(block)
        await self._client.detach(device.name, {"wait": LEAVE_SECONDS})

    async def _devices(self) -> list[DeviceView]:
        return await self._client.devices()


def is_own(device: DeviceView) -> bool:
    """Whether this user attached it for the desktop; what the configuration attached belongs to no user."""
    return device.desktop and device.attached_by == os.geteuid() != 0


def _nothing_to_mount(device: DeviceView, blocks: list[Block]) -> str:
    name, node = notice.title(device), device.node
    if not any(block.size for block in blocks):
        return f"{name} is attached as {node}, but UDisks does not know it, so it can't be mounted."
    if any(block.usage == "crypto" for block in blocks):
        return f"{name} is attached as {node}, and encrypted: unlock it in the file manager."
    return (
        f"{name} is attached as {node}, but has no filesystem that could be opened; 'nbdd-open --detach {device.name}' "
        "takes it away again."
    )
