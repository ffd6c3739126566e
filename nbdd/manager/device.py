# SPDX-License-Identifier: MIT
"""One device: what the manager asks of it, and what its worker reports. Its life is in lifecycle.py."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbdd.config.definition import Definition
from nbdd.errors import Busy, ExportChanged, NbddError, NotAttached, WorkerFailed
from nbdd.ipc.channel import Message
from nbdd.manager.attachment import ATTEMPTS, ORDER_DEADLINE, Attachment
from nbdd.manager.lifecycle import Lifecycle
from nbdd.manager.records import Record, Records
from nbdd.manager.slot import KeepSockets, Spawner, WorkerSlot
from nbdd.manager.status import NO_ERROR, Phase, Status, StatusTracker, last_error
from nbdd.manager.supervisor import WorkerProcess
from nbdd.system.journal import DeviceLog
from nbdd.worker.binding import ConnectionState

log = logging.getLogger(__name__)

READY_DEADLINE = 10.0
"""Seconds to wait for a worker's successor before an order for it fails."""


class Device:
    """One definition and what has become of it. Runs in the manager's loop; all times in seconds."""

    def __init__(
        self,
        definition: Definition,
        *,
        configured: bool,
        supervisor: Spawner,
        records: Records,
        keep_sockets: KeepSockets,
        on_change: Callable[[Device, Status], None],
    ) -> None:
        """`on_change` is called after each change of the status, with the status before it."""
        self._log = DeviceLog(log, definition.name)
        self._status = StatusTracker(
            Status.idle(definition, configured=configured), self._log, lambda old: on_change(self, old)
        )
        self._slot = WorkerSlot(
            definition.name,
            supervisor,
            keep_sockets,
            on_event=self._event,
            on_worker=lambda pid: self._status.change(worker_pid=pid),
        )
        self._life = Lifecycle(definition, self._slot, records, self._status, self._log)
        self._counting: asyncio.Task[Message] | None = None

    @property
    def name(self) -> str:
        """The name of the definition."""
        return self.definition.name

    @property
    def definition(self) -> Definition:
        """The definition as configured or as given to AttachURI."""
        return self._life.definition

    @property
    def status(self) -> Status:
        """The device's status now."""
        return self._status.now

    @property
    def active(self) -> bool:
        """Whether the device is wanted, and so attached or on its way to or from it."""
        return self._life.active

    @property
    def idle(self) -> bool:
        """Whether the device is not wanted, and nothing of it can be left in the kernel."""
        return not self._life.active and self._life.attachment is None

    # Attach, adopt, detach: see lifecycle.py

    def start(self) -> None:
        """Begin to attach and return at once; the status has the outcome."""
        self._life.start()

    def adopt(self, record: Record, sockets: list[int]) -> None:
        """Take over a device that the previous instance bound, with the sockets that were kept; return at once."""
        self._life.adopt(record, sockets)

    async def attach(self, definition: Definition | None = None, *, by: int = 0) -> None:
        """Attach, or join the attempt under way; return when the block device is usable.

        `definition` replaces the device's own for this attachment; `by` is the caller's user id.
        Raises AlreadyAttached, Busy while it is being detached or attached otherwise, or what the attempt met.
        """
        await self._life.attach(definition, by=by)

    async def detach(self, *, force: bool = False, wait: float = 0) -> None:
        """Detach and return when the kernel's device is free again.

        `wait` is how long to wait for users to close it. Raises NotAttached, Busy (and says by whom), KernelError.
        """
        await self._life.detach(force=force, wait=wait)

    async def close(self) -> None:
        """End the worker without detaching: the device stays in the kernel for a successor to adopt."""
        await self._life.close()

    # Orders for the attached device

    async def set_timeout(self, seconds: int) -> None:
        """Change the request timeout of the attached device, live; it holds until the device is detached."""
        attachment, _ = await self._ask("set-timeout", seconds=seconds)
        attachment.change_definition(attachment.definition.with_timeout(seconds))
        self._log.info("the request timeout is now %s", f"{seconds} s" if seconds else "off")
        self._status.change(timeout=seconds)

    async def reconnect(self) -> None:
        """Replace the connections of the attached device by new ones, to the first server that has the same data."""
        await self._ask("reconnect")
        self._log.info("reconnected to %s, as requested", self.status.uri)

    async def resize(self) -> int:
        """Take the size that the server reports now, if it has grown; returns it, in bytes."""
        _, reply = await self._ask("resize")
        size = int(reply["size"])
        self._log.info("the size is now %d bytes, as requested", size)
        return size

    async def shorten_dead_timeout(self, seconds: int) -> None:
        """Let I/O without a connection fail `seconds` after this, or after the death of the last connection if later.

        It holds until the device is detached. A failure is logged.
        """
        attachment = self._life.attachment
        if attachment is None or attachment.definition.dead_timeout <= seconds:
            return
        try:
            attachment, reply = await self._ask("shorten-dead-timeout", seconds=seconds)
        except (NotAttached, Busy):
            return  # No I/O waits, or it is being detached.
        except NbddError as error:
            self._log.error("the dead timeout can't be shortened: %s", error)
            return
        shorter = replace(attachment.definition, dead_timeout=int(reply["dead-timeout"]))
        attachment.change_definition(shorter)
        fails_at = self.status.fails_at
        if fails_at and attachment.binding is not None:
            fails_at = attachment.fails_at(attachment.binding.lost)
        self._status.change(dead_timeout=shorter.dead_timeout, fails_at=fails_at)

    async def statistics(self) -> dict[str, int]:
        """What the kernel counted since the device was attached; the keys are those of GetStatistics."""
        # Every user may ask, as often as they like; the worker is asked once at a time.
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._count())
            self._counting.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        reply = await asyncio.shield(self._counting)
        return {str(key): int(value) for key, value in reply["statistics"].items()}

    async def _count(self) -> Message:
        return (await self._ask("statistics"))[1]

    async def _ask(self, order: str, **arguments: Any) -> tuple[Attachment, Message]:
        """Give an order to the worker of the attached device; if that dies, to its successor."""
        deaths = 0
        while True:
            attachment, worker = await self._ready_worker()
            try:
                return attachment, await worker.request(order, deadline=ORDER_DEADLINE, **arguments)
            except WorkerFailed:
                deaths += 1
                if deaths >= ATTEMPTS:
                    raise

    async def _ready_worker(self) -> tuple[Attachment, WorkerProcess]:
        """The worker of the attached device, or its successor, which may still be adopting."""
        # After a restart of nbdd, a device that is being adopted counts as attached.
        waits = self.status.bound or self._status.phase is Phase.ADOPTING
        worker = await self._slot.wait_ready(READY_DEADLINE if waits else 0)
        if self._status.phase is Phase.DETACHING:
            raise Busy(f"{self.name!r} is being detached; try again in a moment.")
        if not self.status.bound or self._life.attachment is None:
            raise NotAttached(f"{self.name!r} is not attached.")
        if worker is None:
            raise WorkerFailed(f"{self.name!r} has no worker at the moment; try again.")
        return self._life.attachment, worker

    # Changes of the definition

    def redefine(self, definition: Definition) -> None:
        """Take a changed definition: at once if the device is idle, else at its next attach, or attempt to."""
        self._life.definition = definition
        if not self.status.configured:
            # From now on the configuration wants it, and not the user who attached it.
            self._status.change(configured=True, attached_by=0)
            if self._life.attachment is not None:
                self._life.attachment.update_record(configured=True, attached_by=0)
        if self.status.bound and self._life.is_elsewhere:
            self._log.warning("still attached from %s, which its new definition does not name", self.status.uri)
        if not self.active:
            self._status.set(self.status.with_definition(definition))
        elif self._status.phase.connecting:
            self._life.retry_now()

    def disown(self) -> None:
        """The configuration no longer has it; it stays for as long as it is attached."""
        self._status.change(configured=False)
        if self._life.attachment is not None:
            self._life.attachment.update_record(configured=False)

    # What the worker reports

    def _event(self, message: Message, fds: list[int]) -> None:
        """Handle a message that the worker sent unasked."""
        if message["event"] == "connections" and self._slot.worker is not None and self._life.attachment is not None:
            self._slot.replace_sockets(fds)
            error = NbddError.from_wire(message) if "error" in message else None
            self._connections_changed(self._life.attachment, ConnectionState.from_wire(message), error)
            return
        for fd in fds:
            os.close(fd)
        if message["event"] == "warning":
            self._log.warning("%s", message["message"])
        elif message["event"] == "info":
            self._log.info("%s", message["message"])

    def _connections_changed(self, attachment: Attachment, found: ConnectionState, error: NbddError | None) -> None:
        old = self.status
        new = replace(old.with_connections(found), fails_at=attachment.fails_at(found.lost, old.fails_at))
        attachment.update_connections(found)
        if error is not None:
            new = replace(new, last_error=last_error(error))
            # An attempt that fails like the one before it is not worth a line.
            if found.live < old.live_connections or new.last_error != old.last_error:
                self._log.warning("%s", error)
        elif found.live < old.live_connections:
            # The worker ended them itself, as others were requested; an earlier error has no part in it.
            new = replace(new, last_error=NO_ERROR)
        elif found.reconnects > old.reconnects:
            self._log.info("connected to %s again, %d of %d connections", found.uri, found.live, old.connections)
        if old.bound:
            io_failed = found.failing or isinstance(error, ExportChanged)
            new = replace(new, phase=Phase.of_connections(found.live, old.connections, io_failed=io_failed))
        self._status.set(new)
