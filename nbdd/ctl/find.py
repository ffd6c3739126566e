# SPDX-License-Identifier: MIT
"""Which device is meant, by whatever a person calls it."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from nbdd.ctl.record import Device
from nbdd.errors import NoSuchDevice

if TYPE_CHECKING:
    from nbdd.bus.client import Client

_NODE = re.compile(r"(?:/dev/)?nbd(0|[1-9][0-9]{0,4})(?:p[0-9]+)?")


def index_of(target: str, *, here: bool = True) -> int | None:
    """The X of the /dev/nbdX that "nbd5", "/dev/nbd5p1" or a link to it means; None where it is no such thing.

    Unless it is `here`, on this machine, no link is followed.
    """
    found = _NODE.fullmatch(os.path.realpath(target) if here and target.startswith("/") else target)
    return int(found[1]) if found else None


async def device(client: Client, target: str, *, here: bool = True) -> Device:
    """The device that has the name `target` or, where none has, that node; raises NoSuchDevice."""
    index = index_of(target, here=here)
    try:
        return Device.of(await client.device(target))
    except NoSuchDevice:
        if index is None:
            raise
    node = f"/dev/nbd{index}"
    for found in map(Device.of, await client.devices()):
        if found.node == node:
            return found
    raise NoSuchDevice(_not_ours(index, here=here))


def _not_ours(index: int, *, here: bool) -> str:
    from nbdd.kernel.sysfs import Node  # noqa: PLC0415 - needed here only

    node = Node(index)
    if not here or not node.bound:
        return f"Nothing is attached as {node.path}; `nbdctl list` shows what is where."
    identifier = node.backend
    known = f" under the identifier {identifier!r}" if identifier else ""
    return f"{node.path} is bound{known}, but not by nbdd."
