# SPDX-License-Identifier: MIT
"""What one device shall be: the frozen result of reading YAML or the options of a D-Bus call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from nbdd.errors import InvalidArgs
from nbdd.text import quoted
from nbdd.uri import URI

NAME_PATTERN = r"^(?!.*-part[0-9]+$)[A-Za-z0-9][A-Za-z0-9._:-]{0,62}$"
"""Names become links, unit instances and object paths, hence so few characters."""

DEFAULT_DEAD_TIMEOUT = 300

DEFAULT_NETWORK_TIMEOUT = 30
"""Long enough for a switch to restart a port or a route to move, short enough that a person still waits."""


class Attach(StrEnum):
    """When a device is attached."""

    BOOT = "boot"
    MANUAL = "manual"


def check_name(name: str) -> str:
    """Return `name` if it can name a device; raise `InvalidArgs` with the rule otherwise."""
    # fullmatch, since "$" would let a trailing newline through.
    if not re.fullmatch(NAME_PATTERN.strip("^$"), name):
        raise InvalidArgs(
            f"{quoted(name)} can't name a device: use 1 to 63 letters, digits and '. _ - :', the first a letter or "
            "digit, and no -partN at the end, as partitions have."
        )
    return name


@dataclass(frozen=True, slots=True)
class Desktop:
    """How a device shows up on a desktop; the schema has checked what stands in it."""

    name: str = ""
    """What people call it; "" where the name of the device will do."""
    icon: str = ""
    """A name of the Icon Naming Specification, or "" for the desktop's own choice."""
    user_mountable: bool = True
    """Whether a person at this machine may mount it without an administrator's password."""

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Desktop:
        """From the mapping that stands in YAML, in the options of a call or in a record."""
        return Desktop(
            name=str(settings.get("name", "")),
            icon=str(settings.get("icon", "")),
            user_mountable=bool(settings.get("user-mountable", True)),
        )

    def to_wire(self) -> dict[str, Any]:
        """The inverse of `of`."""
        return {"name": self.name, "icon": self.icon, "user-mountable": self.user_mountable}


@dataclass(frozen=True, slots=True)
class Definition:
    """One device as somebody wants it; times in seconds, sizes in bytes."""

    name: str
    uri: tuple[URI, ...]
    """Servers in the order they are tried; at least one."""
    attach: Attach = Attach.MANUAL
    device: int | None = None
    """The index X of /dev/nbdX, or None where the kernel may pick."""
    read_only: bool | None = None
    """True: no writes. False: writes, or no attach. None: as the server offers it."""
    connections: int = 1
    timeout: int = 0
    """How long a request may take before its link is given up; 0 is no limit."""
    dead_timeout: int = DEFAULT_DEAD_TIMEOUT
    """How long I/O waits without any link before it fails."""
    network_timeout: int = DEFAULT_NETWORK_TIMEOUT
    """How long the other machine may give no sign of life until a link to it is given up; see `transport.connect`."""
    block_size: int | None = None
    """Logical block size, or None to take the server's minimum (512 at least)."""
    desktop: Desktop | None = None
    """None: the device is a matter of the system and no desktop's."""

    def with_timeout(self, timeout: int) -> Definition:
        """The same definition with another request timeout."""
        return replace(self, timeout=timeout)

    def to_wire(self) -> dict[str, Any]:
        """A JSON object, for the worker and for the run-time record of a device."""
        return {
            "name": self.name,
            "uri": [str(uri) for uri in self.uri],
            "attach": str(self.attach),
            "device": self.device,
            "read-only": self.read_only,
            "connections": self.connections,
            "timeout": self.timeout,
            "dead-timeout": self.dead_timeout,
            "network-timeout": self.network_timeout,
            "block-size": self.block_size,
            "desktop": self.desktop.to_wire() if self.desktop is not None else None,
        }

    @staticmethod
    def from_wire(wire: dict[str, Any]) -> Definition:
        """The inverse of `to_wire`."""
        # A record that an earlier version wrote has no "network-timeout" and no "desktop".
        desktop = wire.get("desktop")
        return Definition(
            name=wire["name"],
            uri=tuple(URI.parse(text) for text in wire["uri"]),
            attach=Attach(wire["attach"]),
            device=wire["device"],
            read_only=wire["read-only"],
            connections=wire["connections"],
            timeout=wire["timeout"],
            dead_timeout=wire["dead-timeout"],
            network_timeout=wire.get("network-timeout", DEFAULT_NETWORK_TIMEOUT),
            block_size=wire["block-size"],
            desktop=Desktop.of(desktop) if desktop is not None else None,
        )
