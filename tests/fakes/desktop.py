# SPDX-License-Identifier: MIT
"""The services of a desktop around nbdd: a notification server, UDisks and a file manager, as tests set them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbus_next.message import Message
from dbus_next.signature import Variant

from tests.fakes.manager import DEADLINE, FakeManager

NOTIFICATIONS = "org.freedesktop.Notifications"


@dataclass
class Shown:
    """One notification, as it was asked for."""

    number: int
    replaced: bool
    icon: str
    summary: str
    body: str
    actions: list[str]
    hints: dict[str, Any]
    timeout: int


@dataclass
class History:
    """All that was shown, and what can be seen now."""

    all: list[Shown] = field(default_factory=list)
    open: dict[int, Shown] = field(default_factory=dict)

    @property
    def summaries(self) -> list[str]:
        return [shown.summary for shown in self.all]

    @property
    def visible(self) -> list[str]:
        return [shown.summary for shown in self.open.values()]


class FakeNotificationServer(FakeManager):
    """Answers on org.freedesktop.Notifications."""

    NAME = NOTIFICATIONS

    def __init__(self, address: str, *capabilities: str, first: int = 1) -> None:
        super().__init__(address)
        self.history = History()
        self._capabilities = list(capabilities or ("actions", "body", "body-markup", "persistence"))
        self._next = first
        self.dismisses_what_is_replaced = False
        """A person is that quick: closes it while its replacement is on its way."""

    def wait_until(self, true: Callable[[History], object]) -> History:
        """Return when it holds."""
        with self.called:
            assert self.called.wait_for(lambda: true(self.history), DEADLINE), self.history
            return self.history

    def wait_for_summary(self, part: str) -> Shown:
        """The newest notification whose summary has this in it, when it can be seen."""
        history = self.wait_until(lambda history: any(part in summary for summary in history.visible))
        return [shown for shown in history.open.values() if part in shown.summary][-1]

    def invoke(self, number: int, action: str, *, close: bool = True) -> None:
        """A person presses a button; most servers close the notification then."""
        if close:
            self._forget(number)
        self._say("ActionInvoked", "us", [number, action])
        if close:
            self._say("NotificationClosed", "uu", [number, 2])

    def dismiss(self, number: int) -> None:
        """A person closes it."""
        self._forget(number)
        self._say("NotificationClosed", "uu", [number, 2])

    def _forget(self, number: int) -> None:
        with self.called:
            self.history.open.pop(number, None)

    def _say(self, member: str, signature: str, body: list[Any]) -> None:
        self.signal("/org/freedesktop/Notifications", f"{NOTIFICATIONS}.{member}", signature, body)

    def _answer(self, call: Message) -> Message:
        assert (call.path, call.interface) == ("/org/freedesktop/Notifications", NOTIFICATIONS)
        if call.member in self.errors:
            return Message.new_error(call, *self.errors[str(call.member)])
        match (call.member, call.signature):
            case ("GetCapabilities", ""):
                return Message.new_method_return(call, "as", [self._capabilities])
            case ("Notify", "susssasa{sv}i"):
                if self.dismisses_what_is_replaced and call.body[1]:
                    self.dismiss(call.body[1])
                return Message.new_method_return(call, "u", [self._notify(*call.body)])
            case ("CloseNotification", "u"):
                with self.called:
                    known = self.history.open.pop(call.body[0], None)
                    self.called.notify_all()
                if known is None:
                    return Message.new_error(call, "org.freedesktop.DBus.Error.Failed", "there is none")
                self._say("NotificationClosed", "uu", [call.body[0], 3])
                return Message.new_method_return(call)
            case _:
                return Message.new_error(call, "org.freedesktop.DBus.Error.UnknownMethod", str(call.member))

    def _notify(self, *arguments: Any) -> int:
        app, replaces, icon, summary, body, actions, hints, timeout = arguments
        assert app == "Network disks"
        with self.called:
            number = replaces or self._next
            self._next += not replaces
            plain = {key: variant.value for key, variant in hints.items()}
            shown = Shown(number, number in self.history.open, icon, summary, body, actions, plain, timeout)
            self.history.all.append(shown)
            self.history.open[number] = shown
            self.called.notify_all()
        return number


def activatable(address: str, log: Path) -> None:
    """From now on the bus starts a server when it is called; that writes every summary into `log`."""
    services = Path(address.removeprefix("unix:path=") + "-services")
    services.mkdir(exist_ok=True)
    command = f"{sys.executable} -m tests.fakes.desktop {log}"
    script = services / "start"
    script.write_text(f"#!/bin/sh\ncd {Path(__file__).parents[2]} && exec {command}\n")
    script.chmod(0o755)
    (services / "server.service").write_text(f"[D-BUS Service]\nName={NOTIFICATIONS}\nExec={script}\n")


def main() -> None:
    """What the bus starts: it ends with the bus."""
    with FakeNotificationServer(os.environ["DBUS_STARTER_ADDRESS"]) as server:
        seen = 0
        while not server.end.done():
            with server.called:
                if len(server.history.all) == seen:
                    server.called.wait(0.1)
                new, seen = server.history.summaries[seen:], len(server.history.all)
            with Path(sys.argv[1]).open("a") as log:
                log.writelines(f"{summary}\n" for summary in new)


UDISKS = "org.freedesktop.UDisks2"


@dataclass
class FakeBlock:
    """A disk or a partition as udev knows it."""

    node: str
    size: int = 10 << 30
    usage: str = "filesystem"
    table: str = ""
    """The node of the disk that it is a partition of."""
    ignored: bool = False
    mount_points: list[str] = field(default_factory=list)
    uuid: str = ""

    @property
    def path(self) -> str:
        return f"/org/freedesktop/UDisks2/block_devices/{self.node.rpartition('/')[2]}"


class FakeUDisks(FakeManager):
    """Answers on org.freedesktop.UDisks2; a device is added by `know`, at once or later."""

    NAME = UDISKS

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.blocks: list[FakeBlock] = []
        self.refuses: dict[str, tuple[str, str]] = {}
        """Node to the error that mounting or unmounting it meets."""

    def know(self, *blocks: FakeBlock) -> None:
        """Add disks, with a signal for each."""
        with self.called:
            self.blocks += blocks
        for block in blocks:
            body = [block.path, {f"{UDISKS}.Block": {}}]
            signal = "org.freedesktop.DBus.ObjectManager.InterfacesAdded"
            self.signal("/org/freedesktop/UDisks2", signal, "oa{sa{sv}}", body)

    def _answer(self, call: Message) -> Message:
        if call.member == "GetManagedObjects":
            return Message.new_method_return(call, "a{oa{sa{sv}}}", [self._objects()])
        block = next((block for block in self.blocks if block.path == call.path), None)
        assert block is not None
        assert (call.interface, call.signature) == (f"{UDISKS}.Filesystem", "a{sv}")
        if block.node in self.refuses:
            return Message.new_error(call, *self.refuses[block.node])
        if call.member == "Mount":
            if block.mount_points:
                return Message.new_error(call, f"{UDISKS}.Error.AlreadyMounted", "Device is already mounted")
            block.mount_points.append(f"/media/eve/{block.node.rpartition('/')[2]}")
            self.tell_mounts(block)
            return Message.new_method_return(call, "s", [block.mount_points[0]])
        assert call.member == "Unmount"
        self.unmount(block)
        return Message.new_method_return(call)

    def unmount(self, block: FakeBlock) -> None:
        """Somebody unmounts it, from one of its places."""
        block.mount_points.pop()
        self.tell_mounts(block)

    def tell_mounts(self, block: FakeBlock) -> None:
        """UDisks has looked where it is mounted."""
        changed = {"MountPoints": _places(block)}
        signal = "org.freedesktop.DBus.Properties.PropertiesChanged"
        self.signal(block.path, signal, "sa{sv}as", [f"{UDISKS}.Filesystem", changed, []])

    def _objects(self) -> dict[str, Any]:
        found: dict[str, Any] = {"/org/freedesktop/UDisks2/Manager": {f"{UDISKS}.Manager": {}}}
        for block in self.blocks:
            about: dict[str, Any] = {
                f"{UDISKS}.Block": {
                    "Device": Variant("ay", block.node.encode() + b"\0"),
                    "Size": Variant("t", block.size),
                    "IdUsage": Variant("s", block.usage),
                    "IdUUID": Variant("s", block.uuid),
                    "HintIgnore": Variant("b", block.ignored),
                }
            }
            if block.usage == "filesystem":
                about[f"{UDISKS}.Filesystem"] = {"MountPoints": _places(block)}
            if block.table:
                about[f"{UDISKS}.Partition"] = {"Table": Variant("o", FakeBlock(block.table).path)}
            found[block.path] = about
        return found


def _places(block: FakeBlock) -> Variant:
    return Variant("aay", [place.encode() + b"\0" for place in block.mount_points])


class FakeFileManager(FakeManager):
    """Answers on org.freedesktop.FileManager1."""

    NAME = "org.freedesktop.FileManager1"

    def _answer(self, call: Message) -> Message:
        assert (call.member, call.signature) == ("ShowFolders", "ass")
        return Message.new_method_return(call)


if __name__ == "__main__":
    main()
