# SPDX-License-Identifier: MIT
"""Objects on the bus: this answers every method call to nbdd, exactly once, whatever happens.

It replaces the service layer of dbus-next 0.2.3, which gets these points wrong; tests/unit/bus/daemon/test_service.py
holds each: methods see their caller; InterfacesAdded and InterfacesRemoved come from the object manager's path, and
GetManagedObjects answers there alone; children are whole path elements; no traceback reaches a caller; a cancelled
call is answered; no descriptors are taken; introspection is the XML of dbus/, with named arguments and annotations.
Its message layer has faults with which any user of the machine could stop us; wire/message_bus.py mends those.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nbdd.bus.wire.interface import INTROSPECTABLE, OBJECT_MANAGER, PEER, PROPERTIES, Interface
from nbdd.bus.wire.library import BusType, Message, MessageFlag, MessageType, Variant
from nbdd.bus.wire.message_bus import MessageBusFixes
from nbdd.bus.wire.names import DBUS_ERROR
from nbdd.bus.wire.reader import MAX_BODY
from nbdd.errors import InvalidArgs, NbddError

log = logging.getLogger(__name__)

_FLUSH_DEADLINE = 5.0
"""Seconds for the last answers to reach the bus."""


class DispatchError(Exception):
    """A call of an object, interface or member that there is not; `name` is a standard D-Bus error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = DBUS_ERROR + name


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a call: a unique bus name, and whether polkit may ask its user for a password."""

    name: str
    interactive: bool


Handler = Callable[[Caller, list[Any]], Awaitable[list[Any]]]


class ExportedInterface:
    """One interface of one object: handlers for its methods, values for its properties.

    Subclasses fill `methods`, which must be those of the XML (a handler takes the caller and the arguments, and returns
    the out-arguments), and override `values`.
    """

    def __init__(self, interface: Interface, methods: Mapping[str, Handler]) -> None:
        if methods.keys() != interface.methods.keys():
            raise TypeError(f"{interface.name}: the methods differ from the XML")
        self.interface = interface
        self.methods = methods

    def values(self) -> dict[str, Any]:
        """The value of every property, as plain Python."""
        return {}

    def variants(self, names: set[str] | None = None) -> dict[str, Variant]:
        """The properties, or those named, as the bus wants them."""
        return {
            name: Variant(self.interface.properties[name].signature, clean(value))
            for name, value in self.values().items()
            if names is None or name in names
        }


Body: TypeAlias = list[Any] | Callable[[], list[Any]]
"""The values of a reply, or a function that makes them, if that takes long."""


class ServiceBus(MessageBusFixes):
    """A system bus connection that serves objects below one object manager.

    Make it in a running loop, `connect`, export, then `open` and request the name: calls that come early wait.
    """

    def __init__(self, root: str) -> None:
        # negotiate_unix_fd stays off: dbus-next leaks the descriptors of calls that have no handler.
        super().__init__(long_replies=False, bus_type=BusType.SYSTEM, negotiate_unix_fd=False)
        self._root = root
        self._served: dict[str, tuple[ExportedInterface, ...]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        self._end = NbddError("nbdd is stopping; try again when it runs.")
        self._written: asyncio.Future[None] | None = None
        self.add_message_handler(self._received)

    def open(self) -> None:
        """Begin to answer calls."""
        log.debug("answering calls; %d are waiting", len(self._calls))
        self._opened.set()

    def add_object(self, path: str, *interfaces: ExportedInterface) -> None:
        """Put an object on the bus and, below the root, send InterfacesAdded.

        No signal is sent before `open`: no caller has seen anything yet that it could change.
        """
        log.debug("exporting %s", path)
        self._served[path] = interfaces
        if path != self._root:
            added = {exported.interface.name: exported.variants() for exported in interfaces}
            self._signal(OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, added], self._root)

    def remove_object(self, path: str) -> None:
        """Take an object off the bus and send InterfacesRemoved."""
        log.debug("removing %s", path)
        interfaces = self._served.pop(path)
        names = [exported.interface.name for exported in interfaces]
        self._signal(OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, names], self._root)

    def properties_changed(self, path: str, exported: ExportedInterface, names: set[str]) -> None:
        """Send PropertiesChanged with the new values of the named properties."""
        changed = exported.variants(names)
        if changed:
            body = [exported.interface.name, changed, []]
            self._signal(PROPERTIES, "PropertiesChanged", "sa{sv}as", body, path)

    async def finish(self, reason: NbddError | None = None) -> None:
        """Answer the calls that are still running with `reason`, and wait until the bus has the answers."""
        self._end = reason or self._end
        for task in self._calls:
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)
        if self._written is not None and not self._disconnected:
            await asyncio.wait({self._written}, timeout=_FLUSH_DEADLINE)

    # The message layer

    def _put(self, message: Message) -> None:
        """Send; it is marshalled at once, so a value of the wrong type raises here."""
        self._written = self.send(message)
        # A write that fails ends the connection, and `wait_for_disconnect` reports that.
        self._written.add_done_callback(lambda written: written.cancelled() or written.exception())

    # Calls

    def _received(self, message: Message) -> bool:
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        task = asyncio.get_running_loop().create_task(self._serve(message))
        self._calls.add(task)
        task.add_done_callback(lambda task: self._ended(message, task))
        return True

    def _ended(self, message: Message, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if task.cancelled():
            # Answered here: a task that had not begun could not do it.
            self._fail(message, self._end.dbus_name, str(self._end))

    async def _serve(self, message: Message) -> None:
        log.debug("%s calls %s.%s of %s", message.sender, message.interface, message.member, message.path)
        try:
            await self._opened.wait()
            signature, body = await self._dispatch(message)
            if callable(body):
                await self._reply_later(message, signature, body)
            else:
                self._reply(message, Message.new_method_return(message, signature, body))
        except DispatchError as error:
            self._fail(message, error.name, str(error))
        except NbddError as error:
            self._fail(message, error.dbus_name, str(error))
        except Exception:
            if self._disconnected:
                return  # Probably because of that, and no caller waits for an answer.
            log.exception("internal error in %s.%s", message.interface, message.member)
            self._fail(message, DBUS_ERROR + "Failed", "Internal error of nbdd; the journal has its trace.")

    def _fail(self, message: Message, name: str, text: str) -> None:
        log.debug("%s of %s failed with %s: %r", message.member, message.sender, name, text)
        self._reply(message, Message.new_error(message, name, clean(text)))

    def _reply(self, message: Message, reply: Message) -> None:
        if not (message.flags & MessageFlag.NO_REPLY_EXPECTED or self._disconnected):
            self._put(reply)

    async def _dispatch(self, message: Message) -> tuple[str, Body]:
        path, member = message.path, message.member
        candidates: dict[str, tuple[Interface, Mapping[str, Any]]] = {
            INTROSPECTABLE.name: (INTROSPECTABLE, {"Introspect": self._on_introspect}),
            PEER.name: (PEER, {"Ping": self._on_ping, "GetMachineId": self._on_machine_id}),
        }
        if path in self._served:
            candidates |= {e.interface.name: (e.interface, e.methods) for e in self._served[path]}
            candidates[PROPERTIES.name] = (
                PROPERTIES,
                {"Get": self._on_get, "GetAll": self._on_get_all, "Set": self._on_set},
            )
            if path == self._root:
                candidates[OBJECT_MANAGER.name] = (OBJECT_MANAGER, {"GetManagedObjects": self._on_managed_objects})
        elif not self._children(path):
            raise DispatchError("UnknownObject", f"There is no object {path}.")
        if message.signature and not message.body:
            raise DispatchError("LimitsExceeded", f"The arguments are longer than {MAX_BODY} bytes.")
        if message.interface:
            if message.interface not in candidates:
                raise DispatchError("UnknownInterface", f"{path} has no interface {message.interface}.")
            candidates = {message.interface: candidates[message.interface]}
        for interface, handlers in candidates.values():
            method = interface.methods.get(member)
            if method is None:
                continue
            if message.signature != method.in_signature:
                raise InvalidArgs(
                    f"{member} takes arguments of the types {method.in_signature!r}, not {message.signature!r}."
                )
            handler = handlers[member]
            if interface.name in (INTROSPECTABLE.name, PEER.name, PROPERTIES.name, OBJECT_MANAGER.name):
                return method.out_signature, handler(path, message.body)
            interactive = bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
            return method.out_signature, clean(await handler(Caller(message.sender, interactive), message.body))
        where = message.interface or path
        raise DispatchError("UnknownMethod", f"{where} has no method {member}.")

    # The standard interfaces

    def _on_introspect(self, path: str, _body: list[Any]) -> list[Any]:
        interfaces = [PEER, INTROSPECTABLE]
        if path in self._served:
            interfaces.append(PROPERTIES)
            interfaces += [OBJECT_MANAGER] * (path == self._root)
            interfaces += [exported.interface for exported in self._served[path]]
        children = "".join(f'<node name="{child}"/>\n' for child in sorted(self._children(path)))
        return [
            '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
            '"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
            "<node>\n" + "\n".join(interface.xml for interface in interfaces) + "\n" + children + "</node>\n"
        ]

    def _children(self, path: str) -> set[str]:
        prefix = path if path.endswith("/") else path + "/"
        return {known[len(prefix) :].split("/", 1)[0] for known in self._served if known.startswith(prefix)}

    def _on_ping(self, _path: str, _body: list[Any]) -> list[Any]:
        return []

    def _on_machine_id(self, _path: str, _body: list[Any]) -> list[Any]:
        return [Path("/etc/machine-id").read_text(encoding="ascii").strip()]

    def _exported(self, path: str, interface: str) -> ExportedInterface | None:
        found = next((e for e in self._served[path] if e.interface.name == interface), None)
        if found is None and interface not in (PROPERTIES.name, INTROSPECTABLE.name, PEER.name, OBJECT_MANAGER.name):
            raise DispatchError("UnknownInterface", f"{path} has no interface {interface}.")
        return found

    def _on_get(self, path: str, body: list[Any]) -> list[Any]:
        interface, name = body
        # The empty interface name means any, by the D-Bus specification.
        for exported in self._served[path] if not interface else (self._exported(path, interface),):
            if exported is not None and name in exported.interface.properties:
                return [exported.variants({name})[name]]
        raise DispatchError("UnknownProperty", f"{interface or path} has no property {name}.")

    def _on_get_all(self, path: str, body: list[Any]) -> list[Any]:
        interface = body[0]
        merged: dict[str, Variant] = {}
        for exported in self._served[path] if not interface else (self._exported(path, interface),):
            if exported is not None:
                merged |= exported.variants()
        return [merged]

    def _on_set(self, path: str, body: list[Any]) -> list[Any]:
        interface, name, _ = body
        self._on_get(path, [interface, name])
        raise DispatchError("PropertyReadOnly", f"{name} can't be set; methods change what can be changed.")

    def _on_managed_objects(self, _path: str, _body: list[Any]) -> Body:
        # It takes seconds with ten thousand objects.
        served = [(path, interfaces) for path, interfaces in self._served.items() if path != self._root]
        return lambda: [
            {
                path: {exported.interface.name: exported.variants() for exported in interfaces}
                for path, interfaces in served
            }
        ]

    async def _reply_later(self, message: Message, signature: str, make: Callable[[], list[Any]]) -> None:
        """Reply with what `make` returns. A thread makes and marshals it, so that the loop goes on."""
        reply = Message.new_method_return(message, signature)
        reply.serial = self.next_serial()

        def marshal() -> bytes:
            reply.body = make()
            return bytes(reply._marshall(negotiate_unix_fd=False))  # noqa: SLF001 - as dbus-next itself sends

        octets = await asyncio.to_thread(marshal)
        if not message.flags & MessageFlag.NO_REPLY_EXPECTED and not self._disconnected:
            self._written = asyncio.get_running_loop().create_future()
            self._written.add_done_callback(lambda written: written.cancelled() or written.exception())
            self._writer.messages.put_nowait((octets, [], self._written))
            self._writer.schedule_write()

    def _signal(self, interface: Interface, member: str, signature: str, body: list[Any], path: str) -> None:
        if self.connected and self._opened.is_set():
            self._put(Message.new_signal(path, interface.name, member, signature, body))


def clean(value: Any) -> Any:
    """Make every string in `value` valid for D-Bus: no NUL, no lone surrogates, which servers may send."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
        case list() | tuple():
            return [clean(item) for item in value]
        case dict():
            return {clean(key): clean(item) for key, item in value.items()}
        case Variant():
            return Variant(value.signature, clean(value.value))
        case _:
            return value
