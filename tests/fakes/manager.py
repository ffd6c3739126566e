# SPDX-License-Identifier: MIT
"""A private message bus, and on it a fake that answers like nbdd, as a test sets it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import xml.etree.ElementTree as ET
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from nbdd.bus.wire.patient_socket import PatientSocket

T = TypeVar("T")

DEADLINE = 20.0
"""Seconds after which a test gives up on something that takes a moment."""

ABSENT: dict[str, Any] = {
    "Name": "", "URI": "nbd://storage.example/backup", "URIs": [], "State": "detached", "Node": "", "Size": 0,
    "BlockSize": 0, "ReadOnly": False, "Timeout": 0, "DeadTimeout": 300, "Connections": 1, "LiveConnections": 0,
    "Encryption": "none", "WorkerPID": 0, "Reconnects": 0, "AttachedSince": 0, "AttachedBy": 0, "FailsAt": 0,
    "Configured": True, "LastError": ["", ""], "Desktop": False, "DisplayName": "", "IconName": "",
}  # fmt: skip

PRESENT = ABSENT | {
    "State": "attached", "Node": "/dev/nbd0", "Size": 10 << 30, "BlockSize": 512, "LiveConnections": 1,
    "WorkerPID": 4711, "AttachedSince": 1_700_000_000_000_000,
}  # fmt: skip
PRESENT_JSON = {
    "name": "backup", "node": "/dev/nbd0", "state": "attached", "size": 10 << 30, "block-size": 512,
    "read-only": False, "uri": "nbd://storage.example/backup", "uris": [],
    "timeout": 0, "dead-timeout": 300, "connections": 1,
    "live-connections": 1, "encryption": "none", "worker-pid": 4711, "reconnects": 0,
    "attached-since": 1_700_000_000_000_000, "attached-by": 0, "fails-at": 0, "configured": True, "last-error": None,
    "desktop": False, "display-name": "backup", "icon-name": "",
}  # fmt: skip
"""The same as nbdctl prints it."""

CONFIG = """<busconfig>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{path}-services</servicedir>
  <policy context="default">
    <allow own="*"/><allow send_destination="*"/><allow receive_type="method_call"/>
    <allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
  </policy>
</busconfig>
"""


INTERFACES = Path(__file__).parents[2] / "dbus"


def signatures(interface: str, direction: str) -> dict[str, str]:
    """Method to signature, as the reference has it."""
    root = ET.parse(INTERFACES / f"{interface}.xml").getroot()
    return {
        method.attrib["name"]: "".join(
            arg.attrib["type"] for arg in method.iter("arg") if arg.attrib["direction"] == direction
        )
        for method in root.iter("method")
    }


def properties(interface: str) -> dict[str, str]:
    """Property to signature, as the reference has it."""
    root = ET.parse(INTERFACES / f"{interface}.xml").getroot()
    return {item.attrib["name"]: item.attrib["type"] for item in root.iter("property")}


TYPES = properties("org.nbdd1.Device")
TAKES = signatures("org.nbdd1.Manager", "in")
RETURNS = signatures("org.nbdd1.Manager", "out")


@contextlib.contextmanager
def private_bus(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A dbus-daemon of our own: its address and its process."""
    config = folder / "bus.conf"
    config.write_text(CONFIG.format(path=folder / "bus"))
    command = ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"]
    log = (folder / "bus.log").open("w")
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline().startswith("unix:"), "no dbus-daemon: apt-get install dbus"
            yield f"unix:path={folder / 'bus'}", daemon
        finally:
            daemon.kill()


def typed(values: dict[str, Any]) -> dict[str, Variant]:
    if "DisplayName" in values:
        values = values | {"DisplayName": values["DisplayName"] or values["Name"]}
    return {key: Variant(TYPES[key], value) for key, value in values.items()}


def label(name: str) -> str:
    """Enough of sd_bus_path_encode(3) for the names of the tests."""
    return "".join(char if char.isalnum() and (index or char.isalpha()) else f"_{ord(char):02x}"
                   for index, char in enumerate(name))  # fmt: skip


async def _end_of(bus: Any) -> None:
    await bus.wait_for_disconnect()


class FakeManager:
    """Answers on org.nbdd1, in a thread of its own, for use in ``with``."""

    NAME = "org.nbdd1"

    def __init__(self, address: str) -> None:
        self.address = address
        self.devices: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, tuple[str, str]] = {}
        self.replies: dict[str, tuple[str, list[Any]]] = {"Get": ("v", [Variant("s", "0.1.0")])}
        self.held: set[str] = set()
        """Members that are not answered, and paths of objects that answer nothing."""
        self.calls: list[Message] = []
        self.called = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self.do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE)

    async def _start(self) -> None:
        self.bus: Any = MessageBus(bus_address=self.address)
        self.bus._writer.sock = PatientSocket(self.bus._sock)
        await self.bus.connect()
        self.end: asyncio.Future[None] = asyncio.ensure_future(_end_of(self.bus))
        self.bus.add_message_handler(self._serve)
        await self.bus.request_name(self.NAME)

    async def _stop(self) -> None:
        if not self.end.done():
            self.bus.disconnect()
        await asyncio.wait({self.end})
        with contextlib.suppress(Exception):
            self.end.result()
        self.bus._stream.close()
        self.bus._sock.close()

    def leave(self) -> None:
        """Be gone from the bus, as if killed."""
        self.do(self._leave())

    async def _leave(self) -> None:
        self.bus.disconnect()
        await asyncio.wait({self.end})

    def wait_for(self, member: str) -> Message:
        """The first call of `member`, when it has come."""
        with self.called:
            assert self.called.wait_for(lambda: any(call.member == member for call in self.calls), DEADLINE), member
            return next(call for call in self.calls if call.member == member)

    def connections(self) -> list[str]:
        """The unique names on the bus; the answer comes after all that was sent before."""
        bus = "org.freedesktop.DBus"
        call = self.bus.call(Message(bus, "/org/freedesktop/DBus", bus, "ListNames"))
        return [name for name in self.do(call).body[0] if name.startswith(":")]

    def owner(self, name: str) -> str:
        """The unique name of the connection that owns a name."""
        bus = "org.freedesktop.DBus"
        message = Message(bus, "/org/freedesktop/DBus", bus, "GetNameOwner", signature="s", body=[name])
        return str(self.do(self.bus.call(message)).body[0])

    def signal(self, path: str, name: str, signature: str, body: list[Any], to: str | None = None) -> None:
        """Send a signal; `name` is its interface, a dot and its member."""
        interface, _, member = name.rpartition(".")
        message = Message(
            destination=cast("str", to), path=path, interface=interface, member=member, signature=signature, body=body,
            message_type=MessageType.SIGNAL,
        )  # fmt: skip
        if threading.get_ident() == self._thread.ident:
            self.bus.send(message)  # At once: before the answer to the call that is being served.
        else:
            self._loop.call_soon_threadsafe(self.bus.send, message)

    def add(self, name: str, values: dict[str, Any]) -> None:
        self.devices[name] = values | {"Name": name}
        interfaces = {"org.nbdd1.Device": typed(self.devices[name])}
        body = [f"/org/nbdd1/device/{label(name)}", interfaces]
        self.signal("/org/nbdd1", "org.freedesktop.DBus.ObjectManager.InterfacesAdded", "oa{sa{sv}}", body)

    def change(self, name: str, to: str | None = None, **changes: Any) -> None:
        self.devices[name] |= changes
        body = ["org.nbdd1.Device", typed(changes), []]
        path = f"/org/nbdd1/device/{label(name)}"
        self.signal(path, "org.freedesktop.DBus.Properties.PropertiesChanged", "sa{sv}as", body, to)

    def remove(self, name: str) -> None:
        del self.devices[name]
        body = [f"/org/nbdd1/device/{label(name)}", ["org.nbdd1.Device"]]
        self.signal("/org/nbdd1", "org.freedesktop.DBus.ObjectManager.InterfacesRemoved", "oas", body)

    def release(self, member: str) -> None:
        """Answer a call that was held."""
        self.held.discard(member)
        call = self.wait_for(member)
        self._loop.call_soon_threadsafe(lambda: self.bus.send(self._answer(call)))

    def _serve(self, call: Message) -> Message | bool:
        if call.message_type is not MessageType.METHOD_CALL:
            return False
        with self.called:
            self.calls.append(call)
            self.called.notify_all()
        takes = TAKES.get(str(call.member), call.signature)
        if call.member in TAKES and (call.path, call.interface) != ("/org/nbdd1", "org.nbdd1.Manager"):
            return Message.new_error(call, "org.freedesktop.DBus.Error.UnknownMethod", f"not at {call.path}")
        if call.signature != takes:
            return Message.new_error(call, "org.freedesktop.DBus.Error.InvalidArgs", f"{call.member} takes {takes}")
        return True if {call.member, call.path} & self.held else self._answer(call)

    def _answer(self, call: Message) -> Message:  # noqa: PLR0911 - a table
        member = str(call.member)
        if member in self.errors:
            return Message.new_error(call, *self.errors[member])
        if member in self.replies:
            return Message.new_method_return(call, *self.replies[member])
        paths = {f"/org/nbdd1/device/{label(name)}": name for name in self.devices}
        match member:
            case "Attach":
                return Message.new_method_return(call, "o", [f"/org/nbdd1/device/{label(call.body[0])}"])
            case "AttachURI":
                name = call.body[1]["name"].value if "name" in call.body[1] else next(iter(self.devices))
                return Message.new_method_return(call, "o", [f"/org/nbdd1/device/{label(name)}"])
            case "GetManagedObjects":
                found = {path: {"org.nbdd1.Device": typed(self.devices[name])} for path, name in paths.items()}
                return Message.new_method_return(call, "a{oa{sa{sv}}}", [{"/org/nbdd1": {}} | found])
            case "GetAll" if call.path in paths:
                return Message.new_method_return(call, "a{sv}", [typed(self.devices[paths[call.path]])])
            case "Reload":
                return Message.new_method_return(call, "asasas", [[], [], []])
            case "ListExports":
                return Message.new_method_return(call, "aa{sv}", [[]])
            case "Resize":
                return Message.new_method_return(call, "t", [2 << 30])
            case "Detach" | "SetTimeout" | "Reconnect":
                return Message.new_method_return(call)
            case _:
                return Message.new_error(call, "org.freedesktop.DBus.Error.UnknownObject", f"no {call.path}")
