# SPDX-License-Identifier: MIT
"""What stands around nbdd in a session: whoever shows notifications. It does what a test tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dbus_next.message import Message

from tests.unit.fake_manager import DEADLINE, FakeManager

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


class FakeShower(FakeManager):
    """Answers on org.freedesktop.Notifications."""

    NAME = NOTIFICATIONS

    def __init__(self, address: str, *capabilities: str, first: int = 1) -> None:
        super().__init__(address)
        self.history = History()
        self._capabilities = list(capabilities or ("actions", "body", "body-markup", "persistence"))
        self._next = first

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
        """A person presses a button; most showers close the notification then."""
        self._say("ActionInvoked", "us", [number, action])
        if close:
            self.dismiss(number)

    def dismiss(self, number: int) -> None:
        """A person closes it."""
        with self.called:
            self.history.open.pop(number, None)
        self._say("NotificationClosed", "uu", [number, 2])

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
