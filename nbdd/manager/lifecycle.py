# SPDX-License-Identifier: MIT
"""The life of a device: attach, adopt and detach, and the order in which each of them does things.

    detached ──attach──> attaching ──bound──> attached <──> degraded / reconnecting / I/O failed
       ^                     │ error         ^   │ detach
       │                     v               │   v
       └──────detach────── failed        adopting  detaching ──free──> detached

One task, the *runner*, keeps a worker in the slot for as long as the device is wanted: it attaches or adopts, watches
the worker, and when that ends for whatever reason has a new one adopt the bound device. A detach stops the runner and
gives its own orders; if it fails, the runner starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from nbdd.config.definition import Attach, Definition
from nbdd.errors import AlreadyAttached, Busy, NbddError, NotAttached, WorkerFailed
from nbdd.manager.attachment import ATTEMPTS, Attachment
from nbdd.manager.records import Record, Records
from nbdd.manager.slot import WorkerSlot
from nbdd.manager.status import NO_ERROR, LastError, Phase, StatusTracker, last_error
from nbdd.manager.supervisor import backoff
from nbdd.system.journal import DeviceLog
from nbdd.worker.binding import Binding

STEADY = 5.0
"""Seconds after which a worker that ends has its successor at once; one that ends sooner is replaced with a delay."""


class Lifecycle:
    """What a device goes through. Runs in the manager's loop; all times in seconds."""

    def __init__(
        self, definition: Definition, slot: WorkerSlot, records: Records, status: StatusTracker, log: DeviceLog
    ) -> None:
        self.definition = definition
        """The definition as configured or as given to AttachURI; the next attachment begins with it."""
        self._slot = slot
        self._records = records
        self._status = status
        self._log = log
        self._attachment: Attachment | None = None
        self._runner: asyncio.Task[None] | None = None
        self._retry_now = asyncio.Event()

    @property
    def attachment(self) -> Attachment | None:
        """The attachment under way; None if nothing of the device can be in the kernel and no attempt is made."""
        return self._attachment

    @property
    def active(self) -> bool:
        """Whether the device is wanted, and so attached or on its way to or from it."""
        return self._runner is not None or self._status.phase is Phase.DETACHING

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is attached from none of the servers of its definition, which has changed meanwhile."""
        return self._attachment is not None and not {*self.definition.uri} & {*self._attachment.definition.uri}

    # Attach

    def start(self) -> None:
        """Begin to attach and return at once; the status has the outcome."""
        if not self.active:
            self._begin(self.definition, by=0)

    async def attach(self, definition: Definition | None, *, by: int) -> None:
        """Attach, or join the attempt under way; return when the block device is usable. See `Device.attach`."""
        name, status, attachment = self.definition.name, self._status.now, self._attachment
        if self._slot.closed:
            raise WorkerFailed("nbdd is stopping.")
        if status.bound:
            if self.is_elsewhere:
                # A caller that is content with a device that is attached already must not get another disk.
                raise Busy(
                    f"{name!r} is attached as {status.node} from {status.uri}, which its definition "
                    "does not name; detach it first."
                )
            raise AlreadyAttached(f"{name!r} is attached already, as {status.node}.")
        if status.phase is Phase.DETACHING:
            raise Busy(f"{name!r} is being detached; try again in a moment.")
        if self._runner is None or attachment is None:
            attachment = self._begin(definition or self.definition, by=by)
        elif definition not in (None, attachment.definition):
            raise Busy(f"{name!r} is being attached already, with other options; wait for it, or detach it first.")
        else:
            self._retry_now.set()
        # The attempt goes on if the caller goes away.
        await asyncio.shield(attachment.outcome())

    def retry_now(self) -> None:
        """End the pause between two attempts to attach."""
        self._retry_now.set()

    def _begin(self, definition: Definition, *, by: int) -> Attachment:
        left = self._attachment.record if self._attachment is not None else None
        attachment = self._attachment = self._attachment_of(definition, left)
        self._status.reset(Phase.ATTACHING, definition, last_error=self._status.now.last_error, attached_by=by)
        self._run(attachment, self._attach_until_bound)
        return attachment

    async def _attach_until_bound(self, attachment: Attachment) -> None:
        """Attach; a boot device is tried until the server answers, another once."""
        waits = backoff()
        deaths = 0
        while True:
            as_configured = attachment.definition == self.definition
            self._retry_now.clear()
            try:
                binding = await attachment.attach(lambda: self._status.now)
            except NbddError as error:
                died = isinstance(error, WorkerFailed)
                deaths = deaths + 1 if died else 0
                if not self._is_persistent(attachment) and not (died and deaths < ATTEMPTS):
                    await self._clean_up(attachment)
                    raise
                self._log_retry(error)
                if not died:
                    attachment.finish(type(error)(f"{error} nbdd keeps trying, as the device has 'attach: boot'."))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(next(waits)):
                        await self._retry_now.wait()
                if as_configured and attachment.definition != self.definition:
                    # A reload changed it, perhaps to mend the very fault.
                    attachment.definition = self.definition
                    self._status.set(self._status.now.with_definition(self.definition))
            else:
                self._finish_attach(attachment, binding)
                return

    def _finish_attach(self, attachment: Attachment, binding: Binding) -> None:
        """A worker has attached or adopted the device."""
        since = (attachment.record.attached_since if attachment.record is not None else 0) or time.time_ns() // 1000
        old, definition = self._status.now, attachment.definition
        new = replace(
            old.with_binding(binding, attached_since=since),
            phase=Phase.of_connections(binding.live, binding.connections),
            read_only=binding.read_only,
            timeout=definition.timeout,
            dead_timeout=definition.dead_timeout,
            reconnects=binding.reconnects,
            fails_at=attachment.fails_at(binding.lost, old.fails_at),
            last_error=old.last_error if binding.missing > 0 else NO_ERROR,
        )
        # If this can't be written, the record of the attempt still stands, and a successor finds the device by name.
        attachment.update_record(binding=binding, definition=definition, attached_since=since)
        self._slot.set_ready()
        self._status.set(new)
        attachment.finish(None)

    async def _clean_up(self, attachment: Attachment) -> None:
        """Free what a worker that died during an attach may have bound; if that fails, the record stays."""
        if attachment.record is None:
            return
        try:
            await attachment.release(force=False, until=time.monotonic())
        except NbddError as error:
            self._log.warning("the attach failed, and the device that it may have bound can't be freed: %s", error)
        else:
            attachment.delete_record()

    # Adopt

    def adopt(self, record: Record, sockets: list[int]) -> None:
        """Take over a device that the previous instance bound, with the sockets that were kept; return at once."""
        attachment = self._attachment = self._attachment_of(record.definition, record)
        self._slot.inherit_sockets(sockets)
        status = replace(self._status.now.with_definition(record.definition), attached_by=record.attached_by)
        if record.binding is None:
            # The previous instance ended while it attached the device.
            self._status.set(replace(status, phase=Phase.ATTACHING))
        else:
            self._log.info("adopting %s, left by the previous instance", record.binding.node)
            # It is there, and may be in use, before a worker has it.
            bound = status.with_binding(record.binding, attached_since=record.attached_since)
            self._status.set(replace(bound, phase=Phase.ADOPTING))
        self._run(attachment, self._adopt_until_bound)

    async def _adopt_until_bound(self, attachment: Attachment) -> None:
        """Have a new worker take over the bound device; one that is not bound, or not any more, is attached."""
        waits = backoff(0.01)
        while (known := attachment.binding) is not None:
            try:
                binding = await attachment.adopt(known)
            except NotAttached as error:
                attachment.delete_record()
                self._slot.replace_sockets([])
                await self._slot.stop()
                if not self._is_persistent(attachment):
                    raise
                self._log.warning("%s Attaching it again.", error)
                attachment.restart(self.definition)
                self._status.reset(Phase.ATTACHING, self.definition, last_error=last_error(error))
            except NbddError as error:
                # It may well be bound, and in use.
                self._log_retry(error)
                await asyncio.sleep(next(waits))
            else:
                self._finish_attach(attachment, binding)
                return
        await self._attach_until_bound(attachment)

    # Detach

    async def detach(self, *, force: bool, wait: float) -> None:
        """Detach and return when the kernel's device is free again. See `Device.detach`."""
        name, before, attachment = self.definition.name, self._status.phase, self._attachment
        if before is Phase.DETACHED:
            raise NotAttached(f"{name!r} is not attached.")
        if before is Phase.DETACHING:
            raise Busy(f"{name!r} is being detached already.")
        # Before the first await, so that no second caller gets in between.
        self._status.change(phase=Phase.DETACHING)
        ended = NotAttached(f"Attaching {name!r} was ended by a detach.")
        try:
            await self._stop_runner()
            if before.connecting:
                # The worker may be anywhere between the first connect and the bound device: end it, and see what it
                # left.
                await self._slot.stop()
            if attachment is not None:
                if attachment.unknown_to_users:
                    attachment.finish(ended)
                await attachment.release(force=force, until=time.monotonic() + wait)
        except BaseException as error:
            self._recover(before, attachment, ended, error)
            raise
        if attachment is not None:
            attachment.finish(ended)
            attachment.delete_record()
        self._attachment = None
        self._slot.drop()
        self._status.reset(Phase.DETACHED, self.definition)

    def _recover(self, before: Phase, attachment: Attachment | None, ended: NotAttached, error: BaseException) -> None:
        """The detach failed, or its caller went away: give the device up if no user can have it, else go on with it."""
        shown = self._status.now.last_error
        if isinstance(error, Busy):
            # No fault of the device's: the caller gets it, and the journal.
            self._log.warning("not detached: %s", error)
        elif isinstance(error, NbddError):
            shown = last_error(error)
        if (
            attachment is None
            or attachment.record is None
            or before is Phase.FAILED
            or (attachment.unknown_to_users and not isinstance(error, Busy))
        ):
            if attachment is not None:
                attachment.finish(ended)
            self._give_up(shown)
            return
        if not isinstance(error, NbddError):
            # The worker may be in the middle of the detach. Its successor finds out what came of it.
            self._slot.kill()
        if before.bound and before is not Phase.IO_FAILED:
            # Connections may have died or come back meanwhile.
            before = Phase.of_connections(self._status.now.live_connections, self._status.now.connections)
        self._status.change(phase=before, last_error=shown)
        self._run(attachment, self._watch if self._slot.is_ready else self._adopt_until_bound)

    # The runner

    def _run(self, attachment: Attachment, first: Callable[[Attachment], Coroutine[Any, Any, None]]) -> None:
        if not self._slot.closed:
            self._retry_now.clear()
            name = f"device {self.definition.name}"
            self._runner = asyncio.create_task(self._supervise(attachment, first), name=name)

    async def _supervise(
        self, attachment: Attachment, first: Callable[[Attachment], Coroutine[Any, Any, None]]
    ) -> None:
        """Do `first`, then watch the worker and replace it, until the device is lost or detached."""
        try:
            await first(attachment)
            waits = backoff(0.01, 1.0)
            while True:
                since = time.monotonic()
                await self._watch(attachment)
                if time.monotonic() - since < STEADY:
                    await asyncio.sleep(next(waits))
                else:
                    waits = backoff(0.01, 1.0)
                await self._adopt_until_bound(attachment)
        except NbddError as error:
            self._fail(attachment, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - a fault of ours must not leave a device that only looks alive
            self._log.exception("internal error")
            self._fail(attachment, NbddError(f"Internal error: {error}."))

    async def _watch(self, _attachment: Attachment) -> None:
        """Return when the worker has ended."""
        worker = self._slot.worker
        if worker is not None:
            ending = await self._slot.wait_ended()
            self._log.warning("worker %d %s; the device stays attached, a new worker adopts it", worker.pid, ending)

    async def _stop_runner(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            # Not `await runner`: that could not tell its cancellation from ours.
            await asyncio.wait({runner})

    def _fail(self, attachment: Attachment, error: NbddError) -> None:
        """The runner ends: the device is not attached, and no more attempt is made."""
        self._log.error("%s", error)
        self._runner = None
        self._give_up(last_error(error))
        attachment.finish(error)

    def _give_up(self, shown: LastError) -> None:
        """Do without a worker; the attachment stays if the kernel may still have the device."""
        self._slot.drop()
        if self._attachment is not None and self._attachment.record is None:
            self._attachment = None
        self._status.reset(Phase.FAILED, self.definition, last_error=shown)

    async def close(self) -> None:
        """End the runner and the worker without detaching: the device stays in the kernel for a successor to adopt."""
        self._slot.close()
        await self._stop_runner()
        await self._slot.stop()
        if self._attachment is not None:
            self._attachment.finish(WorkerFailed("nbdd is stopping."))
        self._slot.close_sockets()

    def _attachment_of(self, definition: Definition, record: Record | None) -> Attachment:
        return Attachment(definition, self._slot, self._records, self._log, record)

    def _is_persistent(self, attachment: Attachment) -> bool:
        return attachment.definition.attach is Attach.BOOT and self._status.now.configured

    def _log_retry(self, error: NbddError) -> None:
        # A server that is away for hours is worth one line, not one every few seconds.
        known = last_error(error) == self._status.now.last_error
        self._log.log(logging.DEBUG if known else logging.WARNING, "%s Trying again.", error)
        self._status.change(last_error=last_error(error))
