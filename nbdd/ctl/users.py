# SPDX-License-Identifier: MIT
"""What uses the devices, as far as the caller may see. Read from this machine, not from nbdd.

nbdd.kernel is imported in the functions: most commands don't need it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdd.kernel.node_name import node_index


@dataclass(frozen=True, slots=True)
class Users:
    """What uses one device."""

    found: tuple[str, ...]
    """A sentence without its full stop for each, such as "/dev/nbd0p1 is mounted on /srv"."""
    complete: bool
    """Whether the caller may see all processes; if not, there may be more."""


def users_of(node: str) -> Users:
    """What uses the device and its partitions: mounts, swap, stacked devices, processes."""
    from nbdd.kernel.sysfs import Node  # noqa: PLC0415
    from nbdd.kernel.usage import Usage  # noqa: PLC0415

    usage = Usage()
    index = node_index(node)
    return Users(() if index is None else tuple(usage.users(Node(index))), usage.sees_all())


def claims() -> dict[str, list[str]]:
    """What is mounted, swapped on or stacked, by node; without the processes that merely have one open."""
    from nbdd.kernel.usage import Usage  # noqa: PLC0415

    return Usage().all_claims()
