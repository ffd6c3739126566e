# SPDX-License-Identifier: MIT
"""The names of org.nbdd1 on the bus, for the service and its callers."""

from __future__ import annotations

BUS_NAME = "org.nbdd1"
ROOT_PATH = "/org/nbdd1"
"""The object manager, which has the interface org.nbdd1.Manager as well."""

MANAGER_INTERFACE = "org.nbdd1.Manager"
DEVICE_INTERFACE = "org.nbdd1.Device"

DBUS_NAME = "org.freedesktop.DBus"
"""The bus itself: its name, and the name of its interface."""

PROPERTIES_INTERFACE = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER_INTERFACE = "org.freedesktop.DBus.ObjectManager"

DBUS_ERROR = "org.freedesktop.DBus.Error."
"""What the names of the standard errors begin with."""

STATES = ("detached", "connecting", "attached", "degraded", "reconnecting", "failed", "detaching")
"""The values of the property State of a device."""

_DEVICES = ROOT_PATH + "/device/"
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_DIGITS = frozenset(b"0123456789")


def device_path(name: str) -> str:
    """The object path of a device; `name` is escaped as sd_bus_path_encode(3) does."""
    label = ""
    for octet in name.encode():
        # A digit may not be first: systemd keeps labels usable as identifiers.
        plain = octet in _LETTERS or (octet in _DIGITS and label)
        label += chr(octet) if plain else f"_{octet:02x}"
    return _DEVICES + (label or "_")


def device_name(path: str) -> str | None:
    """The inverse of `device_path`; None for a path that is not a device's."""
    label = path.removeprefix(_DEVICES)
    if label == path or "/" in label:
        return None
    if label == "_":
        return ""
    first, *escaped = label.split("_")
    try:
        octets = first.encode() + b"".join(bytes.fromhex(piece[:2]) + piece[2:].encode() for piece in escaped)
        return octets.decode()
    except ValueError:
        return None
