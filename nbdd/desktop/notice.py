# SPDX-License-Identifier: MIT
"""Which notification a device needs, and when: decided from its properties and the clock.

    nothing ── no connection for GRACE s ──> LOST ── WARNING ──> FAILING ── dead timeout ──> FAILED
                                             │                   │                          │
                                             └── a connection ───┴────────> BACK <──────────┘

GONE is a device that the kernel had and has no more, without a detach.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

from nbdd.bus.caller.device import DeviceView
from nbdd.desktop.notifications import Notification, Urgency
from nbdd.errors import InvalidURI
from nbdd.text import one_line
from nbdd.uri import URI

GRACE = 5.0
"""Seconds without any connection before the first notification: a restart of a server takes less."""

WARNING = 60.0
"""Seconds before I/O fails at which the second one is shown; half of the dead timeout if that is less."""

MAX_TEXT = 300
"""Characters of an error that are shown."""

DETACH, DETACH_ANYWAY, ATTACH = "detach", "detach-anyway", "attach"
"""What the user can do about it: keys of actions."""

_LABELS = {DETACH: "Detach", DETACH_ANYWAY: "Detach anyway", ATTACH: "Attach again"}

_WORKS = frozenset({"attached", "degraded"})
_UNDECIDED = frozenset({"connecting", "detaching", "unknown"})


class NoticeKind(StrEnum):
    """What a notification says."""

    LOST = "lost"
    FAILING = "failing"
    FAILED = "failed"
    GONE = "gone"
    BACK = "back"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Notice:
    """A notification about a device."""

    kind: NoticeKind
    notification: Notification


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `judge` found."""

    notice: Notice | None = None
    """The trouble that the device is in."""
    decided: bool = True
    """False while the device changes: the notification before stands."""
    look_at: float | None = None
    """When the clock alone may change it, in seconds since 1970."""


def judge(device: DeviceView, *, now: float, lost_since: float, was_bound: bool) -> Verdict:
    """What is wrong with the device at `now`; times in seconds since 1970.

    `lost_since` is when it was first seen without a connection, for a service that does not report it; `was_bound` is
    whether the kernel had the device before, without a detach since.
    """
    if device.state in _WORKS or device.state == "detached":
        return Verdict()
    fails = device.fails_at / 1e6
    if not device.node and was_bound and device.state in {"failed", "connecting"}:
        return Verdict(_gone(device))
    if device.state in _UNDECIDED:
        return Verdict(decided=False)
    if device.state == "failed":
        if not device.node:
            return Verdict()
        # A server that has other data now is not retried; I/O waits all the same.
        waits = now < fails
        return Verdict(_failed(device, fails if waits else 0), look_at=fails if waits else None)
    # reconnecting
    patience = (fails - device.dead_timeout if fails else lost_since) + GRACE
    if now < patience:
        return Verdict(look_at=patience)
    if not fails:
        return Verdict(_lost(device, fails))
    near = fails - min(WARNING, device.dead_timeout / 2)
    return Verdict(_lost(device, fails), look_at=near) if now < near else Verdict(_failing(device, fails))


def works(device: DeviceView) -> bool:
    """Whether reading and writing works."""
    return device.state in _WORKS


def back(device: DeviceView, before: NoticeKind) -> Notice:
    """The end of the trouble that was shown as `before`."""
    name = title(device)
    if before in {NoticeKind.LOST, NoticeKind.FAILING}:
        body = f"{server(device)} answers again. What waited has gone on, and nothing was lost."
    else:
        body = "Reading and writing works again. What failed meanwhile was not written; look what is missing."
    icon = device.icon_name or "drive-harddisk"
    notification = Notification(f"{name} is back", body, icon, category="network.connected", lasting=False)
    return Notice(NoticeKind.BACK, notification)


def refused(device: DeviceView, action: str, problem: str, *, in_use: bool) -> Notice:
    """An action of the user failed."""
    name = title(device)
    detach = action in {DETACH, DETACH_ANYWAY}
    body = one_line(problem, MAX_TEXT)
    actions = [action]
    if action == DETACH and in_use:
        body += " To detach it anyway loses what was not written yet."
        actions = [DETACH_ANYWAY]
    return Notice(
        NoticeKind.REFUSED,
        Notification(
            f"{name} was not {'detached' if detach else 'attached'}",
            body,
            "dialog-warning",
            category="device.error",
            actions=_actions(actions),
        ),
    )


def detached(device: DeviceView) -> Notification:
    """A disk was detached by its user."""
    icon = device.icon_name or "drive-harddisk"
    return Notification(f"{title(device)} is detached", "All was written.", icon, category="device", lasting=False)


def title(device: DeviceView) -> str:
    """What people call the device."""
    return device.display_name or device.name


def server(device: DeviceView) -> str:
    """The server as a user knows it: a host, or a socket's path."""
    try:
        uri = URI.parse(device.uri)
    except InvalidURI:
        return "The server"
    return uri.host or uri.address


def _lost(device: DeviceView, fails: float) -> Notice:
    until = f", until {clock(fails)} at most" if fails else ""
    return Notice(
        NoticeKind.LOST,
        Notification(
            f"{title(device)} has lost its server",
            f"{server(device)} does not answer. Programs that use the disk wait{until}. Nothing is lost so far.",
            "network-offline",
            category="network.disconnected",
            actions=_actions([DETACH]),
        ),
    )


def _failing(device: DeviceView, fails: float) -> Notice:
    return Notice(
        NoticeKind.FAILING,
        Notification(
            f"{title(device)} is about to fail",
            f"{server(device)} still does not answer. At {clock(fails)} reading and writing begins to fail. "
            "Save elsewhere what is open.",
            "dialog-warning",
            Urgency.CRITICAL,
            "network.error",
            _actions([DETACH]),
        ),
    )


def _why(device: DeviceView) -> str:
    """The device's last error as one more sentence, if it had one."""
    return f" {one_line(device.last_error.message, MAX_TEXT)}" if device.last_error is not None else ""


def _failed(device: DeviceView, waits_until: float) -> Notice:
    state = "Reading and writing fails until the server is back."
    if waits_until:
        state = f"Programs that use the disk wait, until {clock(waits_until)} at most."
    return Notice(
        NoticeKind.FAILED,
        Notification(
            f"{title(device)} has failed",
            f"{state}{_why(device)}",
            "dialog-error",
            Urgency.CRITICAL,
            "device.error",
            _actions([DETACH]),
        ),
    )


def _gone(device: DeviceView) -> Notice:
    return Notice(
        NoticeKind.GONE,
        Notification(
            f"{title(device)} is gone",
            f"The disk is not attached any more, and what was not written is lost.{_why(device)}",
            "dialog-error",
            Urgency.CRITICAL,
            "device.removed",
            _actions([ATTACH] if device.configured and device.state == "failed" else []),
        ),
    )


def clock(when: float) -> str:
    """A time of this day, or a time and its day; `when` in seconds since 1970."""
    there, here = time.localtime(when), time.localtime()
    same_day = there[:3] == here[:3]
    return time.strftime("%H:%M:%S" if same_day else "%H:%M on %-d %B", there)


def _actions(keys: list[str]) -> tuple[tuple[str, str], ...]:
    return tuple((key, _LABELS[key]) for key in keys)
