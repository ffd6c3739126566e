# SPDX-License-Identifier: MIT
"""From a name, a node or a URI to a device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nbdd.bus.caller.device import DeviceView
from nbdd.errors import InvalidArgs, NoSuchDevice
from nbdd.kernel.node_name import named_index, node_path

if TYPE_CHECKING:
    from nbdd.bus.caller.client import ManagerProxy


def index_of(target: str, *, here: bool = True) -> int | None:
    """The X of the /dev/nbdX that "nbd5", "/dev/nbd5p1" or a link to it means; None if it is no such thing.

    With `here` False, for another machine, no link is followed.
    """
    return named_index(os.path.realpath(target) if here and target.startswith("/") else target)


def is_uri(target: str) -> bool:
    """Whether `target` is a URI. A name may hold a colon, but never begins like this."""
    scheme, colon, rest = target.partition(":")
    return rest.startswith("//") or bool(colon and scheme.lower() in {"nbd", "nbds", "nbd+unix", "nbds+unix"})


async def name(client: ManagerProxy, target: str, *, here: bool = True) -> str:
    """The name of the device that is meant, as `device` finds it; what can be nothing but a name is one."""
    if index_of(target, here=here) is None and "/" not in target:
        return target
    return (await device(client, target, here=here)).name


async def device(client: ManagerProxy, target: str, *, here: bool = True) -> DeviceView:
    """The device with the name `target` or, if there is none, with that node; or the one of that URI.

    Raises NoSuchDevice, or InvalidArgs if several have that URI.
    """
    index = index_of(target, here=here)
    if index is None and "/" in target:
        return await _by_uri(client, target)
    try:
        return await client.device(target)
    except NoSuchDevice:
        if index is None:
            raise
    node = node_path(index)
    for found in await client.devices():
        if found.node == node:
            return found
    raise NoSuchDevice(_not_ours(index, here=here))


async def _by_uri(client: ManagerProxy, target: str) -> DeviceView:
    if not is_uri(target):
        raise NoSuchDevice(f"{target} is no NBD device that is attached; `nbdctl list` shows what is where.")
    known = [each for each in await client.devices() if each.is_at(target)]
    found = [each for each in known if each.node] or known
    if not found:
        raise NoSuchDevice(f"No device has {target}; `nbdctl list` shows the servers of all.")
    if len(found) > 1:
        names = ", ".join(sorted(known.name for known in found))
        raise InvalidArgs(f"Several devices have {target}: {names}; say which by its name.")
    return found[0]


def _not_ours(index: int, *, here: bool) -> str:
    from nbdd.kernel.sysfs import Node  # noqa: PLC0415 - needed here only

    node = Node(index)
    if not here or not node.bound:
        return f"Nothing is attached as {node.path}; `nbdctl list` shows what is where."
    identifier = node.backend
    known = f" under the identifier {identifier!r}" if identifier else ""
    return f"{node.path} is bound{known}, but not by nbdd."
