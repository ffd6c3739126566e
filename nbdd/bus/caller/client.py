# SPDX-License-Identifier: MIT
"""The caller's side of D-Bus: what nbdctl says to a running nbdd, and hears from it.

Errors that come over the bus become the tree of `nbdd.errors` again. What keeps a call from reaching nbdd at all
is a plain `NbddError` whose sentence says where to look.

dbus-next 0.2.3 needs some care here, marked "dbus-next:" below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from nbdd.bus.caller.connection import CallerBus
from nbdd.bus.caller.ssh import Bridge
from nbdd.errors import AccessDenied, InvalidConfig, NbddError, NoSuchDevice
from nbdd.text import clause

NAME = "org.nbdd1"
PATH = "/org/nbdd1"
MANAGER = "org.nbdd1.Manager"
DEVICE = "org.nbdd1.Device"
DEVICES = PATH + "/device/"

Properties: TypeAlias = dict[str, Any]
"""D-Bus names to plain Python values, variants taken off."""

Option: TypeAlias = "bool | int | str | Mapping[str, bool | int | str]"
Options: TypeAlias = Mapping[str, Option]
"""What a call takes beside its arguments, as plain values."""

_BUS = "org.freedesktop.DBus"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
_ERROR = "org.freedesktop.DBus.Error."

_CONNECT_SECONDS = 25
"""How long the bus may take to let us in; a healthy one needs a millisecond."""

_REMOTE_SECONDS = 90
"""The same over ssh, which may ask a person for a password; sd-bus has the same limit (BUS_AUTH_TIMEOUT)."""

_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_DIGITS = frozenset(b"0123456789")

_LOOK = "See `systemctl status nbdd`."

_GONE = frozenset({_ERROR + "NoReply", _ERROR + "Disconnected"})
_NOT_THERE = frozenset({_ERROR + "ServiceUnknown", _ERROR + "NameHasNoOwner"})
_UNKNOWN_OBJECT = frozenset({_ERROR + "UnknownObject", _ERROR + "UnknownInterface", _ERROR + "UnknownMethod"})
# What the bus, or systemd by way of the bus, says when it could not start nbdd for us.
_NOT_STARTED = (_ERROR + "TimedOut", _ERROR + "Timeout", _ERROR + "Spawn.", "org.freedesktop.systemd1.")


class Kind(StrEnum):
    """What an `Event` is about."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"
    STARTED = "started"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a device or, with `STARTED` and `STOPPED`, to nbdd itself."""

    kind: Kind
    name: str = ""
    """The name of the device; empty where it is about nbdd."""
    properties: Properties = field(default_factory=dict)
    """All properties of an added device, the new values of a changed one; None for a value that was not told."""


class Reloaded(NamedTuple):
    """The names that a reload touched."""

    added: list[str]
    changed: list[str]
    removed: list[str]


class _Unknown(NbddError):
    """There is no such object; the methods below say which device was meant."""


class Client:
    """A connection to nbdd over the system bus, for use in ``async with``.

    No call has a time limit of its own: an attach takes as long as the service lets it. With ``activate=False``
    no call starts a service that is not running, and nobody is asked for a password. With `host`, it is the system
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
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        if self._host is not None:
            self._bridge = await Bridge.open(self._host, ask=self._ask)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS if self._bridge is None else _REMOTE_SECONDS):
                # dbus-next: takes the running loop, so the bus is made here and not in the constructor.
                self._bus = CallerBus(self._bridge or BusType.SYSTEM)
                await self._bus.connect()
        except Exception as problem:  # dbus-next raises whatever it met: OSError, EOFError, its own
            found = await self._unreached(problem)
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

    async def _unreached(self, problem: Exception) -> NbddError:
        """Why there is no way onto the bus, in a sentence."""
        reason = "it does not answer" if isinstance(problem, TimeoutError) else _reason(problem)
        if self._bridge is None:
            return _no_bus(reason)
        if isinstance(problem, EOFError | ConnectionError):
            reason = await self._bridge.reason() or "it hung up"
        return NbddError(f"The system bus of {self._host} can't be reached with ssh: {reason}.")

    def _ended(self, end: asyncio.Task[None]) -> None:
        if not end.cancelled():
            end.exception()  # else asyncio complains that nobody looked
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
        """Exchange the device's links for new ones."""
        await self._manager("Reconnect", "sa{sv}", name, {})

    async def resize(self, name: str) -> int:
        """Take the size that the server says now; returns it, in bytes."""
        (size,) = await self._manager("Resize", "sa{sv}", name, {}, reply="t")
        return int(size)

    async def reload(self) -> Reloaded:
        """Make nbdd read its configuration again."""
        return Reloaded(*await self._manager("Reload", reply="asasas"))

    async def exports(self, uri: str) -> list[Properties]:
        """Ask the server behind `uri` what it exports; the keys are those of ListExports."""
        (exports,) = await self._manager("ListExports", "sa{sv}", uri, {}, reply="aa{sv}")
        return [_plain(export) for export in exports]

    async def version(self) -> str:
        """The version of the running nbdd."""
        (version,) = await self._call(PATH, _PROPERTIES, "Get", "ss", MANAGER, "Version", reply="v")
        return str(version.value)

    async def devices(self) -> list[Properties]:
        """The properties of every device."""
        (objects,) = await self._call(PATH, _OBJECT_MANAGER, "GetManagedObjects", reply="a{oa{sa{sv}}}")
        return [_plain(interfaces[DEVICE]) for interfaces in objects.values() if DEVICE in interfaces]

    async def device(self, name: str) -> Properties:
        """The properties of the device `name`."""
        try:
            return await self.device_at(device_path(name))
        except _Unknown:
            raise _no_device(name) from None

    async def device_at(self, path: str) -> Properties:
        """The properties of the device at an object path."""
        (properties,) = await self._call(path, _PROPERTIES, "GetAll", "s", DEVICE, reply="a{sv}")
        return _plain(properties)

    async def statistics(self, name: str) -> dict[str, int]:
        """What the kernel counted for the device `name`; the keys are those of GetStatistics."""
        try:
            (counts,) = await self._call(device_path(name), DEVICE, "GetStatistics", reply="a{st}")
        except _Unknown:
            raise _no_device(name) from None
        return dict(counts)

    async def names(self) -> tuple[set[str], set[str]]:
        """The well-known names that are on the bus, and those that it can start."""
        (there,) = await self._call("/org/freedesktop/DBus", _BUS, "ListNames", reply="as", to=_BUS)
        (startable,) = await self._call("/org/freedesktop/DBus", _BUS, "ListActivatableNames", reply="as", to=_BUS)
        return {name for name in there if not name.startswith(":")}, set(startable)

    # Events

    async def subscribe(self) -> bool:
        """Start to collect events; True if nbdd is running. This does not start it."""
        if self._bus is None:
            raise self._lost()
        self._bus.add_message_handler(self._on_message)
        rules = (
            f"type='signal',sender='{NAME}',path_namespace='{PATH}'",
            f"type='signal',sender='{_BUS}',interface='{_BUS}',member='NameOwnerChanged',arg0='{NAME}'",
        )
        for rule in rules:
            await self._call("/org/freedesktop/DBus", _BUS, "AddMatch", "s", rule, to=_BUS)
        try:
            (owner,) = await self._call("/org/freedesktop/DBus", _BUS, "GetNameOwner", "s", NAME, reply="s", to=_BUS)
        except NbddError:
            return self._owner is not None  # it may have come since the question
        self._owner = owner
        return True

    async def event(self) -> Event:
        """The next event; needs `subscribe` first. Raises NbddError when the bus is gone."""
        event = await self._events.get()
        if event is None:
            raise self._lost()
        return event

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            for event in self._read(message):
                self._events.put_nowait(event)

    def _read(self, message: Message) -> Iterator[Event]:
        """A signal as events. Anybody may send us signals; only the bus's own and nbdd's count."""
        signal = (f"{message.interface}.{message.member}", message.signature)
        if message.sender == _BUS:
            if signal == (_BUS + ".NameOwnerChanged", "sss") and message.body[0] == NAME:
                self._owner = message.body[2] or None
                yield Event(Kind.STARTED if self._owner else Kind.STOPPED)
            return
        if message.sender != self._owner:
            return
        match signal:
            case ("org.freedesktop.DBus.Properties.PropertiesChanged", "sa{sv}as"):
                interface, changed, invalidated = message.body
                name = device_name(message.path)
                if interface == DEVICE and name is not None:
                    yield Event(Kind.CHANGED, name, _plain(changed) | dict.fromkeys(invalidated))
            case ("org.freedesktop.DBus.ObjectManager.InterfacesAdded", "oa{sa{sv}}"):
                path, interfaces = message.body
                name = device_name(path)
                if DEVICE in interfaces and name is not None:
                    yield Event(Kind.ADDED, name, _plain(interfaces[DEVICE]))
            case ("org.freedesktop.DBus.ObjectManager.InterfacesRemoved", "oas"):
                path, removed = message.body
                name = device_name(path)
                if DEVICE in removed and name is not None:
                    yield Event(Kind.REMOVED, name)

    # The call itself

    def _lost(self) -> NbddError:
        whose = "" if self._host is None else f" of {self._host}"
        return NbddError(f"The connection to the system bus{whose} was lost. {_LOOK}")

    async def _manager(self, member: str, signature: str = "", *body: Any, reply: str = "") -> list[Any]:
        try:
            return await self._call(PATH, MANAGER, member, signature, *body, reply=reply)
        except _Unknown as problem:
            raise NbddError(
                f"The running nbdd does not know {member}: it is another version than this nbdctl, or just stopping "
                f"({problem}). Restart it: `systemctl restart nbdd`."
            ) from None

    async def _call(
        self, path: str, interface: str, member: str, signature: str = "", *body: Any, reply: str = "", to: str = NAME
    ) -> list[Any]:
        # dbus-next: a call on a bus that has ended waits for ever. Only `connected` knows at once.
        if self._bus is None or not self._bus.connected:
            raise self._lost()
        message = Message(to, path, interface, member, flags=self._flags, signature=signature, body=list(body))
        try:
            answer = await self._bus.call(message)
        except (EOFError, OSError) as problem:
            raise self._lost() from problem
        if answer is None:
            raise self._lost()
        if answer.error_name in _NOT_THERE and self._flags is MessageFlag.NO_AUTOSTART:
            raise NbddError(f"nbdd is not running. {_LOOK}")
        if answer.message_type is MessageType.ERROR:
            raise _error(answer)
        if answer.signature != reply:
            raise NbddError(
                f"nbdd answered {member} with {answer.signature!r} where {reply!r} was expected: it is another version "
                "than this nbdctl. Restart it: `systemctl restart nbdd`."
            )
        return list(answer.body)


def device_path(name: str) -> str:
    """The object path of a device; `name` is escaped as sd_bus_path_encode(3) does."""
    label = ""
    for octet in name.encode():
        # A digit may not stand first: systemd keeps labels usable as identifiers.
        plain = octet in _LETTERS or (octet in _DIGITS and label)
        label += chr(octet) if plain else f"_{octet:02x}"
    return DEVICES + (label or "_")


def device_name(path: str) -> str | None:
    """The inverse of `device_path`; None for a path that is no device's."""
    label = path.removeprefix(DEVICES)
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


def _variants(options: Options) -> dict[str, Variant]:
    """Options as a{sv}: a truth is b, a number u, a text s, a mapping a{sv}. No option has another type."""
    return {key: _variant(value) for key, value in options.items()}


def _variant(value: Option) -> Variant:
    if isinstance(value, Mapping):
        return Variant("a{sv}", _variants(value))
    return Variant("b" if isinstance(value, bool) else "u" if isinstance(value, int) else "s", value)


def _plain(properties: Mapping[str, Variant]) -> Properties:
    return {key: variant.value for key, variant in properties.items()}


def _classes(root: type[NbddError]) -> Iterator[type[NbddError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


def _error(answer: Message) -> NbddError:
    """The exception for an error that came over the bus."""
    name = answer.error_name or ""
    text = str(answer.body[0]) if answer.signature.startswith("s") else ""
    if name in _UNKNOWN_OBJECT:
        return _Unknown(text)
    if name in _GONE:
        return NbddError(f"nbdd ended before it answered, so what was asked may or may not be done. {_LOOK}")
    if name in _NOT_THERE:
        return NbddError(f"nbdd is not running and D-Bus does not know how to start it; is it installed? {_LOOK}")
    if name.startswith(_NOT_STARTED):
        return NbddError(f"nbdd is not running and could not be started ({clause(text or name)}). {_LOOK}")
    if name == AccessDenied.dbus_name and answer.sender == _BUS:
        return AccessDenied(f"The system bus does not let this user talk to nbdd ({clause(text)}).")
    found = {kind.dbus_name: kind for kind in _classes(NbddError) if "dbus_name" in vars(kind)}.get(name, NbddError)
    if found is InvalidConfig:
        return InvalidConfig(*text.splitlines())
    return found(text or f"nbdd failed with {name} and gave no reason.")


def _no_bus(reason: str) -> NbddError:
    return NbddError(f"The system bus can't be reached ({reason}), and nbdd is spoken to over it. {_LOOK}")


def _no_device(name: str) -> NoSuchDevice:
    return NoSuchDevice(f"No device is named {name!r}; `nbdctl list` shows those there are.")


def _reason(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    return "it hung up" if isinstance(problem, EOFError) else clause(problem) or type(problem).__name__
