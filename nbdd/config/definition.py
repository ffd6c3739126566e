# SPDX-License-Identifier: MIT
"""What one device shall be: the frozen result of YAML, or of the options of a D-Bus call.

The way of a key, and all the places that a new one needs:

1. `config/nbdd.schema.json`: its type, range, default and sentence. Validation, editors and nbdd.yaml(5) have it then.
2. Here: a field of `Definition` and a line in `_SETTINGS`. With that it is read from YAML and from options, and crosses
   to the worker and into the record of a device. A record of an earlier version lacks it, and gets the field's default.
3. `nbdd.bus.daemon.objects`: its D-Bus type, if callers may give it as an option. `dbus/*.xml` and
   `nbdd.manager.status`, if the bus shows it. `nbdd.ctl`, if nbdctl has an option for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from nbdd.errors import InvalidArgs
from nbdd.text import quoted
from nbdd.uri import URI

NAME_PATTERN = r"^(?!.*-part[0-9]+$)[A-Za-z0-9][A-Za-z0-9._:-]{0,62}$"
"""Names become symbolic links, unit instances and object paths, hence so few characters."""

DEFAULT_DEAD_TIMEOUT = 300
"""Seconds."""

DEFAULT_NETWORK_TIMEOUT = 30
"""Seconds: a switch restarts a port, or a route moves, in less; and a person still waits for so long.

It is about the network and the peer's kernel, which acknowledges for a server however slow, with one exception
(measured on 6.18; net/ipv4/tcp_timer.c, tcp_probe_timer): the connection of a server that *reads* nothing for so long,
while requests fill its receive buffer, is closed too. A disk that spins up takes 10 s of that, so it is more.
"""


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
    """How a desktop shows a device; the schema has checked the values."""

    name: str = ""
    """What people call it; "" if the name of the device will do."""
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
    """The index X of /dev/nbdX, or None if the kernel may pick one."""
    read_only: bool | None = None
    """True: no writes. False: writes, or no attach. None: as the server offers it."""
    connections: int = 1
    timeout: int = 0
    """How long a request may take before the kernel closes its connection; 0 is no limit."""
    dead_timeout: int = DEFAULT_DEAD_TIMEOUT
    """How long I/O waits without any connection before it fails."""
    network_timeout: int = DEFAULT_NETWORK_TIMEOUT
    """How long the server's machine may be silent before a connection is closed; see `nbdd.server.connect.connect`."""
    block_size: int | None = None
    """Logical block size, or None to take the server's minimum (512 at least)."""
    desktop: Desktop | None = None
    """None: desktops do not show the device."""

    def with_timeout(self, timeout: int) -> Definition:
        """The same definition with another request timeout."""
        return replace(self, timeout=timeout)

    def to_wire(self) -> dict[str, Any]:
        """A JSON object by the names of the YAML keys, for the worker and for the run-time record of a device."""
        return {"name": self.name} | {
            key: setting.to_wire(getattr(self, _field(key))) for key, setting in _SETTINGS.items()
        }

    @staticmethod
    def from_wire(wire: dict[str, Any]) -> Definition:
        """The inverse of `to_wire`; a key that an earlier version did not write has its default."""
        found = {_field(key): setting.from_wire(wire[key]) for key, setting in _SETTINGS.items() if key in wire}
        return Definition(name=wire["name"], **found)


def fields_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Definition that valid settings of YAML or of a call give, by name, but for `uri`."""
    return {
        _field(key): _SETTINGS[key].of(value) for key, value in settings.items() if key in _SETTINGS and key != "uri"
    }


def _field(key: str) -> str:
    return key.replace("-", "_")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class _Setting:
    """How the value of a key becomes a field, and the field a JSON value and a field again."""

    of: Callable[[Any], Any]
    """From the value in YAML or in the options of a call, which the schema has checked."""
    to_wire: Callable[[Any], Any] = _same
    from_wire: Callable[[Any], Any] = _same


# JSON schema takes 30.0 for an integer, and so do editors: hence int, also if a value should be one.
_SETTINGS = {
    "uri": _Setting(
        _same,  # `nbdd.config.schema.parse_uris` reads it, since it can be wrong in more ways than a schema knows
        to_wire=lambda uris: [str(uri) for uri in uris],
        from_wire=lambda texts: tuple(URI.parse(text) for text in texts),
    ),
    "attach": _Setting(Attach, to_wire=str, from_wire=Attach),
    "device": _Setting(lambda value: None if value == "auto" else int(value.rpartition("nbd")[2])),
    "read-only": _Setting(bool),
    "connections": _Setting(int),
    "timeout": _Setting(int),
    "dead-timeout": _Setting(int),
    "network-timeout": _Setting(int),
    "block-size": _Setting(lambda value: None if value == "auto" else int(value)),
    "desktop": _Setting(
        Desktop.of,
        to_wire=lambda desktop: None if desktop is None else desktop.to_wire(),
        from_wire=lambda wire: None if wire is None else Desktop.of(wire),
    ),
}
"""Every key of a device, in the order of `Definition`; the field is named like the key, with underscores."""
