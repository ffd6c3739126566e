# SPDX-License-Identifier: MIT
"""Events as lines for a person: what happened to which device, what nbdd does about it, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nbdd.bus.caller.device import DeviceView, Failure
from nbdd.text import duration, plural, printable, size

if TYPE_CHECKING:
    from nbdd.bus.caller.client import ManagerEvent

_LOST = {"reconnecting", "degraded"}
_WORKS = {"attached", "degraded"}


class EventFormatter:
    """Makes a line of each event. It keeps the devices, since most of an event's meaning is in the state before it."""

    def __init__(self, devices: Iterable[DeviceView] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._devices = {device.name: device for device in devices}
        self._clock = clock
        self._begun: dict[str, float] = {}
        """When the device began to connect, or lost its first connection; in seconds of the clock."""

    def format(self, event: ManagerEvent) -> str:
        """The event as one line with the device's name before it; "" if there is nothing to say."""
        match str(event.kind):
            case "started":
                return "nbdd started"
            case "stopped":
                return "nbdd stopped; attached devices stay attached, but lost connections are not replaced now"
            case "removed":
                old = self._devices.pop(event.name, DeviceView())
                self._begun.pop(event.name, None)
                text = "no configuration defines it any more" if old.configured else "gone, as it has no definition"
            case _ if event.kind == "added" and event.name not in self._devices:
                new = self._devices[event.name] = DeviceView(**event.changes)
                text = self._added(new)
            case _:
                text = self._change(event.name, event.changes)
        return printable(f"{event.name}: {text}") if text else ""

    def state(self, name: str) -> str:
        """The state of a device after the last event; "" for an unknown one."""
        return self._devices[name].state if name in self._devices else ""

    def _added(self, new: DeviceView) -> str:
        if new.state == "connecting":
            self._begun[new.name] = self._clock()
        what = "new in the configuration" if new.configured else "new, without a definition"
        where = f"{new.state} as {new.node}" if new.node else new.state
        return f"{what}: {new.uri}, {where}"

    def _change(self, name: str, changes: Mapping[str, Any]) -> str:
        old = self._devices.get(name) or DeviceView(name=name)
        new = self._devices[name] = old.updated(changes)
        return self._new_state(old, new) if new.state != old.state else self._same_state(old, new)

    def _new_state(self, old: DeviceView, new: DeviceView) -> str:
        """What a change of the state means."""
        if new.state == "connecting" or (new.state in _LOST and old.state == "attached"):
            self._begun[new.name] = self._clock()
        match new.state:
            case "connecting":
                text = f"adopting {new.node}, left by the previous instance" if new.node else f"connecting to {new.uri}"
            case "attached":
                text = self._attached(old, new)
            case "degraded" if old.state in {"attached", "unknown"}:
                text = f"{_because(new) or 'a connection is lost; '}{_connections(new)} left; mending"
            case "degraded":
                text = f"{self._back(old)} on {_connections(new)}{self._took(new)}"
            case "reconnecting":
                exchanged = "replacing all connections; " if old.state in _WORKS else ""
                text = f"{_because(new) or exchanged}reconnecting{_deadline(new)}"
            case "failed":
                text = f"{_because(new)}{_failed(new)}"
            case "detached" if old.state == "connecting":
                text = "the attach was cancelled"
            case _:
                text = new.state
        return text

    def _attached(self, old: DeviceView, new: DeviceView) -> str:
        if old.state == "detaching":
            return f"not detached; it stays attached as {new.node}"
        if old.state == "connecting" and not old.node:
            return f"attached as {new.node}, {size(new.size)}{self._took(new).replace(' ', ', ', 1)}"
        if old.state == "connecting":
            return f"adopted as {new.node}"
        if old.state == "degraded":
            return f"all {new.connections} connections are back{self._took(new)}"
        return f"{self._back(old)}{self._took(new)}"

    @staticmethod
    def _back(old: DeviceView) -> str:
        return "attached again" if old.node else "attached"

    def _took(self, new: DeviceView) -> str:
        begun = self._begun.get(new.name) if new.state != "attached" else self._begun.pop(new.name, None)
        return "" if begun is None else f" after {_seconds(self._clock() - begun)}"

    def _same_state(self, old: DeviceView, new: DeviceView) -> str:
        """What the other properties mean if the state is the same; the most important one first."""
        parts = []
        if new.last_error is not None and new.last_error != old.last_error:
            again = "; trying again" if new.state in {"connecting", "reconnecting", "degraded"} else ""
            parts.append(_clause(new.last_error) + again)
        if new.live_connections != old.live_connections and new.node and old.node:
            parts.append(f"{_connections(new)} now")
        elif new.reconnects > old.reconnects:
            parts.append("a lost connection was replaced")
        if new.uri != old.uri and new.uri:
            parts.append(f"the server is {new.uri} now")
        if new.size != old.size and new.node and old.node:
            parts.append(f"the size is {size(new.size)} now")
        if new.read_only != old.read_only:
            parts.append("read-only now" if new.read_only else "writable now")
        if new.timeout != old.timeout:
            parts.append(
                f"a request may take {new.timeout} s now" if new.timeout else "no limit for a request any more"
            )
        if new.dead_timeout != old.dead_timeout:
            parts.append(f"without a connection I/O waits {new.dead_timeout} s now")
        if new.fails_at and not old.fails_at:
            parts.append(f"I/O waits until {_clock_time(new.fails_at)}")
        if new.connections != old.connections:
            parts.append(
                f"{plural(new.connections, 'connection')} {'is' if new.connections == 1 else 'are'} wanted now"
            )
        if new.configured != old.configured:
            parts.append("defined now" if new.configured else "no configuration defines it any more")
        if new.worker_pid and old.worker_pid and new.worker_pid != old.worker_pid:
            parts.append(f"a new worker runs, PID {new.worker_pid}")
        return "; ".join(parts)


def _clause(failure: Failure) -> str:
    """The sentences of an error as a part of one of ours."""
    text = failure.message.rstrip(". ").replace(". ", "; ") or failure.name
    # "Can't" and "A connection" begin small in the middle of a sentence; "NBD" does not.
    return text[0].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text


def _because(new: DeviceView) -> str:
    return f"{_clause(new.last_error)}; " if new.last_error is not None else ""


def _connections(device: DeviceView) -> str:
    return f"{device.live_connections} of {device.connections} connections"


def _failed(device: DeviceView) -> str:
    """What the state "failed" means for I/O."""
    if not device.node:
        return "not attached, given up"
    if device.fails_at > time.time_ns() // 1000:
        return f"I/O waits until {_clock_time(device.fails_at)}"
    return "I/O fails until its server is back; reconnecting"


def _deadline(device: DeviceView) -> str:
    return f", and I/O waits until {_clock_time(device.fails_at)}" if device.fails_at else ""


def _clock_time(microseconds: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(microseconds / 1e6))


def _seconds(span: float) -> str:
    return f"{span:.1f} s" if span < 120 else duration(int(span))
