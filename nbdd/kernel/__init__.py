# SPDX-License-Identifier: MIT
"""The kernel's side of a device: generic netlink, sysfs, udev. The only place that knows /dev/nbdX."""

from __future__ import annotations

from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.family import ClientFlags, ServerFlags
from nbdd.kernel.netlink import NetlinkNBD
from nbdd.kernel.release import identify, let_udev_finish, release
from nbdd.kernel.sysfs import Node, find, module_loaded, nodes
from nbdd.kernel.udev import scan_partitions, settle
from nbdd.kernel.usage import Usage

__all__ = [
    "ClientFlags",
    "LinkDeadMonitor",
    "NetlinkNBD",
    "Node",
    "ServerFlags",
    "Usage",
    "find",
    "identify",
    "let_udev_finish",
    "module_loaded",
    "nodes",
    "release",
    "scan_partitions",
    "settle",
]
