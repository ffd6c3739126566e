# SPDX-License-Identifier: MIT
"""One device: its state machine, from a definition to a worker and back.

    detached ──attach──> connecting ──bound──> attached <──> degraded / reconnecting
       ^                     │ error               │ detach
       │                     v                     v
       └──────detach────── failed               detaching ──free──> detached

A device that has waited too long for its server, or was offered another export by it, is `failed` and still bound.

One task, the *runner*, keeps the worker's slot filled for as long as the device is wanted: it attaches, watches, and
when the worker ends for whatever reason lets a new one adopt the bound device. `detach` takes the runner's place for
the time of the detaching. State changes in one method, `_set`, which tells the log and the manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from nbdd.config.definition import Attach, Definition
from nbdd.errors import AlreadyAttached, Busy, ExportChanged, NbddError, NotAttached, WorkerFailed
from nbdd.ipc.channel import Message
from nbdd.manager.records import Record, Records
from nbdd.manager.slot import KeepSockets, Spawner, WorkerSlot
from nbdd.manager.status import State, Status, state_for, told_of
from nbdd.manager.supervisor import WorkerProcess, backoff
from nbdd.system.journal import DeviceLog
from nbdd.worker.binding import Binding, ConnectionState

log = logging.getLogger(__name__)

ATTACH_DEADLINE = 60.0
"""Seconds after which a worker that still attaches counts as hung. Its own deadlines end sooner."""

ORDER_DEADLINE = 30.0
"""The same for every other order."""

READY_DEADLINE = 10.0
"""Seconds to wait for a worker's successor before an order for it fails."""

STEADY = 5.0
"""Seconds after which a worker that dies has its successor at once; a worker that dies sooner is no hurry."""

WAIT_INTERVAL = 0.25
"""Seconds between two looks whether the users of a device have left it."""

MEND_INTERVAL = 7.0
"""The same while a link is dead: each look interrupts the mending, whose attempts take up to five seconds."""

ATTEMPTS = 3
"""How often one request is put to a new worker when workers die under it."""


class Device:
    """One definition and what has become of it. Lives in the manager's loop; all times in seconds."""

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
        self._log = DeviceLog(log, definition.name)
        self._definition = definition
        # The definition with what this attachment changed: options of Attach, a new timeout.
        self._active = definition
        self._records = records
        self._on_change = on_change
        self._runner: asyncio.Task[None] | None = None
        self._slot = WorkerSlot(
            definition.name,
            supervisor,
            keep_sockets,
            on_event=self._event,
            on_worker=lambda pid: self._set(worker_pid=pid),
        )
        self._record: Record | None = None
        self._kick = asyncio.Event()
        self._outcome: asyncio.Future[None] | None = None
        self._counting: asyncio.Task[Message] | None = None
        # Whether only the attempt under way can have bound the device: then nobody was told of it and uses it.
        self._fresh = False
        self._closed = False
        self._status = self._idle_status(configured)

    @property
    def name(self) -> str:
        """The name of the definition."""
        return self._definition.name

    @property
    def definition(self) -> Definition:
        """The definition as configured or as given to AttachURI."""
        return self._definition

    @property
    def status(self) -> Status:
        """What is told of the device now."""
        return self._status

    @property
    def active(self) -> bool:
        """Whether the device is wanted, and so attached or on its way to or from it."""
        return self._runner is not None or self._status.state is State.DETACHING

    @property
    def idle(self) -> bool:
        """Whether the device is not wanted, and nothing of it can be left in the kernel."""
        return not self.active and self._record is None

    # What the manager asks

    def start(self) -> None:
        """Begin to attach and return at once; what comes of it is told by the status."""
        if not self.active:
            self._begin(self._definition, by=0)

    def adopt(self, record: Record, sockets: list[int]) -> None:
        """Take over a device that a predecessor bound, with its links as far as they were kept; return at once."""
        self._record = record
        self._slot.inherit_sockets(sockets)
        self._active = record.definition
        told = self._told_by(record.definition)
        if record.binding is not None:
            self._log.info("adopting %s, left by the previous instance", record.binding.node)
            # It is there, and perhaps in use, while nobody looks after it yet.
            told |= {
                "node": record.binding.node,
                "size": record.binding.size,
                "block_size": record.binding.block_size,
                "uri": record.binding.uri,
                "connections": record.binding.connections,
                "live_connections": record.binding.live,
                "attached_since": record.attached_since,
            }
        self._set(state=State.CONNECTING, attached_by=record.attached_by, **told)
        self._run(self._adopt)

    async def attach(self, definition: Definition | None = None, *, by: int = 0) -> None:
        """Attach, or join the attempt under way; return when the block device is usable.

        `definition` replaces the device's own for this attachment; `by` is the user id of who asks.
        Raises AlreadyAttached, Busy while it is being detached or attached otherwise, or what the attempt met.
        """
        if self._closed:
            raise WorkerFailed("nbdd is stopping.")
        if self._status.bound:
            if self._is_elsewhere():
                # Whoever is content with a device that is attached already shall not get another disk.
                raise Busy(
                    f"{self.name!r} is attached as {self._status.node} from {self._status.uri}, which its definition "
                    "does not name; detach it first."
                )
            raise AlreadyAttached(f"{self.name!r} is attached already, as {self._status.node}.")
        if self._status.state is State.DETACHING:
            raise Busy(f"{self.name!r} is being detached; try again in a moment.")
        if self._runner is not None and definition not in (None, self._active):
            raise Busy(f"{self.name!r} is being attached already, with other options; wait for it, or detach it first.")
        if self._outcome is None or self._outcome.done():
            self._outcome = asyncio.get_running_loop().create_future()
        outcome = self._outcome
        if self._runner is None:
            self._begin(definition or self._definition, by=by)
        else:
            self._kick.set()
        # The attempt goes on when the one who asked for it goes away.
        await asyncio.shield(outcome)

    async def detach(self, *, force: bool = False, wait: float = 0) -> None:
        """Detach and return when the kernel's device is free again.

        `wait` is how long to wait for openers to leave. Raises NotAttached, Busy (with who uses it), KernelError.
        """
        state, bound = self._status.state, self._status.bound
        if state is State.DETACHED:
            raise NotAttached(f"{self.name!r} is not attached.")
        if state is State.DETACHING:
            raise Busy(f"{self.name!r} is being detached already.")
        # Before the first await, so that no second caller gets in between.
        self._set(state=State.DETACHING)
        # Of a device that is only being adopted, a predecessor's users may still be there.
        fresh = state is State.CONNECTING and self._fresh
        try:
            await self._stop_runner()
            if state is State.CONNECTING:
                # The worker may be anywhere between the first connect and the bound device: end it, and look what it
                # left.
                await self._slot.stop()
                if fresh:
                    self._settle(NotAttached(f"Attaching {self.name!r} was ended by a detach."))
            await self._release(force=force, until=time.monotonic() + wait)
        except BaseException as error:
            self._not_detached(state, error, bound=bound, fresh=fresh)
            raise
        self._settle(NotAttached(f"Attaching {self.name!r} was ended by a detach."))
        self._detached()

    async def set_timeout(self, seconds: int) -> None:
        """Change the request timeout of the attached device, live; it holds until the device is detached."""
        await self._ask("set-timeout", seconds=seconds)
        self._active = self._active.with_timeout(seconds)
        self._note(definition=self._active)
        self._log.info("a request may take %s", f"{seconds} s" if seconds else "as long as it needs")
        self._set(timeout=seconds)

    async def reconnect(self) -> None:
        """Exchange the links of the attached device for new ones, to the first server that has the same data."""
        await self._ask("reconnect")
        self._log.info("reconnected, as asked for, to %s", self._status.uri)

    async def resize(self) -> int:
        """Take the size that the server says now, if it has grown; returns it, in bytes."""
        size = int((await self._ask("resize"))["size"])
        self._log.info("%d bytes, as asked for", size)
        return size

    async def shorten_dead_timeout(self, seconds: int) -> None:
        """Shorten the dead timeout, so that I/O without a link fails `seconds` after this, or after the link's death.

        It holds until the device is detached. What stands in the way is told in the journal.
        """
        if self._active.dead_timeout <= seconds:
            return
        try:
            reply = await self._ask("hasten", seconds=seconds)
        except (NotAttached, Busy):
            return  # Nothing waits, or it is on its way out.
        except NbddError as error:
            self._log.error("its dead timeout can't be shortened: %s", error)
            return
        self._active = replace(self._active, dead_timeout=int(reply["dead-timeout"]))
        self._note(definition=self._active)
        changes: dict[str, Any] = {"dead_timeout": self._active.dead_timeout}
        if self._status.fails_at and self._record is not None and self._record.binding is not None:
            changes["fails_at"] = self._end_of(self._record.binding.lost)
        self._set(**changes)

    async def statistics(self) -> dict[str, int]:
        """What the kernel counted since the device was attached; the keys are those of GetStatistics."""
        # Everyone may ask, as often as they like; the worker is asked once at a time.
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._ask("statistics"))
            self._counting.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        reply = await asyncio.shield(self._counting)
        return {str(key): int(value) for key, value in reply["statistics"].items()}

    def redefine(self, definition: Definition) -> None:
        """Take a changed definition: at once where the device is idle, else at its next attach, or attempt to."""
        self._definition = definition
        if not self._status.configured:
            # It is the configuration's from now on, and no longer that of whoever had attached it.
            self._set(configured=True, attached_by=0)
            self._note(configured=True, attached_by=0)
        if self._status.bound and self._is_elsewhere():
            self._log.warning("it stays attached from %s, which its definition does not name", self._status.uri)
        if not self.active:
            self._active = definition
            self._set(**self._told_by(definition))
        elif self._status.state is State.CONNECTING:
            self._kick.set()

    def disown(self) -> None:
        """The configuration no longer has it; it stays for as long as it is attached."""
        self._set(configured=False)
        self._note(configured=False)

    async def close(self) -> None:
        """Let go without detaching: the device stays in the kernel for a successor to adopt."""
        self._closed = True
        await self._stop_runner()
        await self._slot.stop()
        self._settle(WorkerFailed("nbdd is stopping."))
        self._slot.close_sockets()

    # The runner

    def _begin(self, definition: Definition, *, by: int) -> None:
        self._active = definition
        # With a record there may be a device under our name already, and somebody may use it.
        self._fresh = self._record is None
        self._clear(
            state=State.CONNECTING, last_error=self._status.last_error, attached_by=by, **self._told_by(definition)
        )
        self._run(self._attach_until_bound)

    def _run(self, first: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._closed:
            return
        self._kick.clear()
        self._runner = asyncio.create_task(self._hold(first), name=f"device {self.name}")

    async def _hold(self, first: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do `first`, then watch the worker and replace it, until the device is lost or detached."""
        try:
            await first()
            waits = backoff(0.01, 1.0)
            while True:
                since = time.monotonic()
                await self._watch()
                if time.monotonic() - since < STEADY:
                    await asyncio.sleep(next(waits))
                else:
                    waits = backoff(0.01, 1.0)
                await self._adopt()
        except NbddError as error:
            self._runner = None
            self._failed(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - a fault of ours must not leave a device that only looks alive
            self._log.exception("internal error")
            self._runner = None
            self._failed(NbddError(f"Internal error: {error}."))

    async def _stop_runner(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            # Not `await runner`: its being cancelled and ours could not be told apart.
            await asyncio.wait({runner})

    async def _attach_until_bound(self) -> None:
        """Attach; a device of boot keeps trying until the server answers, another tries once."""
        waits = backoff()
        deaths = 0
        while True:
            # With a record, a device under our name can only be what a worker, or a manager, bound before it died.
            resume = self._record is not None
            as_configured = self._active == self._definition
            self._kick.clear()
            try:
                await self._attempt("attach", definition=self._active.to_wire(), resume=resume)
                return
            except NbddError as error:
                died = isinstance(error, WorkerFailed)
                deaths = deaths + 1 if died else 0
                await self._slot.stop()
                if not resume and not died:
                    self._forget()
                if not self._persistent and not (died and deaths < ATTEMPTS):
                    await self._clean_up()
                    raise
                self._retrying(error)
                if not died:
                    self._settle(type(error)(f"{error} nbdd keeps trying, as the device has 'attach: boot'."))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(next(waits)):
                        await self._kick.wait()
                if as_configured and self._active != self._definition:
                    # It was changed by a reload, perhaps for the very fault that is in the way.
                    self._active = self._definition
                    self._set(**self._told_by(self._active))

    async def _clean_up(self) -> None:
        """After an attach in which workers died: what one of them may have bound goes, or else keeps its record."""
        if self._record is None:
            return
        try:
            await self._release(force=False, until=time.monotonic())
        except NbddError as error:
            self._log.warning("what was begun can't be cleaned up: %s", error)
        else:
            self._forget()

    @property
    def _persistent(self) -> bool:
        return self._active.attach is Attach.BOOT and self._status.configured

    def _retrying(self, error: NbddError) -> None:
        # A server that is away for hours is worth one line, not one every few seconds.
        known = told_of(error) == self._status.last_error
        self._log.log(logging.DEBUG if known else logging.WARNING, "%s Trying again.", error)
        self._set(last_error=told_of(error))

    async def _adopt(self) -> None:
        """Let a new worker take over the bound device; if the device is gone, boot devices attach anew."""
        waits = backoff(0.01)
        while True:
            record = self._record
            if record is None:
                raise NotAttached(f"{self.name!r} is not attached.")
            if record.binding is None:
                # Our predecessor ended while it attached the device: go on where it was.
                await self._attach_until_bound()
                return
            try:
                await self._attempt("adopt", definition=record.definition.to_wire(), binding=record.binding.to_wire())
                return
            except NotAttached as error:
                self._forget()
                self._slot.replace_sockets([])
                await self._slot.stop()
                if not self._persistent:
                    raise
                self._log.warning("%s Attaching it anew.", error)
                self._active = self._definition
                self._fresh = True
                self._clear(state=State.CONNECTING, last_error=told_of(error))
                await self._attach_until_bound()
                return
            except NbddError as error:
                # It may well be bound, and in use.
                self._retrying(error)
                await asyncio.sleep(next(waits))

    async def _watch(self) -> None:
        """Return when the worker has ended."""
        worker = self._slot.worker
        if worker is None:
            return
        ending = await self._slot.wait_ended()
        self._log.warning("worker %d %s; the device stays, a new worker adopts it", worker.pid, ending)

    async def _attempt(self, order: str, **arguments: Any) -> None:
        """Give a new worker its first order; on return the device is attached."""
        worker = await self._slot.respawn()
        if order == "attach":
            if self._record is None:
                # Nobody else's device may stand under our name, or the record would make it ours.
                await worker.request("look", deadline=ORDER_DEADLINE)
            # Before the kernel is asked: see records.py.
            self._keep(Record(self._active, self._status.configured, attached_by=self._status.attached_by))
        reply, fds = await worker.request_fds(
            order, deadline=ATTACH_DEADLINE, fds=self._slot.sockets if order == "adopt" else (), **arguments
        )
        self._slot.replace_sockets(fds)
        self._bound(Binding.from_wire(reply))

    # What happened

    def _event(self, message: Message, fds: list[int]) -> None:
        """Something the worker says unasked."""
        if message["event"] == "links" and self._slot.worker is not None:
            self._slot.replace_sockets(fds)
            self._links(message)
            return
        for fd in fds:
            os.close(fd)
        if message["event"] == "warning":
            self._log.warning("%s", message["message"])
        elif message["event"] == "info":
            self._log.info("%s", message["message"])

    def _links(self, message: Message) -> None:
        state = ConnectionState.from_wire(message)
        live, reconnects, uri = state.live, state.reconnects, state.uri
        changes: dict[str, Any] = {
            "live_connections": live, "reconnects": reconnects, "uri": uri, "size": state.size
        }  # fmt: skip
        changes["fails_at"] = self._fails_at(state.lost)
        if self._record is not None and self._record.binding is not None:
            self._note(binding=self._record.binding.with_state(state))
        if "error" in message:
            error = NbddError.from_wire(message)
            changes["last_error"] = told_of(error)
            # An attempt that fails like the one before it is not worth a line.
            if live < self._status.live_connections or changes["last_error"] != self._status.last_error:
                self._log.warning("%s", error)
        elif live < self._status.live_connections:
            # We ended them ourselves, as somebody asked for other ones; what went wrong before has no part in it.
            changes["last_error"] = ("", "")
        elif reconnects > self._status.reconnects:
            self._log.info("connected to %s again, %d of %d links", uri, live, self._status.connections)
        if self._status.bound:
            failed = state.failing or message.get("error") == ExportChanged.__name__
            changes["state"] = state_for(live, self._status.connections, failed=failed)
        self._set(**changes)

    def _bound(self, binding: Binding) -> None:
        since = self._record.attached_since if self._record is not None else 0
        told = {
            "state": state_for(binding.live, binding.connections),
            "uri": binding.uri,
            "node": binding.node,
            "size": binding.size,
            "block_size": binding.block_size,
            "read_only": binding.read_only,
            "connections": binding.connections,
            "live_connections": binding.live,
            "timeout": self._active.timeout,
            "dead_timeout": self._active.dead_timeout,
            "reconnects": binding.reconnects,
            "attached_since": since or time.time_ns() // 1000,
            "fails_at": self._fails_at(binding.lost),
            "last_error": ("", "") if binding.live >= binding.connections else self._status.last_error,
        }
        self._fresh = False
        # If this can't be written, the record of the attempt still stands, and a successor finds the device by name.
        self._note(binding=binding, definition=self._active, attached_since=told["attached_since"])
        self._slot.set_ready()
        self._set(**told)
        self._settle(None)

    def _failed(self, error: NbddError) -> None:
        """The device is not attached, and nothing more is tried."""
        self._log.error("%s", error)
        self._slot.drop()
        self._clear(state=State.FAILED, last_error=told_of(error))
        self._settle(error)

    def _detached(self) -> None:
        """The device is free, and the definition is what counts again."""
        self._forget()
        self._slot.drop()
        self._active = self._definition
        self._clear()

    def _not_detached(self, state: State, error: BaseException, *, bound: bool, fresh: bool) -> None:
        """The device may still be there. If it is in use it wants looking after, even if whoever asked has gone."""
        told = self._status.last_error
        if isinstance(error, Busy):
            # No fault of the device's: who asked for it is told, and the journal.
            self._log.warning("not detached: %s", error)
        elif isinstance(error, NbddError):
            told = told_of(error)
        over = fresh and not isinstance(error, Busy)
        if self._record is None or over or not (bound or state is State.CONNECTING):
            self._settle(NotAttached(f"Attaching {self.name!r} was ended by a detach."))
            self._slot.drop()
            self._clear(state=State.FAILED, last_error=told)
            return
        if not isinstance(error, NbddError):
            # The worker may be in the middle of the detach. Its successor sees what came of it.
            self._slot.kill()
        live = self._status.live_connections
        back = state_for(live, self._status.connections) if state.bound else state
        self._set(state=back, last_error=told)
        self._run(self._watch if self._slot.is_ready else self._adopt)

    # Tools

    async def _release(self, *, force: bool, until: float) -> None:
        """Have a worker free the kernel's device; `until`, monotonic, is when to stop waiting for its users."""
        deaths = 0
        while True:
            record = self._record
            if record is None:
                return
            try:
                if self._closed:
                    raise WorkerFailed("nbdd is stopping.")
                worker = await self._slot.ensure()
                await worker.request(
                    "detach",
                    deadline=ORDER_DEADLINE,
                    fds=self._slot.sockets,
                    definition=record.definition.to_wire(),
                    binding=None if record.binding is None else record.binding.to_wire(),
                    force=force,
                )
            except Busy:
                if time.monotonic() >= until:
                    raise
                whole = self._status.live_connections >= self._status.connections
                pause = WAIT_INTERVAL if whole else MEND_INTERVAL
                await asyncio.sleep(min(pause, max(0, until - time.monotonic())))
            except WorkerFailed:
                deaths += 1
                if deaths >= ATTEMPTS:
                    raise
            else:
                return

    async def _ask(self, order: str, **arguments: Any) -> Message:
        """Put an order to the worker of the attached device; if that dies, to its successor."""
        deaths = 0
        while True:
            worker = await self._bound_worker()
            try:
                return await worker.request(order, deadline=ORDER_DEADLINE, **arguments)
            except WorkerFailed:
                deaths += 1
                if deaths >= ATTEMPTS:
                    raise

    async def _bound_worker(self) -> WorkerProcess:
        """The worker of the attached device, or its successor, which may still be adopting."""
        # Being taken up after a restart of ours, it is attached already to all others.
        adopted = (
            self._status.state is State.CONNECTING and self._record is not None and self._record.binding is not None
        )
        worker = await self._slot.wait_ready(READY_DEADLINE if self._status.bound or adopted else 0)
        if self._status.state is State.DETACHING:
            raise Busy(f"{self.name!r} is being detached; try again in a moment.")
        if not self._status.bound:
            raise NotAttached(f"{self.name!r} is not attached.")
        if worker is None:
            raise WorkerFailed(f"{self.name!r} has no worker at the moment; try again.")
        return worker

    def _is_elsewhere(self) -> bool:
        """Whether it is attached from none of the servers of its definition, which has changed meanwhile."""
        return not {*self._definition.uri} & {*self._active.uri}

    def _fails_at(self, lost: float) -> int:
        """When I/O that waits since `lost` begins to fail, microseconds since 1970; 0 while it does not wait."""
        if not lost:
            return 0
        known = self._record.binding if self._record is not None else None
        if self._status.fails_at and known is not None and known.lost == lost:
            # Nothing new; worked out again it would be another microsecond, and a signal to everybody.
            return self._status.fails_at
        return self._end_of(lost)

    def _end_of(self, lost: float) -> int:
        """When I/O fails that waits since `lost`, monotonic; microseconds since 1970."""
        left = lost + self._active.dead_timeout - time.monotonic()
        return int((time.time() + left) * 1e6)

    def _keep(self, record: Record) -> None:
        self._records.write(record)
        self._record = record

    def _note(self, **changes: Any) -> None:
        """Bring the record up to date; what was done is done, even if that can't be written."""
        if self._record is None:
            return
        self._record = replace(self._record, **changes)
        try:
            self._records.write(self._record)
        except NbddError as error:
            self._log.error("%s", error)

    def _forget(self) -> None:
        self._record = None
        self._records.remove(self.name)

    def _settle(self, error: NbddError | None) -> None:
        """Tell those who wait in `attach` how the attempt went."""
        if self._outcome is None or self._outcome.done():
            return
        if error is None:
            self._outcome.set_result(None)
        else:
            self._outcome.set_exception(error)
            self._outcome.exception()  # fetched, in case nobody waits any more

    def _told_by(self, definition: Definition) -> dict[str, Any]:
        return {
            "uri": str(definition.uri[0]),
            "uris": tuple(map(str, definition.uri)),
            "read_only": bool(definition.read_only),
            "timeout": definition.timeout,
            "dead_timeout": definition.dead_timeout,
            "connections": definition.connections,
            "desktop": definition.desktop is not None,
            "display_name": definition.desktop.name if definition.desktop is not None else "",
            "icon_name": definition.desktop.icon if definition.desktop is not None else "",
        }

    def _idle_status(self, configured: bool) -> Status:
        return Status(name=self.name, state=State.DETACHED, configured=configured, **self._told_by(self._definition))

    def _clear(self, **told: Any) -> None:
        """Set all that is told to what an idle device tells, but for what is given."""
        idle = replace(self._idle_status(self._status.configured), **told)
        self._set(**{field: getattr(idle, field) for field in Status.__slots__})

    def _set(self, **changes: Any) -> None:
        """Change the status: the one place where it happens, where it is logged and where it is told."""
        old = self._status
        new = replace(old, **changes)
        if new == old:
            return
        self._status = new
        if new.state is not old.state:
            where = f" ({new.node}, {new.uri})" if new.node else ""
            self._log.info("%s -> %s%s", old.state, new.state, where)
        self._on_change(self, old)
