# SPDX-License-Identifier: MIT
"""UDisks, which mounts and unmounts disks for the user of a desktop (http://storaged.org/doc/udisks2-api/latest/)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nbdd.bus.caller.connection import CallerBus
from nbdd.bus.wire.calls import DBUS, CallError, Peer
from nbdd.bus.wire.library import Message, MessageFlag, MessageType, Variant
from nbdd.bus.wire.names import DBUS_ERROR, OBJECT_MANAGER_INTERFACE, PROPERTIES_INTERFACE
from nbdd.errors import AccessDenied, Busy, NbddError
from nbdd.kernel.node_name import named_index
from nbdd.text import clause

_NAME = "org.freedesktop.UDisks2"
_ROOT = Peer(_NAME, "/org/freedesktop/UDisks2", OBJECT_MANAGER_INTERFACE)
_BLOCK, _FILESYSTEM, _PARTITION = f"{_NAME}.Block", f"{_NAME}.Filesystem", f"{_NAME}.Partition"
_RULE = f"type='signal',sender='{_NAME}',path_namespace='{_ROOT.path}'"
_MOUNTS_RULE = (
    f"type='signal',sender='{_NAME}',path_namespace='{_ROOT.path}',interface='{PROPERTIES_INTERFACE}',"
    f"member='PropertiesChanged',arg0='{_FILESYSTEM}'"
)
_LONG = ("Mount", "Unmount")
_ANSWER_SECONDS = 5
"""How long UDisks may take to answer; a healthy one needs some milliseconds, or a second to start."""

_MOUNTED_ALREADY = f"{_NAME}.Error.AlreadyMounted"
_REFUSALS = tuple(f"{_NAME}.Error.NotAuthorized{how}" for how in ("", "CanObtain", "Dismissed"))
_BUSY = f"{_NAME}.Error.DeviceBusy"
_ABSENT = (DBUS_ERROR + "ServiceUnknown", DBUS_ERROR + "NameHasNoOwner")


@dataclass(frozen=True, slots=True)
class Block:
    """A disk or a partition, as UDisks has it."""

    path: str
    """Of its object."""
    node: str
    size: int
    """Bytes."""
    usage: str
    """"filesystem", "crypto", … or "" if nothing was found on it."""
    ignored: bool
    mountable: bool
    mount_points: tuple[str, ...]
    uuid: str = ""
    """Of the filesystem; "" if it has none."""


class UDisks:
    """UDisks on the system bus. All methods raise NbddError with a sentence."""

    def __init__(self, bus: CallerBus) -> None:
        self._bus = bus
        self._mounts = asyncio.Event()

    async def blocks(self, node: str) -> list[Block]:
        """The disk with that node and its partitions, those that UDisks knows."""
        [objects] = await self._call(_ROOT, "GetManagedObjects", returns="a{oa{sa{sv}}}")
        disk = next((path for path, interfaces in objects.items() if _node(interfaces) == node), None)
        if disk is None:
            return []
        return [
            _block(path, interfaces)
            for path, interfaces in objects.items()
            if path == disk or (_BLOCK in interfaces and _value(interfaces, _PARTITION, "Table") == disk)
        ]

    async def mounted_twins(self, block: Block) -> list[Block]:
        """Filesystems with the UUID of this one that are mounted from other NBD devices: its copies, or itself."""
        [objects] = await self._call(_ROOT, "GetManagedObjects", returns="a{oa{sa{sv}}}")
        found = [_block(path, interfaces) for path, interfaces in objects.items() if path != block.path]
        return [
            each
            for each in found
            if block.uuid and each.uuid == block.uuid and each.mount_points and named_index(each.node) is not None
        ]

    async def blocks_when(self, node: str, true: Callable[[list[Block]], bool], seconds: float) -> list[Block]:
        """The same as soon as they are as expected, or as they are after `seconds`: UDisks follows udev."""
        signalled = asyncio.Event()

        def on_message(message: Message) -> None:
            if message.message_type is MessageType.SIGNAL:
                signalled.set()

        self._bus.add_message_handler(on_message)
        try:
            await self._call(DBUS, "AddMatch", "s", _RULE)
            found = await self.blocks(node)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while not true(found):
                        await signalled.wait()
                        signalled.clear()
                        found = await self.blocks(node)
            return found
        finally:
            self._bus.remove_message_handler(on_message)

    async def watch_mounts(self) -> None:
        """Subscribe to changes of mounts. Does not start UDisks."""

        def on_message(message: Message) -> None:
            if message.message_type is MessageType.SIGNAL and message.body[:1] == [_FILESYSTEM]:
                self._mounts.set()

        self._bus.add_message_handler(on_message)
        await self._call(DBUS, "AddMatch", "s", _MOUNTS_RULE)

    async def mounts_change(self) -> None:
        """Return when something was mounted or unmounted since the last call; needs `watch_mounts` first."""
        await self._mounts.wait()
        self._mounts.clear()

    async def mount(self, block: Block) -> str:
        """Mount a filesystem for our user; return the mount point. It is no fault if it is mounted already."""
        if block.mount_points:
            return block.mount_points[0]
        try:
            [where] = await self._filesystem(block, "Mount", returns="s")
        except _MountedAlready:
            # By the desktop itself, which does so with removable drives.
            found = await self.blocks(block.node)
            return next(where for other in found for where in other.mount_points if other.path == block.path)
        return str(where)

    async def unmount(self, block: Block) -> None:
        """Unmount a filesystem from everywhere; raises Busy if it is in use."""
        for _ in block.mount_points:
            await self._filesystem(block, "Unmount")

    async def _filesystem(self, block: Block, member: str, returns: str = "") -> list[Any]:
        return await self._call(Peer(_NAME, block.path, _FILESYSTEM), member, "a{sv}", {}, returns=returns)

    async def _call(self, peer: Peer, member: str, signature: str = "", *body: Any, returns: str = "") -> list[Any]:
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
        # Mounting and unmounting may take long: a person is asked, a journal is replayed, data are written.
        seconds = None if member in _LONG else _ANSWER_SECONDS
        try:
            async with asyncio.timeout(seconds):
                return await peer.call(self._bus, member, signature, body, returns=returns, flags=flags)
        except TimeoutError:
            raise NbddError(f"UDisks does not answer within {_ANSWER_SECONDS} s.") from None
        except CallError as problem:
            what = clause(problem)
            if problem.name == _MOUNTED_ALREADY:
                raise _MountedAlready(what) from None
            if problem.name in _REFUSALS:
                raise AccessDenied(f"Polkit does not let you {member.lower()} it: {what}.") from None
            if problem.name == _BUSY:
                raise Busy(f"It is still in use: {what}.") from None
            if problem.name in _ABSENT:
                raise NbddError("UDisks, which mounts disks for users, is missing; install udisks2.") from None
            raise NbddError(f"UDisks could not {member.lower()} it: {what}.") from None
        except (EOFError, OSError):
            raise NbddError("The connection to the system bus was lost.") from None


class _MountedAlready(NbddError):
    """It was mounted meanwhile."""


def _value(interfaces: Mapping[str, Mapping[str, Variant]], interface: str, name: str) -> Any:
    found = interfaces.get(interface, {}).get(name)
    return found.value if found is not None else None


def _node(interfaces: Mapping[str, Mapping[str, Variant]]) -> str:
    return _path(_value(interfaces, _BLOCK, "Device") or b"")


def _path(octets: bytes) -> str:
    """A path of UDisks: bytes with a NUL at their end."""
    return bytes(octets).rstrip(b"\0").decode(errors="surrogateescape")


def _block(path: str, interfaces: Mapping[str, Mapping[str, Variant]]) -> Block:
    return Block(
        path=path,
        node=_node(interfaces),
        size=int(_value(interfaces, _BLOCK, "Size") or 0),
        usage=str(_value(interfaces, _BLOCK, "IdUsage") or ""),
        ignored=bool(_value(interfaces, _BLOCK, "HintIgnore")),
        mountable=_FILESYSTEM in interfaces,
        mount_points=tuple(map(_path, _value(interfaces, _FILESYSTEM, "MountPoints") or ())),
        uuid=str(_value(interfaces, _BLOCK, "IdUUID") or ""),
    )
