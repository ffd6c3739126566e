# SPDX-License-Identifier: MIT
"""All devices: those of the configuration, those attached by hand, and those that the previous instance left bound."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from nbdd.config.definition import Attach, Definition, check_name
from nbdd.config.loader import Configuration
from nbdd.config.options import definition_from_options, options_with
from nbdd.errors import AlreadyAttached, Busy, InvalidArgs, NbddError, NoSuchDevice, NotAttached
from nbdd.ipc.channel import Message
from nbdd.manager.device import Device
from nbdd.manager.records import Records
from nbdd.manager.slot import KeepSockets
from nbdd.manager.status import State, Status
from nbdd.manager.supervisor import Supervisor
from nbdd.protocol import Export
from nbdd.system.journal import DeviceLog
from nbdd.uri import URI

log = logging.getLogger(__name__)

LIST_DEADLINE = 60.0
"""Seconds after which a worker that lists exports counts as hung. Its own deadline ends sooner."""

MAX_DEVICES = 4096
"""Ad-hoc devices beside the configured ones; the kernel numbers its nodes no further with many partitions each."""

BATCH = 32
"""Devices that are handled before the event loop runs other work: ten thousand of them take seconds."""


async def yield_to_loop(number: int) -> None:
    """Let the event loop run other work, once every BATCH calls with counting numbers."""
    if number % BATCH == 0:
        await asyncio.sleep(0)


class Observer(Protocol):
    """Receives each change of the set of devices and of their status: D-Bus, and systemd's status line."""

    def added(self, device: Device) -> None:
        """Receive a device that is known from now on, attached or not."""

    def changed(self, device: Device, old: Status) -> None:
        """Receive a change of its status, which was `old` before."""

    def removed(self, device: Device) -> None:
        """Receive a device that is not known any more."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload did, by name."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


class Manager:
    """Attach, detach, set_timeout, reload, for all devices. Knows neither D-Bus nor the kernel."""

    def __init__(
        self,
        load: Callable[[], Configuration],
        supervisor: Supervisor,
        records: Records,
        keep_sockets: KeepSockets,
        observer: Observer,
    ) -> None:
        self._load = load
        self._supervisor = supervisor
        self._records = records
        self._keep_sockets = keep_sockets
        self._observer = observer
        self._devices: dict[str, Device] = {}
        self._defaults: Mapping[str, object] = {}
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def devices(self) -> Mapping[str, Device]:
        """Every device by name."""
        return self._devices

    def device(self, name: str) -> Device:
        """The device of that name; raises InvalidArgs if that can't be a name, NoSuchDevice if no device has it."""
        try:
            return self._devices[check_name(name)]
        except KeyError:
            raise NoSuchDevice(
                f"There is no device {name!r}: nbdd has read no definition of it, and it was not attached by URI. "
                "If you have just written one: 'nbdctl reload'; 'nbdctl list' shows all."
            ) from None

    async def start(self, sockets: Mapping[str, list[int]]) -> None:
        """Adopt what the previous instance left bound, read the configuration, begin to attach boot devices.

        `sockets` are the connections that the previous instance kept, by device; those of no device are closed.
        Raises InvalidConfig if the configuration is bad and there is no device to adopt; if there is one, a bad
        configuration is logged and the adopted devices stay what they were.
        """
        kept = dict(sockets)
        records = self._records.load()
        # First, and from the records alone: a connection may be dead and I/O waiting while a long file is read.
        for record in records:
            name = record.definition.name
            self._add(record.definition, configured=record.configured).adopt(record, kept.pop(name, []))
        for name, fds in kept.items():
            DeviceLog(log, name).warning("its connections were kept, but it has no record: closing them")
            for fd in fds:
                os.close(fd)
            self._keep_sockets(name, [])
        try:
            _, leftovers = await self._apply(await asyncio.to_thread(self._load))
        except NbddError as error:
            if not records:
                raise
            log.error(
                "the configuration is bad and not used; only devices that are attached already are kept:\n%s", error
            )
        else:
            # They left the configuration while nbdd was not running.
            self._background(self._retire_all(leftovers))

    async def attach(self, name: str, options: Mapping[str, object], *, by: int = 0) -> Device:
        """Attach a device that has a definition; return when it is usable. `by` is the caller's user id."""
        device = self.device(name)
        await device.attach(options_with(device.definition, options) if options else None, by=by)
        return device

    async def attach_uri(self, uri: str, options: Mapping[str, object], *, by: int = 0) -> Device:
        """Attach an export that has no definition; return when it is usable. `by` is the caller's user id."""
        options = dict(options)
        given = options.pop("name", None)
        if given is not None and not isinstance(given, str):
            raise InvalidArgs("The option 'name' must be a string.")
        parsed = URI.parse(uri)
        name = check_name(given) if given is not None else self._name_for(parsed)
        definition = definition_from_options(name, {**options, "uri": uri}, self._defaults)
        taken = self._devices.get(name)
        if taken is not None and taken.status.configured:
            raise InvalidArgs(
                f"{name!r} is the name of a configured device: attach that by its name, or choose another."
            )
        if taken is not None and not (taken.status.state is State.FAILED and taken.idle):
            raise AlreadyAttached(f"There is a device {name!r} already: detach it first, or choose another name.")
        if taken is not None:
            self._remove(taken)
        if sum(not device.status.configured for device in self._devices.values()) >= MAX_DEVICES:
            raise Busy(f"There are {MAX_DEVICES} devices attached by URI already; detach one first.")
        device = self._add(definition, configured=False)
        try:
            await device.attach(by=by)
        except NbddError:
            self._drop(device)
            raise
        return device

    async def detach(self, name: str, *, force: bool = False, wait: float = 0) -> None:
        """Detach a device; return when the kernel's device is free again."""
        device = self.device(name)
        await device.detach(force=force, wait=wait)
        self._drop(device)

    async def set_timeout(self, name: str, seconds: int) -> None:
        """Change the request timeout of an attached device, live."""
        device = self.device(name)
        options_with(device.definition, {"timeout": seconds})  # for its range
        await device.set_timeout(seconds)

    async def reconnect(self, name: str) -> None:
        """Replace the connections of an attached device by new ones."""
        await self.device(name).reconnect()

    async def resize(self, name: str) -> int:
        """Take the size that the server reports now; returns it, in bytes."""
        return await self.device(name).resize()

    async def list_exports(self, uri: str) -> list[Export]:
        """List a server's exports; a worker process asks the server."""
        parsed = URI.parse(uri)
        found: list[Export] = []

        def collect(message: Message, fds: list[int]) -> None:
            for fd in fds:
                os.close(fd)
            found.extend(map(Export.from_wire, message.get("exports", [])))

        worker = await self._supervisor.spawn("exports", collect)
        try:
            await worker.request("list-exports", deadline=LIST_DEADLINE, uri=str(parsed))
        finally:
            await worker.close()
        return found

    async def reload(self) -> Changes:
        """Read the configuration again: keep the equal, add the new, stop the leftovers; a bad file changes nothing.

        Returns when the leftovers that are not in use are detached; the new ones are attached in the background.
        """
        async with self._reloading:
            try:
                configuration = await asyncio.to_thread(self._load)
            except NbddError as error:
                log.error("not reloaded, the configuration is bad and nothing changes:\n%s", error)
                raise
            changes, leftovers = await self._apply(configuration)
            await self._retire_all(leftovers)
            log.info(
                "reloaded: %d added, %d changed, %d removed",
                *map(len, (changes.added, changes.changed, changes.removed)),
            )
            return changes

    async def _apply(self, configuration: Configuration) -> tuple[Changes, list[Device]]:
        """Keep the equal, add the new, redefine the changed; the leftovers are returned and not touched yet."""
        wanted, self._defaults = configuration.devices, configuration.defaults
        have = [device for device in self._devices.values() if device.status.configured]
        added, changed = [], []
        for number, (name, definition) in enumerate(wanted.items()):
            await yield_to_loop(number)
            device = self._devices.get(name)
            if device is None:
                added.append(name)
                device = self._add(definition, configured=True)
            elif not device.status.configured:
                # It was attached by hand before it had a definition.
                added.append(name)
                device.redefine(definition)
            elif device.definition != definition:
                changed.append(name)
                device.redefine(definition)
            else:
                continue
            if definition.attach is Attach.BOOT:
                device.start()
        leftovers = [device for device in have if device.name not in wanted]
        return Changes(tuple(added), tuple(changed), tuple(device.name for device in leftovers)), leftovers

    async def shorten_dead_timeouts(self, seconds: int) -> None:
        """Let I/O wait for a server at most `seconds`, from now on and until each device is detached."""
        await asyncio.gather(
            *(device.shorten_dead_timeout(seconds) for device in self._devices.values() if device.active)
        )

    async def stop(self, *, detach: bool, wait: float = 0) -> list[str]:
        """End; with `detach`, detach what is not in use first. Returns a sentence for each device that stays attached.

        `wait` is how many seconds to wait for the users of a device without a connection to close it.
        """
        still_attached: list[str] = []
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if detach:
            detaching = [
                self._try_detach(device, 0 if device.status.live_connections else wait)
                for device in self._devices.values()
            ]
            still_attached = [refusal for refusal in await asyncio.gather(*detaching) if refusal]
        await asyncio.gather(*(device.close() for device in self._devices.values()))
        await self._supervisor.close()
        return still_attached

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire_all(self, devices: list[Device]) -> None:
        """Detach devices that left the configuration; those in use stay attached for their users."""
        for device in devices:
            device.disown()
        for start in range(0, len(devices), BATCH):
            await asyncio.gather(*map(self._retire, devices[start : start + BATCH]))
            await yield_to_loop(start)

    async def _retire(self, device: Device) -> None:
        if device.status.configured:
            return  # A reload has brought it back while others were detached.
        refusal = await self._try_detach(device)
        if refusal:
            log.warning("%s", refusal, extra={"device": device.name})
        self._drop(device)

    async def _try_detach(self, device: Device, wait: float = 0) -> str:
        """Detach a device if it is attached; returns why it stays attached, or ""."""
        try:
            await device.detach(wait=wait)
        except NotAttached:
            pass
        except NbddError as error:
            return f"{device.name} stays attached: {error}"
        return ""

    def _name_for(self, uri: URI) -> str:
        base = re.sub(r"[^A-Za-z0-9._:-]+", "-", uri.export or uri.host or "nbd").strip("-._:")[:56] or "nbd"
        base = re.sub(r"-part([0-9]+)$", r"-p\1", base)
        if base not in self._devices:
            return base
        return next(name for number in count(2) if (name := f"{base}-{number}") not in self._devices)

    def _add(self, definition: Definition, *, configured: bool) -> Device:
        device = Device(
            definition,
            configured=configured,
            supervisor=self._supervisor,
            records=self._records,
            keep_sockets=self._keep_sockets,
            on_change=self._changed,
        )
        self._devices[device.name] = device
        self._observer.added(device)
        return device

    def _remove(self, device: Device) -> None:
        if self._devices.get(device.name) is device:
            del self._devices[device.name]
            self._observer.removed(device)

    def _drop(self, device: Device) -> None:
        """Remove a device that no configuration file defines, if it is idle."""
        if not device.status.configured and device.idle:
            self._remove(device)

    def _changed(self, device: Device, old: Status) -> None:
        if device.status.bound and not old.bound:
            self._warn_of_twins(device.status)
        self._observer.changed(device, old)

    def _warn_of_twins(self, new: Status) -> None:
        """Warn if an export is written to through two devices: only a clustered filesystem survives that."""
        for other in (device.status for device in self._devices.values()):
            shared = [uri for uri in new.uris if uri in other.uris]
            if other.name == new.name or not shared or not other.bound:
                continue
            if not (other.read_only and new.read_only):
                DeviceLog(log, new.name).warning(
                    "%s is attached as %s too; mount it through one of them only", shared[0], other.name
                )
