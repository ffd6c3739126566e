# SPDX-License-Identifier: MIT
"""A message bus of the test's own, and what stands around nbdd on a real system: callers, polkit, systemd's socket."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import nbdd.bus.wire  # noqa: F401 - mends dbus_next for the newest Python

# isort: split
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

DEADLINE = 30.0
"""Seconds after which a test gives up on something that takes a moment."""

NONE = MessageFlag.NONE
INTERACTIVE = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
NO_REPLY = MessageFlag.NO_REPLY_EXPECTED

PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PEER = "org.freedesktop.DBus.Peer"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
ERROR = "org.freedesktop.DBus.Error."

_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>{more}
  </policy>
</busconfig>
"""


class BusDaemon:
    """A dbus-daemon; `address` is for DBUS_SYSTEM_BUS_ADDRESS."""

    def __init__(self, folder: Path, policy: str) -> None:
        path = folder / "bus"
        config = folder / "bus.conf"
        config.write_text(_CONFIG.format(path=path, more=policy))
        self.address = f"unix:path={path}"
        try:
            self._process = subprocess.Popen(
                ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"],
                stdout=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError:
            raise AssertionError("there is no dbus-daemon: apt-get install dbus-daemon") from None
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("unix:"), "dbus-daemon did not start; see its stderr"

    def kill(self) -> None:
        """End it at once and wait until it is gone; may be called again."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def private_bus(policy: str = "") -> Iterator[BusDaemon]:
    """A dbus-daemon that lets everyone do everything but what `policy`, in its own XML, denies."""
    # Not tmp_path: with a long test name the socket's path would be longer than a socket's path may be.
    with tempfile.TemporaryDirectory(prefix="busd-") as folder:
        daemon = BusDaemon(Path(folder), policy)
        try:
            yield daemon
        finally:
            daemon.kill()


class BusError(Exception):
    """An error reply; compares by `name`, ``str()`` is its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Caller:
    """A connection to the bus that calls, listens, and can serve a fake or two."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus: Any = bus
        self.signals: asyncio.Queue[Message] = asyncio.Queue()
        self.replies: list[Message] = []
        """Every reply and error that arrived, asked for or not."""
        bus.add_message_handler(self._received)

    def _received(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.sender != "org.freedesktop.DBus":
            self.signals.put_nowait(message)
        if message.message_type in (MessageType.METHOD_RETURN, MessageType.ERROR):
            self.replies.append(message)
        return False

    @property
    def name(self) -> str:
        """The unique name."""
        return str(self.bus.unique_name)

    async def ask(
        self,
        to: str,
        path: str,
        interface: Any,
        member: str,
        *body: Any,
        types: str = "",
        flags: MessageFlag = NONE,
    ) -> Any:
        """Call a method; returns its one out-argument, a list of several, or None. Raises BusError."""
        message = Message(
            destination=to,
            path=path,
            interface=interface,
            member=member,
            signature=types,
            body=list(body),
            flags=flags,
        )
        reply = await self.bus.call(message)
        if reply is None:
            return None
        if reply.message_type is MessageType.ERROR:
            raise BusError(reply.error_name, reply.body[0] if reply.body else "")
        assert reply.message_type is MessageType.METHOD_RETURN
        return reply.body if len(reply.body) > 1 else next(iter(reply.body), None)

    async def get(self, to: str, path: str, interface: str, name: str) -> Any:
        """The value of a property."""
        return (await self.ask(to, path, PROPERTIES, "Get", interface, name, types="ss")).value

    async def listen(self, to: str) -> None:
        """Put the signals that `to` broadcasts into `signals` from now on."""
        await self._ask_bus("AddMatch", f"type='signal',sender='{to}'", types="s")

    async def own(self, name: str) -> None:
        """Own a well-known name."""
        assert await self._ask_bus("RequestName", name, 4, types="su") == 1

    async def _ask_bus(self, member: str, *body: Any, types: str) -> Any:
        bus = "org.freedesktop.DBus"
        return await self.ask(bus, "/org/freedesktop/DBus", bus, member, *body, types=types)

    def serve(self, answer: Callable[[Message], Message | None]) -> None:
        """Answer the calls that arrive with `answer`; None leaves one unanswered."""

        def handle(message: Message) -> Message | bool:
            return message.message_type is MessageType.METHOD_CALL and (answer(message) or True)

        self.bus.add_message_handler(handle)


@contextlib.asynccontextmanager
async def caller(address: str, *, fds: bool = False) -> AsyncIterator[Caller]:
    """A connection to the bus at `address`; with `fds`, one that can send descriptors."""
    bus = MessageBus(bus_address=address, negotiate_unix_fd=fds)
    await bus.connect()
    try:
        yield Caller(bus)
    finally:
        await close(bus)


async def close(bus: Any) -> None:
    """Leave the bus and close the socket, which dbus-next leaves to chance."""
    if bus.unique_name is not None:
        if not bus._disconnected:
            bus.disconnect()
        with contextlib.suppress(EOFError, OSError):
            await bus.wait_for_disconnect()
    bus._loop.remove_reader(bus._fd)
    bus._stream.close()
    bus._sock.close()


class RawCaller:
    """A connection that says octets, and so what no library lets one say."""

    def __init__(self, address: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE)
        self._sock.connect(address.removeprefix("unix:path="))
        self._sock.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        assert self._sock.recv(1000).startswith(b"OK ")
        bus = "org.freedesktop.DBus"
        hello: Any = Message(destination=bus, path="/org/freedesktop/DBus", interface=bus, member="Hello", serial=1)
        self.say(b"BEGIN\r\n" + hello._marshall())
        assert self._sock.recv(1000)
        ping: Any = Message(destination=bus, path="/org/freedesktop/DBus", interface=PEER, member="Ping", serial=2)
        self._ping = bytes(ping._marshall())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def say(self, octets: bytes) -> None:
        self._sock.sendall(octets)

    def settle(self) -> None:
        """Return when the bus has passed on all that was said."""
        self.say(self._ping)
        # What it sends for a Ping ends with its own name, as the sender.
        while not self._sock.recv(1 << 16).rstrip(b"\0").endswith(b"org.freedesktop.DBus"):
            pass


@dataclass
class FakePolkit:
    """What polkitd would say, and what it was asked: (subject, action, details, flags, cancellation id)."""

    authorized: bool = True
    challenge: bool = False
    dismissed: bool = False
    error: tuple[str, str] | None = None
    asked: list[list[Any]] = field(default_factory=list)

    async def start(self, on: Caller) -> None:
        on.serve(self._answer)
        await on.own("org.freedesktop.PolicyKit1")

    def _answer(self, call: Message) -> Message:
        assert (call.path, call.interface, call.member, call.signature) == (
            "/org/freedesktop/PolicyKit1/Authority",
            "org.freedesktop.PolicyKit1.Authority",
            "CheckAuthorization",
            "(sa{sv})sa{ss}us",
        )
        self.asked.append(call.body)
        if self.error is not None:
            return Message.new_error(call, *self.error)
        details = {"polkit.dismissed": "true"} if self.dismissed else {}
        return Message.new_method_return(call, "(bba{ss})", [[self.authorized, self.challenge, details]])


class NotifySocket:
    """systemd's end of NOTIFY_SOCKET. Use it in ``with``."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="notify-")
        self.path = str(Path(self._folder.name, "notify"))
        self.fds: list[int] = []
        """The descriptors that came with the last datagram; closed at the end."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)
        self._sock.close()
        self._folder.cleanup()

    def receive(self) -> bytes | None:
        """The next datagram, or None where there is none."""
        try:
            data, ancillary, _, _ = self._sock.recvmsg(1 << 16, socket.CMSG_SPACE(64 * 4))
        except BlockingIOError:
            return None
        for level, kind, octets in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            found = array.array("i")
            found.frombytes(octets)
            self.fds += found
        return data

    def wait_for(self, wanted: bytes) -> list[bytes]:
        """Every datagram up to the first that holds the line `wanted`."""
        self._sock.settimeout(DEADLINE)
        try:
            got: list[bytes] = []
            while not got or wanted not in got[-1].split(b"\n"):
                got.append(self.receive() or b"")
            return got
        finally:
            self._sock.setblocking(False)


def variants(options: dict[str, tuple[str, Any]]) -> dict[str, Variant]:
    """a{sv} from {key: (type, value)}."""
    return {key: Variant(kind, value) for key, (kind, value) in options.items()}
