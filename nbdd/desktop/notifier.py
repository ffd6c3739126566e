# SPDX-License-Identifier: MIT
"""nbdd-notify: notifies the user when a network disk is in trouble, and when that is over.

`DesktopNotifier.run` is one loop over the events of both buses and the clock. An action of the user runs in a task of
its own, since polkit may ask for a password first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from nbdd import __version__
from nbdd.bus.caller.client import EventKind, ManagerEvent, ManagerProxy
from nbdd.bus.caller.connection import session_bus, system_bus
from nbdd.bus.caller.device import DeviceView
from nbdd.bus.wire.calls import CallError
from nbdd.desktop import notice
from nbdd.desktop.notice import Notice
from nbdd.desktop.notifications import Closed, Invoked, NotificationEvent, Notifications, NotShown, ServerChanged
from nbdd.desktop.udisks import UDisks
from nbdd.desktop.unmounted import Unmounted
from nbdd.errors import Busy, NbddError

log = logging.getLogger(__name__)

NAME = "org.nbdd1.Notify"
"""Owned on the session bus, so that one notifier runs, in whatever ways a desktop starts it."""

_LONGEST_SLEEP = 60.0
"""Seconds; the clock may be set while we wait for a time of day."""


@dataclass(frozen=True, slots=True)
class ActionFailed:
    """An action of the user failed."""

    name: str
    action: str
    problem: NbddError


@dataclass(frozen=True, slots=True)
class MountsChanged:
    """Something was mounted or unmounted."""


Input: TypeAlias = ManagerEvent | NotificationEvent | ActionFailed | MountsChanged | NbddError | None
"""What `DesktopNotifier.run` handles; an error is the end of the system bus, None ends `run`."""


@dataclass
class Watched:
    """One device, and its notification."""

    device: DeviceView = field(default_factory=DeviceView)
    """As nbdd describes it."""
    lost_since: float = 0.0
    """When it was first seen without a connection, in seconds since 1970; 0 while it has one."""
    was_bound: bool = False
    trouble: notice.NoticeKind | None = None
    """The trouble that was shown last and is not over, whether the notification is still open or not."""
    open: Notice | None = None
    """What is on the screen now."""
    number: int = 0
    """Number of the notification about this device; 0 if there is none to replace."""
    server: str = ""
    """Unique bus name of the notification server that gave the number."""
    shown: int = 0
    """`Notifications.shown` when it replaced one with the same number; else 0."""
    look_at: float | None = None


class DesktopNotifier:
    """Watches nbdd's devices on the system bus and shows notifications on the session bus."""

    def __init__(self, client: ManagerProxy, udisks: UDisks, notifications: Notifications, *, everything: bool) -> None:
        self._client = client
        self._udisks = udisks
        self._unmounted = Unmounted(client, udisks)
        self._notifications = notifications
        self._everything = everything
        self._watched: dict[str, Watched] = {}
        self._running = False
        self._inputs: asyncio.Queue[Input] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Let `run` return, but not while it shows a notification, whose number would be lost."""
        self._inputs.put_nowait(None)

    async def run(self) -> None:
        """Watch until `stop`, then close all notifications, since they would not be updated.

        Raises NbddError when the system bus ends.
        """
        await self._notifications.subscribe()
        await self._udisks.watch_mounts()
        if await self._client.subscribe():
            await self._started()
        self._start(self._collect(self._client.event))
        self._start(self._collect(self._notifications.event))
        self._start(self._collect(self._mounts_changed))
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        item = await self._inputs.get()
                    if item is None:
                        break
                    await self._handle(item)
                await self._look()
        finally:
            for task in self._tasks:
                task.cancel()
            for watched in self._watched.values():
                await self._close(watched)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _mounts_changed(self) -> MountsChanged:
        await self._udisks.mounts_change()
        return MountsChanged()

    async def _collect(
        self, source: Callable[[], Coroutine[Any, Any, ManagerEvent | NotificationEvent | MountsChanged]]
    ) -> None:
        try:
            while True:
                self._inputs.put_nowait(await source())
        except NbddError as problem:
            self._inputs.put_nowait(problem)

    async def _handle(self, item: ManagerEvent | NotificationEvent | ActionFailed | MountsChanged | NbddError) -> None:
        match item:
            case ManagerEvent():
                await self._device_event(item)
            case ActionFailed(name=name, action=action, problem=problem) if name in self._watched:
                watched = self._watched[name]
                in_use = isinstance(problem, Busy)
                await self._show(watched, notice.refused(watched.device, action, str(problem), in_use=in_use))
            case MountsChanged():
                await self._look_at_mounts()
            case ServerChanged():
                await self._server_changed(item.server)
            case Closed() | Invoked():
                self._notification_event(item)
            case NbddError():
                raise item

    def _pause(self) -> float | None:
        times = [one.look_at for one in self._watched.values() if one.look_at is not None]
        return min(max(min(times) - time.time(), 0), _LONGEST_SLEEP) if times and self._running else None

    # nbdd

    async def _device_event(self, event: ManagerEvent) -> None:
        match event.kind:
            case EventKind.STARTED:
                await self._started()
            case EventKind.STOPPED:
                # Probably a restart: keep what is shown, and update it when nbdd is back.
                self._running = False
            case EventKind.REMOVED:
                if event.name in self._watched:
                    await self._close(self._watched.pop(event.name))
            case EventKind.ADDED | EventKind.CHANGED:
                await self._changed(event.name, event.changes)

    async def _started(self) -> None:
        """Nbdd runs, for the first time or again: read all devices."""
        try:
            found = {device.name: device for device in await self._client.devices()}
        except NbddError as problem:
            log.warning("%s", problem)  # It has just stopped; STARTED follows when it is back.
            return
        self._running = True
        for name in self._watched.keys() - found.keys():
            await self._close(self._watched.pop(name))
        for name, device in found.items():
            watched = self._watched.setdefault(name, Watched())
            watched.device = device
            await self._device_changed(watched)
        await self._look_at_mounts()

    async def _changed(self, name: str, changes: Mapping[str, Any]) -> None:
        watched = self._watched.setdefault(name, Watched())
        watched.device = watched.device.updated(changes)
        await self._device_changed(watched)

    async def _device_changed(self, watched: Watched) -> None:
        device = watched.device
        if device.node:
            watched.was_bound = True
        elif device.state == "detached":
            watched.was_bound = False
        watched.lost_since = (watched.lost_since or time.time()) if device.state == "reconnecting" else 0.0
        await self._update(watched)

    # Unmounts in the file manager

    async def _look_at_mounts(self) -> None:
        try:
            left = await self._unmounted.look([watched.device for watched in self._watched.values()])
        except NbddError as problem:
            log.warning("%s", problem)
            return
        for device in left:
            self._start(self._detach(device))

    async def _detach(self, device: DeviceView) -> None:
        try:
            if await self._unmounted.detach(device):
                log.info("%s was unmounted, and is detached", device.name)
                await self._notifications.show(notice.detached(device), 0)
        except NotShown as problem:
            log.warning("not shown: %s", problem)
        except NbddError as problem:
            log.warning("%s was unmounted, and stays attached: %s", device.name, problem)

    # Notifications

    async def _look(self) -> None:
        """Update the devices whose time has come."""
        now = time.time()
        for watched in list(self._watched.values()):
            if self._running and watched.look_at is not None and watched.look_at <= now:
                await self._update(watched)

    async def _update(self, watched: Watched) -> None:
        device = watched.device
        watched.look_at = None
        if not device.desktop and not self._everything:
            await self._over(watched, device)
            return
        verdict = notice.judge(device, now=time.time(), lost_since=watched.lost_since, was_bound=watched.was_bound)
        watched.look_at = verdict.look_at
        if not verdict.decided:
            return
        if verdict.notice is None:
            # Without a connection again, but not for long: the notification before stands.
            if watched.look_at is None or watched.trouble is None:
                await self._over(watched, device)
        elif verdict.notice.kind != watched.trouble:
            log.debug("%s: %s, shown before: %s", device.name, verdict.notice.kind, watched.trouble)
            watched.trouble = verdict.notice.kind
            await self._show(watched, verdict.notice)

    async def _over(self, watched: Watched, device: DeviceView) -> None:
        before, watched.trouble = watched.trouble, None
        if before is not None:
            log.debug("%s: %s is over, the device is %s", device.name, before, device.state)
        if before is not None and notice.works(device):
            await self._show(watched, notice.back(device, before))
        elif before is not None or (watched.open is not None and watched.open.kind is notice.NoticeKind.REFUSED):
            await self._close(watched)

    async def _show(self, watched: Watched, what: Notice) -> None:
        before = watched.number
        try:
            watched.number = await self._notifications.show(what.notification, watched.number)
        except NotShown as problem:
            # There is no notification server now. The next one gets what is true then.
            log.warning("not shown: %s (%s)", what.notification.summary, problem)
            watched.number = 0
        watched.server = self._notifications.server
        watched.shown = self._notifications.shown if watched.number == before else 0
        watched.open = what

    async def _close(self, watched: Watched) -> None:
        if watched.open is not None and watched.number:
            await self._notifications.close(watched.number)
        watched.open, watched.number = None, 0

    async def _server_changed(self, server: str) -> None:
        """Another notification server is there."""
        for watched in self._watched.values():
            if watched.number and watched.server == server:
                continue  # The bus started it for this notification.
            watched.number = 0
            if watched.open is not None and watched.open.kind is not notice.NoticeKind.BACK:
                await self._show(watched, watched.open)

    # Actions of the user

    def _notification_event(self, answer: Closed | Invoked) -> None:
        found = next((item for item in self._watched.items() if item[1].number == answer.number), None)
        if found is None:
            return
        name, watched = found
        if isinstance(answer, Closed):
            if answer.shown >= watched.shown:  # Else the one that it replaced was closed.
                watched.open, watched.number = None, 0
        elif watched.open is not None and answer.action in dict(watched.open.notification.actions):
            log.debug("%s: action %s", name, answer.action)
            self._start(self._act(name, answer.action))

    async def _act(self, name: str, action: str) -> None:
        """Do what an action says; it may take long, since polkit may ask for a password."""
        try:
            async with ManagerProxy() as client:
                if action == notice.ATTACH:
                    await client.attach(name, {})
                else:
                    await client.detach(name, {"force": True} if action == notice.DETACH_ANYWAY else {})
        except NbddError as problem:
            log.warning("%s: %s: %s", name, action, problem)
            self._inputs.put_nowait(ActionFailed(name, action, problem))


async def watch(*, everything: bool) -> int:
    """Run until SIGTERM or SIGINT, and return 0. Raises NbddError if a bus can't be reached, or ends."""
    async with session_bus() as session:
        if not await session.own(NAME):
            log.info("another instance runs in this session already")
            return 0
        # Don't start nbdd: while it does not run, there is nothing to show.
        async with ManagerProxy(activate=False) as client, system_bus() as bus:
            notifier = DesktopNotifier(client, UDisks(bus), Notifications(session), everything=everything)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, notifier.stop)
            work = asyncio.ensure_future(notifier.run())
            lost = asyncio.ensure_future(session.ended())
            await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                work.cancel()
                raise NbddError("The session bus has ended.")
            lost.cancel()
            work.result()
            return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run nbdd-notify; 0 done, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="nbdd-notify", description="Show a notification when a network block device is in trouble."
    )
    parser.add_argument("--version", action="version", version=f"nbdd-notify {__version__}")
    parser.add_argument("--all", action="store_true", help="watch every device, not only those with the key 'desktop'")
    everything: bool = parser.parse_args(arguments).all
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    try:
        return asyncio.run(watch(everything=everything))
    except NbddError as problem:
        log.error("nbdd-notify: %s", problem)
    except (CallError, EOFError, OSError) as problem:
        # It ended, or refused the connection, at once.
        log.error("nbdd-notify: The session bus can't be used (%s).", str(problem).rstrip(".") or "it hung up")
    return 1
