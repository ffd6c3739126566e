# SPDX-License-Identifier: MIT
"""org.nbdd1.Manager and org.nbdd1.Device: D-Bus calls become calls of the manager, its changes D-Bus signals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbdd import __version__
from nbdd.bus.daemon.polkit import Authority
from nbdd.bus.daemon.service import Caller, ExportedInterface, ServiceBus, clean
from nbdd.bus.wire.interface import Interface
from nbdd.bus.wire.library import Variant
from nbdd.bus.wire.names import device_path
from nbdd.bus.wire.properties import FIELDS
from nbdd.data import read
from nbdd.errors import InvalidArgs, NegotiationFailed
from nbdd.manager.device import Device
from nbdd.manager.manager import Manager
from nbdd.manager.status import Status
from nbdd.protocol import Export
from nbdd.uri import URI

ATTACH_OPTIONS = {
    "device": "s",
    "read-only": "b",
    "connections": "u",
    "timeout": "u",
    "dead-timeout": "u",
    "network-timeout": "u",
    "block-size": "u",
}
"""The options of Attach, with their types."""

ATTACH_URI_OPTIONS = {"name": "s", "desktop": "a{sv}"} | ATTACH_OPTIONS
MAX_WAIT = 3600
"""Seconds that a Detach may wait until the device is unused; meanwhile every other call for it is refused."""

DETACH_OPTIONS = {"force": "b", "wait": "u"}

_MAX_LIST = 30 << 20
"""Bytes of a list of exports, at 100 for each beside its texts. The system bus takes messages of up to 32 MiB, and ends
a connection that sends more."""

_TYPES = {"s": "a string (s)", "b": "a boolean (b)", "u": "an unsigned number (u)", "a{sv}": "a mapping (a{sv})"}


def read_options(options: Mapping[str, Variant], known: Mapping[str, str]) -> dict[str, Any]:
    """The options of a call as plain values; raises InvalidArgs for keys and types that `known` does not have."""
    found = {}
    for key, variant in options.items():
        if key not in known:
            raise InvalidArgs(f"There is no option {key!r}; known are {', '.join(sorted(known)) or 'none'}.")
        if variant.signature != known[key]:
            raise InvalidArgs(
                f"The option {key!r} must be {_TYPES[known[key]]}, not of the type {variant.signature!r}."
            )
        # Of what stands in a mapping, the schema of the configuration knows keys and types.
        mapping = known[key] == "a{sv}"
        found[key] = {name: item.value for name, item in variant.value.items()} if mapping else variant.value
    return found


class ManagerInterface(ExportedInterface):
    """org.nbdd1.Manager on the bus."""

    def __init__(self, manager: Manager, authority: Authority) -> None:
        super().__init__(
            Interface.parse(read("org.nbdd1.Manager.xml")),
            {
                "Attach": self._attach,
                "AttachURI": self._attach_uri,
                "Detach": self._detach,
                "SetTimeout": self._set_timeout,
                "Reconnect": self._reconnect,
                "Resize": self._resize,
                "Reload": self._reload,
                "ListExports": self._list_exports,
            },
        )
        self._manager = manager
        self._authority = authority

    def values(self) -> dict[str, Any]:
        """See the XML."""
        return {"Version": __version__}

    # Each handler reads its arguments first: a wrong call fails without a password prompt.

    async def _attach(self, caller: Caller, arguments: list[Any]) -> list[Any]:
        name, options = arguments
        values = read_options(options, ATTACH_OPTIONS)
        about = self._about_device(name)
        await self._authority.check(caller, "org.nbdd1.attach", about)
        device = await self._manager.attach(name, values, by=await self._authority.user(caller))
        return [device_path(device.name)]

    async def _attach_uri(self, caller: Caller, arguments: list[Any]) -> list[Any]:
        uri, options = arguments
        values = read_options(options, ATTACH_URI_OPTIONS)
        await self._authority.check(caller, "org.nbdd1.attach-uri", _about_server(uri))
        device = await self._manager.attach_uri(uri, values, by=await self._authority.user(caller))
        return [device_path(device.name)]

    async def _detach(self, caller: Caller, arguments: list[Any]) -> list[Any]:
        name, options = arguments
        values = read_options(options, DETACH_OPTIONS)
        if values.get("wait", 0) > MAX_WAIT:
            raise InvalidArgs(f"The option 'wait' goes up to {MAX_WAIT} seconds.")
        about = self._about_device(name)
        action = "org.nbdd1.force-detach" if values.get("force") else "org.nbdd1.detach"
        # The user who attached a disk may detach it, as with mounts of UDisks. Nothing is awaited from this comparison
        # to the detach: the disk could be another user's then.
        user = await self._authority.user(caller)
        if values.get("force") or user != self._manager.device(name).status.attached_by:
            await self._authority.check(caller, action, about)
        await self._manager.detach(name, **values)
        return []

    async def _set_timeout(self, caller: Caller, arguments: list[Any]) -> list[Any]:
        name, seconds = arguments
        about = self._about_device(name)
        await self._authority.check(caller, "org.nbdd1.set-timeout", about)
        await self._manager.set_timeout(name, seconds)
        return []

    async def _reconnect(self, caller: Caller, arguments: list[Any]) -> list[Any]:
        name, options = arguments
        read_options(options, {})
        about = self._about_device(name)
        await self._authority.check(caller, "org.nbdd1.reconnect", about)
        await self._manager.reconnect(name)
        return []

    async def _resize(self, caller: Caller, arguments: list[Any]) -> list[Any]:
        name, options = arguments
        read_options(options, {})
        about = self._about_device(name)
        await self._authority.check(caller, "org.nbdd1.resize", about)
        return [await self._manager.resize(name)]

    async def _reload(self, caller: Caller, _arguments: list[Any]) -> list[Any]:
        await self._authority.check(caller, "org.nbdd1.reload", {})
        changes = await self._manager.reload()
        return [list(changes.added), list(changes.changed), list(changes.removed)]

    async def _list_exports(self, caller: Caller, arguments: list[Any]) -> list[Any]:
        uri, options = arguments
        read_options(options, {})
        await self._authority.check(caller, "org.nbdd1.list-exports", _about_server(uri))
        exports = await self._manager.list_exports(uri)
        texts = (text for export in exports for text in (export.name, export.description, export.problem))
        if 100 * len(exports) + sum(len(clean(text).encode()) for text in texts) > _MAX_LIST:
            raise NegotiationFailed(
                f"The server lists {len(exports)} exports, with names too long for one D-Bus message."
            )
        return [[_export(export) for export in exports]]

    def _about_device(self, name: str) -> dict[str, str]:
        """Details of a device for polkit's messages and rules; raises NoSuchDevice, or InvalidArgs."""
        configured = self._manager.device(name).status.configured
        return {"device": name, "configured": "yes" if configured else "no"}


def _about_server(text: str) -> dict[str, str]:
    """Details of a URI for polkit's messages and rules; raises InvalidURI.

    Never the text as it came: a person types a password below a message with it.
    """
    uri = URI.parse(text)
    return {"uri": str(uri), "server": uri.address}


def _export(export: Export) -> dict[str, Variant]:
    values = {
        "name": Variant("s", clean(export.name)),
        "description": Variant("s", clean(export.description)),
    }
    if export.problem:
        values["problem"] = Variant("s", clean(export.problem))
    else:
        values["size"] = Variant("t", export.size)
    if export.flags:
        values["flags"] = Variant("u", int(export.flags))
    for bound in ("minimum", "preferred", "maximum"):
        if (number := getattr(export, bound)) is not None:
            values[f"{bound}-block-size"] = Variant("u", number)
    return values


class DeviceInterface(ExportedInterface):
    """org.nbdd1.Device on the bus."""

    def __init__(self, interface: Interface, device: Device) -> None:
        super().__init__(interface, {"GetStatistics": self._get_statistics})
        self._device = device

    def values(self) -> dict[str, Any]:
        """See the XML."""
        return _values(self._device.status)

    async def _get_statistics(self, _caller: Caller, _arguments: list[Any]) -> list[Any]:
        return [await self._device.statistics()]


def _values(status: Status) -> dict[str, Any]:
    shown = {name: getattr(status, field) for name, field in FIELDS.items()}
    return shown | {"DisplayName": status.display_name or status.name}


class ObjectExporter:
    """Exports the manager's devices as objects on the bus; an `Observer`."""

    def __init__(self, bus: ServiceBus) -> None:
        self._bus = bus
        self._interface = Interface.parse(read("org.nbdd1.Device.xml"))
        self._exported: dict[str, DeviceInterface] = {}

    def added(self, device: Device) -> None:
        """Put the device on the bus."""
        exported = self._exported[device.name] = DeviceInterface(self._interface, device)
        self._bus.add_object(device_path(device.name), exported)

    def changed(self, device: Device, old: Status) -> None:
        """Send the properties that are different now."""
        before, now = _values(old), _values(device.status)
        names = {name for name in now if now[name] != before[name]}
        if names and device.name in self._exported:
            self._bus.properties_changed(device_path(device.name), self._exported[device.name], names)

    def removed(self, device: Device) -> None:
        """Take the device off the bus."""
        del self._exported[device.name]
        self._bus.remove_object(device_path(device.name))
