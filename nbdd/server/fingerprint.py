# SPDX-License-Identifier: MIT
"""The UUIDs on a disk, by which an export is recognized after a reconnect.

Size and flags say little: a server that was installed again, or the next one of a list, may offer another disk of the
same size. What is on the export now is read through the new connection, before the kernel gets it, and given to
libblkid, as udev does with the device itself. What was on the device is in udev's database. Both must agree.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, fields

from nbdd.errors import ServerError
from nbdd.kernel.sysfs import Node, read
from nbdd.kernel.usage import Usage
from nbdd.protocol.transmission import read as read_export
from nbdd.server.connect import Deadline, negotiate

_EDGE = 128 << 10
"""Bytes that are read at the start and at the end: where filesystems, LUKS, LVM, mdraid and partition tables
have their UUIDs. (A superblock that lies deeper, as of ZFS or of a reiserfs, is not seen, and so not compared.)"""

_BLKID = "/usr/sbin/blkid"
_BLKID_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """UUIDs as libblkid writes them; "" is none, or not known."""

    filesystem: str = ""
    partition_table: str = ""

    def difference(self, other: Fingerprint) -> str:
        """The UUID that differs, as a part of a sentence; "" if both agree, or only one of them has a UUID."""
        for field in fields(self):
            one, two = getattr(self, field.name), getattr(other, field.name)
            if one and two and one != two:
                return f"the UUID of its {field.name.replace('_', ' ')} was {one} and is {two}"
        return ""


_KEYS = {"ID_FS_UUID": "filesystem", "ID_PART_TABLE_UUID": "partition_table"}
"""As udev's builtin and blkid's output format "udev" name them."""


def of_device(node: Node, usage: Usage, *, udev: str = "/run/udev") -> Fingerprint:
    """What udev found on the device when it last looked; nothing if that may be out of date.

    It is out of date while a program writes to the disk itself, as mkfs does: udev looks again when that is closed.
    And as long as udev is busy, unless what it had found is mounted or stacked.
    """
    number = node.devices().get(node.name)
    stale = usage.written(node) or (os.path.exists(f"{udev}/queue") and not usage.claims(node))
    return _parse("" if stale else read(f"{udev}/data/b{number}") or "", "E:")


def of_export(sock: socket.socket, size: int, block_size: int, deadline: Deadline) -> Fingerprint:
    """What a server has now; `sock` is negotiated and not yet the kernel's. Raises ServerError.

    `size` and `block_size` in bytes: no request is for less than a block.
    """
    whole = size - size % block_size
    edge = max(_EDGE, block_size)
    places = [(0, whole)] if whole <= 2 * edge else [(0, edge), (whole - edge, edge)]
    parts = negotiate(sock, read_export(places), deadline)
    return _probe(size, [(offset, part) for (offset, _), part in zip(places, parts, strict=True)])


def _probe(size: int, parts: list[tuple[int, bytes]]) -> Fingerprint:
    """Have blkid look at a file that has these parts, and holes between them."""
    import subprocess  # noqa: PLC0415 - the child that looks pays for it, and not every worker

    try:
        with open(os.memfd_create("nbdd-export"), "w+b", buffering=0) as file:
            file.truncate(size)
            for offset, part in parts:
                file.seek(offset)
                file.write(part)
            result = subprocess.run(
                [_BLKID, "--probe", "--output", "udev", f"/proc/self/fd/{file.fileno()}"],
                pass_fds=[file.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_BLKID_SECONDS,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"What is on the export could not be looked at: {error}.") from error
    return _parse(result.stdout.decode("utf-8", "replace"), "")


def _parse(text: str, prefix: str) -> Fingerprint:
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key.startswith(prefix) and (name := _KEYS.get(key.removeprefix(prefix))):
            found[name] = value
    return Fingerprint(**found)
