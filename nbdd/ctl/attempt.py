# SPDX-License-Identifier: MIT
"""One attach, with its progress on the terminal: it may take long."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import IO, Any

from nbdd.bus.caller.client import EventKind, ManagerEvent, ManagerProxy
from nbdd.bus.caller.device import DeviceView
from nbdd.ctl.find import is_uri
from nbdd.ctl.show import Look, fit
from nbdd.errors import AlreadyAttached, NbddError, NoSuchDevice, ServerError
from nbdd.text import printable
from nbdd.uri import same_export

_FIELDS_OF_OPTIONS = {
    "device": "node",
    "read-only": "read_only",
    "connections": "connections",
    "timeout": "timeout",
    "dead-timeout": "dead_timeout",
    "block-size": "block_size",
}

PATIENCE = 0.7
"""Seconds before the first line of progress."""

RETRY = 1.0
"""Seconds between two tries of an attach that may wait for its server."""


class Attempt:
    """Attaches `target`, a name or a URI, and shows the progress on `terminal`.

    If the server can't be reached, it tries again for `wait` seconds. With `quiet` it prints nothing before the service
    has begun: polkit may ask for a password on the same terminal.
    """

    def __init__(
        self,
        target: str,
        options: Mapping[str, bool | int | str],
        terminal: IO[str] | None,
        *,
        wait: float = 0,
        quiet: bool = False,
    ) -> None:
        self._target = target
        self._wait = wait
        self._waited = False
        self._options = dict(options)
        self._uri = is_uri(target)
        self._terminal = terminal
        self._look = Look.of(terminal)
        self._shown = False
        self._quiet = quiet
        self._started = time.monotonic()
        self._device = DeviceView()
        self.name = str(self._options.get("name", "")) if self._uri else target
        """The device's name; "" until the service has given it one."""
        self._asked = False
        self.twins: list[str] = []
        """The names of other writable devices of the same export, if this one is writable."""

    @property
    def goes_on(self) -> bool:
        """Whether the service continues without us: the call was sent, and polkit waits for no password."""
        return self._asked and not self._quiet

    async def run(self, client: ManagerProxy) -> DeviceView:
        """Attach and return the device."""
        if self._terminal is not None:
            await client.subscribe()
        self._asked = True
        call = asyncio.ensure_future(self._attach(client))
        try:
            if self._terminal is not None:
                await self._watch(client, call, self._terminal)
            path = await call
        except AlreadyAttached:
            # By the service, which retries devices with attach: boot by itself.
            there = await self.existing(client) if self._waited else None
            if there is None:
                raise
            return there
        finally:
            call.cancel()
            self._clear_line()
        device = await self._attached_device(client, path)
        if not device.read_only:
            others = await client.devices()
            self.twins = [each.name for each in others if _writes(each) and _shared(each, device)]
            self.twins.remove(device.name)
        return device

    async def existing(self, client: ManagerProxy) -> DeviceView | None:
        """The device that is attached already; None if that is another one.

        Raises AlreadyAttached if it does not match the options.
        """
        if not self._uri:
            return self._as_wanted(await client.device(self.name))
        for device in await client.devices():
            # A name that is taken by another export must not pass for success.
            if device.node and device.is_at(self._target) and self.name in {"", device.name}:
                return self._as_wanted(device)
        return None

    def _as_wanted(self, device: DeviceView) -> DeviceView:
        for key, wanted in self._options.items():
            field = _FIELDS_OF_OPTIONS.get(key)
            if field is not None and getattr(device, field) != wanted:
                raise AlreadyAttached(
                    f"{device.name} is attached already, as {device.node}, but not with --{key} as it is asked for; "
                    "detach it first."
                )
        return device

    async def _attach(self, client: ManagerProxy) -> str:
        end = self._started + self._wait
        while True:
            try:
                return await self._call_attach(client)
            except ServerError:
                left = end - time.monotonic()
                if left <= 0:
                    raise
                self._waited = True
                await asyncio.sleep(min(left, RETRY))

    async def _call_attach(self, client: ManagerProxy) -> str:
        if self._uri:
            return await client.attach_uri(self._target, self._options)
        return await client.attach(self._target, self._options)

    async def _attached_device(self, client: ManagerProxy, path: str) -> DeviceView:
        try:
            return await client.device_at(path)
        except NbddError as problem:
            raise NoSuchDevice(
                f"{self.name or self._target} was attached, and is gone again or can't be looked at: {problem}"
            ) from problem

    async def _watch(self, client: ManagerProxy, call: asyncio.Future[str], terminal: IO[str]) -> None:
        """Keep one line up to date until the call is done."""
        event = asyncio.ensure_future(client.event())
        # An attach may be under way already, without an event for a while.
        reading = asyncio.ensure_future(self._read_state(client))
        pause = PATIENCE
        try:
            while not call.done():
                both: set[asyncio.Future[Any]] = {call, event}
                await asyncio.wait(both, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                if event.done() and not call.done():
                    if event.exception() is not None:
                        return  # the bus is gone; the call says so
                    self._handle(event.result())
                    event = asyncio.ensure_future(client.event())
                waited = time.monotonic() - self._started
                pause = max(PATIENCE - waited, 0) or 1
                if waited >= PATIENCE and not call.done() and not self._quiet:
                    self._show_progress(int(waited), terminal)
        finally:
            event.cancel()
            reading.cancel()

    async def _read_state(self, client: ManagerProxy) -> None:
        with contextlib.suppress(NbddError):
            found = await client.device(self.name) if self.name else DeviceView()
            if self._device == DeviceView():
                self._device = found

    def _handle(self, event: ManagerEvent) -> None:
        if not self.name and event.kind is EventKind.ADDED and same_export(event.changes.get("uri", ""), self._target):
            self.name = event.name
        if event.name and event.name == self.name and event.kind in {EventKind.ADDED, EventKind.CHANGED}:
            if self._quiet:
                self._quiet = False
                self._started = time.monotonic()
            shown = ("state", "uri", "last_error")
            self._device = self._device.updated({key: event.changes[key] for key in shown if key in event.changes})

    def _show_progress(self, waited: int, terminal: IO[str]) -> None:
        device = self._device
        state = device.state if device.state != DeviceView().state else "waiting"
        text = f"{self.name or self._target}: {state} for {waited} s"
        if device.last_error is not None:
            text += f"; last error: {device.last_error.message}"
        columns = None if self._look.width is None else self._look.width - 1
        terminal.write("\r\x1b[K" + fit(printable(text), columns))
        terminal.flush()
        self._shown = True

    def _clear_line(self) -> None:
        if self._terminal is not None and self._shown:
            self._terminal.write("\r\x1b[K")
            self._terminal.flush()


def _shared(one: DeviceView, other: DeviceView) -> bool:
    """Whether two devices have a server in common."""
    return any(other.is_at(uri) for uri in one.servers)


def _writes(device: DeviceView) -> bool:
    return bool(device.node) and not device.read_only
