# SPDX-License-Identifier: MIT
"""One attachment of a device: made by an attach or an adoption, dropped when the device is detached.

It holds what is true of this attachment only: the definition with what Attach and SetTimeout changed, the record, and
the outcome that the callers of attach wait for. It also gives the orders that make and end a binding, in the order that
keeps the record's promise: the record is written before the kernel is asked, and deleted after the device is free.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbdd.config.definition import Definition
from nbdd.errors import Busy, NbddError, WorkerFailed
from nbdd.manager.records import Record, Records
from nbdd.manager.slot import WorkerSlot
from nbdd.manager.status import Status
from nbdd.manager.supervisor import WorkerProcess
from nbdd.system.journal import DeviceLog
from nbdd.worker.binding import Binding, ConnectionState

ATTACH_DEADLINE = 60.0
"""Seconds after which a worker that still attaches counts as hung. Its own deadlines end sooner."""

ORDER_DEADLINE = 30.0
"""The same for every other order."""

WAIT_INTERVAL = 0.25
"""Seconds between two attempts to detach a device that is in use."""

MEND_INTERVAL = 7.0
"""The same if a connection is dead: each attempt interrupts the mending, which takes up to five seconds."""

ATTEMPTS = 3
"""How many workers may die under one order before it fails."""


class Attachment:
    """A definition, its record and its binding, from the first attempt to bind the device until it is free again."""

    def __init__(
        self,
        definition: Definition,
        slot: WorkerSlot,
        records: Records,
        log: DeviceLog,
        record: Record | None = None,
    ) -> None:
        """`record` is that of an earlier attachment, or instance of nbdd, which may have left the device bound."""
        self.definition = definition
        """The device's definition, with what this attachment changed: options of Attach, a new timeout."""
        self._slot = slot
        self._records = records
        self._log = log
        self._record = record
        self._inherited = record is not None
        # What the worker reported since it was asked for the binding, which was true a moment before.
        self._reports: list[ConnectionState] = []
        self._outcome: asyncio.Future[None] | None = None

    @property
    def record(self) -> Record | None:
        """The record; None as long as nothing of the device can be in the kernel."""
        return self._record

    @property
    def binding(self) -> Binding | None:
        """What the worker last said of the bound device; None before it said anything."""
        return self._record.binding if self._record is not None else None

    @property
    def unknown_to_users(self) -> bool:
        """Whether only the attempt under way can have bound the device: no user knows of it yet."""
        return not self._inherited and self.binding is None

    def restart(self, definition: Definition) -> None:
        """Begin again, as the device that was to be adopted is gone; callers still wait for the outcome."""
        self.definition = definition
        self._inherited = False

    # The outcome

    def outcome(self) -> asyncio.Future[None]:
        """What the attempt under way, or the next one, ends with; to be shielded, as several callers wait for it."""
        if self._outcome is None or self._outcome.done():
            self._outcome = asyncio.get_running_loop().create_future()
        return self._outcome

    def finish(self, error: NbddError | None) -> None:
        """Return, or raise `error`, to the callers that wait for the outcome."""
        if self._outcome is None or self._outcome.done():
            return
        if error is None:
            self._outcome.set_result(None)
        else:
            self._outcome.set_exception(error)
            self._outcome.exception()  # fetched, in case no caller waits any more

    # Orders

    async def attach(self, status: Callable[[], Status]) -> Binding:
        """Have a new worker bind the device. `status` says for whom, when the record is written.

        Raises what the worker met, which has ended then. The record stays if the kernel may have been asked.
        """
        # With a record, a device under our name can only be what a worker, or a manager, bound before it died.
        resume = self._record is not None
        try:
            worker = await self._slot.respawn()
            if not resume:
                # If a stranger's device is bound under our name, a record would make it ours.
                await worker.request("look", deadline=ORDER_DEADLINE)
            # Only now: a reload may have changed it while the worker was forked.
            now = status()
            record = Record(self.definition, now.configured, attached_by=now.attached_by)
            self._records.write(record)
            self._record = record
            return await self._bind(worker, "attach", definition=self.definition.to_wire(), resume=resume)
        except NbddError as error:
            await self._slot.stop()
            if not resume and not isinstance(error, WorkerFailed):
                self.delete_record()
            raise

    async def adopt(self, binding: Binding) -> Binding:
        """Have a new worker take over the bound device; returns the binding as it is now.

        Raises NotAttached if the device is not bound any more, or what else the worker met.
        """
        worker = await self._slot.respawn()
        definition = self.definition.to_wire()
        return await self._bind(worker, "adopt", self._slot.sockets, definition=definition, binding=binding.to_wire())

    async def _bind(self, worker: WorkerProcess, order: str, fds: tuple[int, ...] = (), **arguments: Any) -> Binding:
        self._reports.clear()
        reply, sockets = await worker.request_fds(order, deadline=ATTACH_DEADLINE, fds=fds, **arguments)
        if not self._reports:
            self._slot.replace_sockets(sockets)
            return Binding.from_wire(reply)
        # The report arrived with the reply, and its sockets are the newer ones.
        for fd in sockets:
            os.close(fd)
        return Binding.from_wire(reply).with_state(self._reports[-1])

    async def release(self, *, force: bool, until: float) -> None:
        """Have a worker free the kernel's device; `until`, monotonic, is when to stop waiting for its users.

        Raises Busy if it is in use, or what else the worker met.
        """
        deaths = 0
        while self._record is not None:
            binding = self.binding
            try:
                worker = await self._slot.ensure()
                await worker.request(
                    "detach",
                    deadline=ORDER_DEADLINE,
                    fds=self._slot.sockets,
                    definition=self._record.definition.to_wire(),
                    binding=None if binding is None else binding.to_wire(),
                    force=force,
                )
                return
            except Busy:
                if time.monotonic() >= until:
                    raise
                pause = WAIT_INTERVAL if binding is not None and not binding.missing else MEND_INTERVAL
                await asyncio.sleep(min(pause, max(0, until - time.monotonic())))
            except WorkerFailed:
                deaths += 1
                if deaths >= ATTEMPTS:
                    raise

    # The record

    def change_definition(self, definition: Definition) -> None:
        """Change the definition of this attachment, in the record too."""
        self.definition = definition
        self.update_record(definition=definition)

    def update_record(self, **changes: Any) -> None:
        """Bring the record up to date; if it can't be written that is logged, as what it describes has happened."""
        if self._record is None:
            return
        self._record = replace(self._record, **changes)
        try:
            self._records.write(self._record)
        except NbddError as error:
            self._log.error("%s", error)

    def update_connections(self, found: ConnectionState) -> None:
        """Take what the worker reports of the connections, in the record too."""
        self._reports = [found]
        if self.binding is not None:
            self.update_record(binding=self.binding.with_state(found))

    def delete_record(self) -> None:
        """Delete the record: nothing of the device is in the kernel any more."""
        self._record = None
        self._records.remove(self.definition.name)

    def fails_at(self, lost: float, known: int = 0) -> int:
        """When I/O that waits since `lost` (monotonic seconds) fails, in microseconds since 1970; 0 if `lost` is 0.

        `known` is what was returned before: it stays if I/O waits since the same moment. Calculated again it would
        differ by a microsecond, and be signalled on D-Bus.
        """
        if not lost:
            return 0
        if known and self.binding is not None and self.binding.lost == lost:
            return known
        left = lost + self.definition.dead_timeout - time.monotonic()
        return int((time.time() + left) * 1e6)
