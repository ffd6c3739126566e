# SPDX-License-Identifier: MIT
"""Calls to a running nbdd over D-Bus, and its events; for nbdctl and every other program beside the service.

Errors that come over the bus become the tree of `nbdd.errors` again. What keeps a call from reaching nbdd at all
is a plain `NbddError` whose sentence says where to look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

from nbdd.bus.caller.connection import CONNECT_SECONDS, CallerBus
from nbdd.bus.caller.device import DeviceView, fields
from nbdd.bus.caller.failure import SEE_JOURNAL, UnknownObject, error_of, no_bus, no_device, no_remote_bus
from nbdd.bus.caller.ssh import Bridge
from nbdd.bus.wire.calls import DBUS, CallError, Peer, WrongReply
from nbdd.bus.wire.library import BusType, Message, MessageFlag, MessageType, Variant
from nbdd.bus.wire.names import (
    BUS_NAME,
    DEVICE_INTERFACE,
    MANAGER_INTERFACE,
    OBJECT_MANAGER_INTERFACE,
    PROPERTIES_INTERFACE,
    ROOT_PATH,
    device_name,
    device_path,
)
from nbdd.errors import NbddError

log = logging.getLogger(__name__)

Option: TypeAlias = "bool | int | str | Mapping[str, bool | int | str]"
Options: TypeAlias = Mapping[str, Option]
"""What a call takes beside its arguments, as plain values."""

_REMOTE_SECONDS = 90
"""How long the bus may take to let us in over ssh, which may ask a person for a password; as in sd-bus
(BUS_AUTH_TIMEOUT)."""

_RULES = (
    f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT_PATH}'",
    f"type='signal',sender='{DBUS.destination}',interface='{DBUS.interface}',member='NameOwnerChanged',arg0='{BUS_NAME}'",
)
"""The signals that `ManagerProxy.subscribe` asks for."""


class EventKind(StrEnum):
    """What a `ManagerEvent` is about."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"
    STARTED = "started"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ManagerEvent:
    """Something that happened to a device or, with `STARTED` and `STOPPED`, to nbdd itself."""

    kind: EventKind
    name: str = ""
    """The name of the device; "" if the event is about nbdd."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `DeviceView`: all of an added device, the new values of a changed one; None for a value that was not
    sent."""


class Reloaded(NamedTuple):
    """The names that a reload touched."""

    added: list[str]
    changed: list[str]
    removed: list[str]


class ManagerProxy:
    """The service as its callers see it: a connection to nbdd over the system bus, for use in ``async with``.

    No call has a time limit of its own: an attach takes as long as the service lets it. With ``activate=False``
    no call starts a service that is not running, and no person is asked for a password. With `host`, it is the system
    bus of that machine, reached with ssh.
    """

    def __init__(self, *, activate: bool = True, host: str | None = None) -> None:
        self._ask = activate
        self._host = host
        self._bridge: Bridge | None = None
        self._flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if activate else MessageFlag.NO_AUTOSTART
        self._bus: Any = None  # dbus-next is half typed
        self._end: asyncio.Task[None] | None = None
        self._owner: str | None = None
        self._events: asyncio.Queue[ManagerEvent | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        if self._host is not None:
            self._bridge = await Bridge.open(self._host, ask=self._ask)
        try:
            async with asyncio.timeout(CONNECT_SECONDS if self._bridge is None else _REMOTE_SECONDS):
                # dbus-next: takes the running loop, so the bus is made here and not in the constructor.
                self._bus = CallerBus(self._bridge or BusType.SYSTEM)
                await self._bus.connect()
        except Exception as problem:  # dbus-next raises whatever it met: OSError, EOFError, its own
            found = await self._not_connected(problem)
            await self._close()
            raise found from problem
        except BaseException:  # Ctrl-C, perhaps while ssh asks for a password
            await self._close()
            raise
        self._end = asyncio.ensure_future(self._bus.wait_for_disconnect())
        self._end.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bus is not None and self._end is not None:
            self._bus.disconnect()
            await asyncio.wait({self._end}, timeout=1)
        await self._close()

    async def _close(self) -> None:
        if self._bus is not None:
            self._bus.close()
        if self._bridge is not None:
            await self._bridge.close()

    async def _not_connected(self, problem: Exception) -> NbddError:
        """Why the bus can't be reached, in a sentence."""
        if self._bridge is None or self._host is None:
            return no_bus(problem)
        said = await self._bridge.reason() if isinstance(problem, EOFError | ConnectionError) else None
        return no_remote_bus(self._host, problem, said)

    def _ended(self, end: asyncio.Task[None]) -> None:
        if not end.cancelled():
            end.exception()  # else asyncio complains that it was never retrieved
        self._events.put_nowait(None)

    # What nbdd can do; each method of org.nbdd1.Manager with its own errors (dbus/org.nbdd1.Manager.xml).

    async def attach(self, name: str, options: Options) -> str:
        """Attach the device `name` that has a definition; return its object path when it is usable."""
        (path,) = await self._manager("Attach", "sa{sv}", name, _variants(options), reply="o")
        return str(path)

    async def attach_uri(self, uri: str, options: Options) -> str:
        """Attach an export that has no definition; return the object path of its device when it is usable."""
        (path,) = await self._manager("AttachURI", "sa{sv}", uri, _variants(options), reply="o")
        return str(path)

    async def detach(self, name: str, options: Options) -> None:
        """Detach a device; returns when the kernel's device is free again."""
        await self._manager("Detach", "sa{sv}", name, _variants(options))

    async def set_timeout(self, name: str, seconds: int) -> None:
        """Set how long a request may take; 0 is no limit."""
        await self._manager("SetTimeout", "su", name, seconds)

    async def reconnect(self, name: str) -> None:
        """Exchange the connections of the device for new ones."""
        await self._manager("Reconnect", "sa{sv}", name, {})

    async def resize(self, name: str) -> int:
        """Take the size that the server reports now; returns it, in bytes."""
        (size,) = await self._manager("Resize", "sa{sv}", name, {}, reply="t")
        return int(size)

    async def reload(self) -> Reloaded:
        """Make nbdd read its configuration again."""
        return Reloaded(*await self._manager("Reload", reply="asasas"))

    async def exports(self, uri: str) -> list[dict[str, Any]]:
        """Ask the server of `uri` what it exports; the keys are those of ListExports."""
        (exports,) = await self._manager("ListExports", "sa{sv}", uri, {}, reply="aa{sv}")
        return [_plain(export) for export in exports]

    async def version(self) -> str:
        """The version of the running nbdd."""
        (version,) = await self._call(
            ROOT_PATH, PROPERTIES_INTERFACE, "Get", "ss", MANAGER_INTERFACE, "Version", reply="v"
        )
        return str(version.value)

    async def devices(self) -> list[DeviceView]:
        """Every device."""
        (objects,) = await self._call(ROOT_PATH, OBJECT_MANAGER_INTERFACE, "GetManagedObjects", reply="a{oa{sa{sv}}}")
        found = (interfaces[DEVICE_INTERFACE] for interfaces in objects.values() if DEVICE_INTERFACE in interfaces)
        return [DeviceView.of(_plain(properties)) for properties in found]

    async def device(self, name: str) -> DeviceView:
        """The device `name`; raises NoSuchDevice."""
        try:
            return await self.device_at(device_path(name))
        except UnknownObject:
            raise no_device(name) from None

    async def device_at(self, path: str) -> DeviceView:
        """The device at an object path."""
        (properties,) = await self._call(path, PROPERTIES_INTERFACE, "GetAll", "s", DEVICE_INTERFACE, reply="a{sv}")
        return DeviceView.of(_plain(properties))

    async def statistics(self, name: str) -> dict[str, int]:
        """What the kernel counted for the device `name`; the keys are those of GetStatistics."""
        try:
            (counts,) = await self._call(device_path(name), DEVICE_INTERFACE, "GetStatistics", reply="a{st}")
        except UnknownObject:
            raise no_device(name) from None
        return dict(counts)

    async def names(self) -> tuple[set[str], set[str]]:
        """The well-known names that are on the bus, and those that it can start."""
        (there,) = await self._call_bus("ListNames", reply="as")
        (startable,) = await self._call_bus("ListActivatableNames", reply="as")
        return {name for name in there if not name.startswith(":")}, set(startable)

    # Events

    async def subscribe(self) -> bool:
        """Start to collect events; True if nbdd is running. This does not start it."""
        if self._bus is None:
            raise self._lost()
        self._bus.add_message_handler(self._on_message)
        for rule in _RULES:
            await self._call_bus("AddMatch", "s", rule)
        try:
            (owner,) = await self._call_bus("GetNameOwner", "s", BUS_NAME, reply="s")
        except NbddError:
            return self._owner is not None  # it may have come since the question
        self._owner = owner
        return True

    async def event(self) -> ManagerEvent:
        """The next event; needs `subscribe` first. Raises NbddError when the bus is gone."""
        event = await self._events.get()
        if event is None:
            raise self._lost()
        return event

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            for event in self._read(message):
                self._events.put_nowait(event)

    def _read(self, message: Message) -> Iterator[ManagerEvent]:
        """A signal as events. Anybody may send us signals; only the bus's own and nbdd's count."""
        signal = (f"{message.interface}.{message.member}", message.signature)
        if message.sender == DBUS.destination:
            if signal == ("org.freedesktop.DBus.NameOwnerChanged", "sss") and message.body[0] == BUS_NAME:
                self._owner = message.body[2] or None
                log.debug("%s is owned by %s", BUS_NAME, self._owner or "no connection")
                yield ManagerEvent(EventKind.STARTED if self._owner else EventKind.STOPPED)
            return
        if message.sender != self._owner:
            return
        match signal:
            case ("org.freedesktop.DBus.Properties.PropertiesChanged", "sa{sv}as"):
                interface, changed, invalidated = message.body
                name = device_name(message.path)
                if interface == DEVICE_INTERFACE and name is not None:
                    changes = fields(_plain(changed) | dict.fromkeys(invalidated))
                    yield ManagerEvent(EventKind.CHANGED, name, changes)
            case ("org.freedesktop.DBus.ObjectManager.InterfacesAdded", "oa{sa{sv}}"):
                path, interfaces = message.body
                name = device_name(path)
                if DEVICE_INTERFACE in interfaces and name is not None:
                    yield ManagerEvent(EventKind.ADDED, name, fields(_plain(interfaces[DEVICE_INTERFACE])))
            case ("org.freedesktop.DBus.ObjectManager.InterfacesRemoved", "oas"):
                path, removed = message.body
                name = device_name(path)
                if DEVICE_INTERFACE in removed and name is not None:
                    yield ManagerEvent(EventKind.REMOVED, name)

    # The call itself

    def _lost(self) -> NbddError:
        of_host = "" if self._host is None else f" of {self._host}"
        return NbddError(f"The connection to the system bus{of_host} was lost. {SEE_JOURNAL}")

    async def _manager(self, member: str, signature: str = "", *body: Any, reply: str = "") -> list[Any]:
        try:
            return await self._call(ROOT_PATH, MANAGER_INTERFACE, member, signature, *body, reply=reply)
        except UnknownObject as problem:
            raise NbddError(
                f"The running nbdd does not know {member}: it is another version than this nbdctl, or just stopping "
                f"({problem}). Restart it: `systemctl restart nbdd`."
            ) from None

    async def _call_bus(self, member: str, signature: str = "", *body: Any, reply: str = "") -> list[Any]:
        return await self._call_peer(DBUS, member, signature, body, reply)

    async def _call(
        self, path: str, interface: str, member: str, signature: str = "", *body: Any, reply: str = ""
    ) -> list[Any]:
        return await self._call_peer(Peer(BUS_NAME, path, interface), member, signature, body, reply)

    async def _call_peer(self, peer: Peer, member: str, signature: str, body: tuple[Any, ...], reply: str) -> list[Any]:
        if self._bus is None:
            raise self._lost()
        try:
            return await peer.call(self._bus, member, signature, body, returns=reply, flags=self._flags)
        except (EOFError, OSError) as problem:
            raise self._lost() from problem
        except WrongReply as problem:
            raise NbddError(
                f"nbdd answered {member} with {problem.found!r} where {reply!r} was expected: it is another version "
                "than this nbdctl. Restart it: `systemctl restart nbdd`."
            ) from None
        except CallError as problem:
            raise error_of(problem, activated=self._flags is not MessageFlag.NO_AUTOSTART) from None


def _variants(options: Options) -> dict[str, Variant]:
    """Options as a{sv}: a truth is b, a number u, a text s, a mapping a{sv}. No option has another type."""
    return {key: _variant(value) for key, value in options.items()}


def _variant(value: Option) -> Variant:
    if isinstance(value, Mapping):
        return Variant("a{sv}", _variants(value))
    return Variant("b" if isinstance(value, bool) else "u" if isinstance(value, int) else "s", value)


def _plain(properties: Mapping[str, Variant]) -> dict[str, Any]:
    return {key: variant.value for key, variant in properties.items()}
