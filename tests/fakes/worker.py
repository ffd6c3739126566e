# SPDX-License-Identifier: MIT
"""Workers without processes, and a kernel without devices: what a Device needs to be led through all its states."""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from nbdd.config.definition import Definition
from nbdd.errors import Busy, ConnectFailed, NbddError, NotAttached, WorkerFailed
from nbdd.ipc.channel import Message
from nbdd.manager.device import Device
from nbdd.manager.records import Record, Records
from nbdd.manager.status import State, Status
from nbdd.manager.supervisor import Ending, How, WorkerProcess
from nbdd.protocol import Export, Flags
from nbdd.uri import URI
from nbdd.worker.binding import Binding

DEADLINE = 30.0
"""Seconds after which a test gives up on something that takes a moment."""

T = TypeVar("T")

DOWN = ConnectFailed("storage.example refuses.")
CRASH = Ending(How.SIGNAL, 9)

OnEvent = Callable[[Message, list[int]], None]

EXPORT = Export("disk", 1 << 20, Flags.NBD_FLAG_HAS_FLAGS).to_wire()


def open_fds() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def definition(name: str = "disk", uri: str = "nbd://storage.example/disk", **fields: Any) -> Definition:
    return Definition(name, (URI.parse(uri),), **fields)


def as_json(message: Message) -> Message:
    """A message as it comes out of the channel at the other side."""
    received: Message = json.loads(json.dumps(message))
    return received


class FakeWorker:
    """A worker process as `WorkerProcess` shows it. What it does is done by the fake kernel, in a task of its own."""

    def __init__(self, spawner: FakeSpawner, name: str, pid: int, on_event: OnEvent) -> None:
        self.name = name
        self.pid = pid
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.on_event = on_event
        self.client = False
        """Whether it has bound or adopted the device."""
        self._spawner = spawner
        self._work: set[asyncio.Task[Any]] = set()

    async def request(self, order: str, *, deadline: float, fds: tuple[int, ...] = (), **arguments: Any) -> Message:
        reply, returned = await self.request_fds(order, deadline=deadline, fds=fds, **arguments)
        for fd in returned:
            os.close(fd)
        return reply

    async def request_fds(
        self, order: str, *, deadline: float, fds: tuple[int, ...] = (), **arguments: Any
    ) -> tuple[Message, list[int]]:
        assert deadline > 0
        if self.ended.done():
            raise WorkerFailed(f"The worker of {self.name!r} {self.ended.result()}.")
        work = asyncio.create_task(self._spawner.work(self, order, as_json(arguments), fds))
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        # The process goes on when whoever asked is cancelled, and ends when it is killed.
        either: set[asyncio.Future[Any]] = {work, self.ended}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            work.add_done_callback(_unheard)
            raise
        if not work.done() or work.cancelled():
            raise WorkerFailed(f"The worker of {self.name!r} {self.ended.result()}.")
        return work.result()

    def kill(self, how: How | None = None) -> None:
        ending = Ending(how) if how else Ending(How.SIGNAL, 9)
        asyncio.get_running_loop().call_soon(self.end, ending)

    async def close(self) -> Ending:
        self.kill()
        return await asyncio.shield(self.ended)

    def end(self, ending: Ending) -> None:
        """The process is gone."""
        if not self.ended.done():
            self.ended.set_result(ending)
            for work in self._work:
                work.cancel()

    def say(self, event: str, fds: Sequence[int] = (), **fields: Any) -> None:
        told = {"size": 1 << 20, "export": EXPORT} if event == "connections" else {}
        self.on_event(as_json({"event": event, **told, **fields}), list(fds))


def _unheard(work: asyncio.Task[tuple[Message, list[int]]]) -> None:
    """A reply that nobody waits for any more."""
    if not work.cancelled() and work.exception() is None:
        for fd in work.result()[1]:
            os.close(fd)


class FakeSpawner:
    """The supervisor, and the kernel behind its workers.

    An order waits for the event `before[order]`, then does what `outcomes[order]` holds next ("die", an error to
    raise, or nothing special), then waits for `after[order]`, then replies.
    """

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.orders: list[tuple[str, dict[str, Any]]] = []
        self.bound: dict[str, int] = {}
        """Device name to index: what the kernel has."""
        self.foreign: set[str] = set()
        """Names under which somebody else has bound a device."""
        self.used: set[str] = set()
        """Devices that somebody has open."""
        self.mounted: set[str] = set()
        """Devices that somebody was quick to mount."""
        self.connections = 1
        self.exports: dict[str, str] = {}
        """Device name to the export on the server, where they differ."""
        self.waited = 0
        """Seconds that I/O has waited, as a worker sees it."""
        self.before: dict[str, asyncio.Event] = {}
        self.after: dict[str, asyncio.Event] = {}
        self.outcomes: dict[str, list[NbddError | str]] = defaultdict(list)
        self.spawn_outcomes: list[NbddError] = []
        self.arrived: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        """Set when a worker got such an order."""
        self.acted: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        """Set when the kernel did what such an order asks for."""
        self.given: dict[str, tuple[int, ...]] = {}
        """How many descriptors came with the last such order."""

    async def spawn(self, name: str, on_event: OnEvent) -> WorkerProcess:
        await asyncio.sleep(0)
        if self.spawn_outcomes:
            raise self.spawn_outcomes.pop(0)
        worker = FakeWorker(self, name, 1000 + len(self.workers), on_event)
        self.workers.append(worker)
        return cast(WorkerProcess, worker)

    async def close(self) -> None:
        for worker in self.workers:
            await worker.close()

    @property
    def worker(self) -> FakeWorker:
        """The newest."""
        return self.workers[-1]

    @property
    def living(self) -> list[FakeWorker]:
        return [worker for worker in self.workers if not worker.ended.done()]

    def names(self) -> list[str]:
        """The orders given so far."""
        return [order for order, _ in self.orders]

    async def work(
        self, worker: FakeWorker, order: str, arguments: dict[str, Any], fds: tuple[int, ...]
    ) -> tuple[Message, list[int]]:
        if order == "look":
            if worker.name in self.foreign:
                raise Busy(f"{worker.name!r} is somebody else's.")
            return {}, []
        self.orders.append((order, arguments))
        self.given[order] = fds
        self.arrived[order].set()
        if order in self.before:
            await self.before[order].wait()
        outcome = self.outcomes[order].pop(0) if self.outcomes[order] else None
        if isinstance(outcome, NbddError):
            raise outcome
        if outcome == "die":
            await self._die(worker)
        reply: Message = getattr(self, "_" + order.replace("-", "_"))(worker, arguments)
        self.acted[order].set()
        if outcome == "die late":
            await self._die(worker)
        if order in self.after:
            await self.after[order].wait()
        sockets: list[int] = []
        if order in ("attach", "adopt"):
            sockets = [os.open("/dev/null", os.O_RDONLY) for _ in range(reply["live"])]
        return as_json(reply), sockets

    async def _die(self, worker: FakeWorker) -> None:
        worker.kill()
        await asyncio.Event().wait()

    def _attach(self, worker: FakeWorker, arguments: dict[str, Any]) -> Message:
        name = worker.name
        if name in self.bound and not arguments["resume"]:
            raise Busy(f"/dev/nbd{self.bound[name]} is bound under the name {name!r} already, not by this nbdd.")
        self.bound.setdefault(name, len(self.bound))
        worker.client = True
        return self._binding(name)

    def _adopt(self, worker: FakeWorker, arguments: dict[str, Any]) -> Message:
        if self.bound.get(worker.name) != arguments["binding"]["index"]:
            raise NotAttached(f"/dev/nbd{arguments['binding']['index']} is not bound any more.")
        worker.client = True
        return self._binding(worker.name)

    def _detach(self, worker: FakeWorker, arguments: dict[str, Any]) -> Message:
        # Without notes the attach was not over, and those who merely look at the device do not count.
        users = self.used if arguments["binding"] else self.mounted
        if worker.name in self.bound and worker.name in users and not arguments["force"]:
            raise Busy(f"/dev/nbd{self.bound[worker.name]} is mounted on /mnt.")
        self.bound.pop(worker.name, None)
        worker.client = False
        return {}

    def _set_timeout(self, worker: FakeWorker, _arguments: dict[str, Any]) -> Message:
        if not worker.client:
            raise NotAttached(f"{worker.name!r} is not attached.")
        return {}

    def _reconnect(self, worker: FakeWorker, _arguments: dict[str, Any]) -> Message:
        return self._set_timeout(worker, {})

    def _resize(self, worker: FakeWorker, _arguments: dict[str, Any]) -> Message:
        grown = {"size": 3 << 20, "export": {**EXPORT, "size": 3 << 20}, "uri": "nbd://storage.example/disk"}
        fds = [os.open("/dev/null", os.O_RDONLY)]
        worker.say("connections", fds, live=1, reconnects=1, lost=0, failing=False, **grown)
        return {"size": 3 << 20}

    def _shorten_dead_timeout(self, worker: FakeWorker, arguments: dict[str, Any]) -> Message:
        if not worker.client:
            raise NotAttached(f"{worker.name!r} is not attached.")
        return {"dead-timeout": self.waited + arguments["seconds"]}

    def _statistics(self, worker: FakeWorker, _arguments: dict[str, Any]) -> Message:
        if not worker.client:
            raise NotAttached(f"{worker.name!r} is not attached.")
        return {"statistics": {"reads": 7}}

    def _list_exports(self, worker: FakeWorker, _arguments: dict[str, Any]) -> Message:
        for name in ("one", "two"):
            worker.say("exports", exports=[Export(name, 1 << 20, Flags.NBD_FLAG_HAS_FLAGS).to_wire()])
        return {}

    def _binding(self, name: str) -> Message:
        return {
            "index": self.bound[name],
            "node": f"/dev/nbd{self.bound[name]}",
            "diskseq": 7,
            "uri": f"nbd://storage.example/{self.exports.get(name, name)}",
            "size": 1 << 20,
            "block-size": 512,
            "read-only": False,
            "connections": self.connections,
            "live": self.connections,
            "reconnects": 0,
            "export": EXPORT,
        }


class Bench:
    """One device, its fake surroundings, and what it told. `tmp_path/run` holds the records."""

    def __init__(self, tmp_path: Path, *, configured: bool = True, **fields: Any) -> None:
        self.spawner = FakeSpawner()
        self.records = Records(tmp_path / "run")
        self.kept: dict[str, list[int]] = {}
        self.told: list[Status] = []
        self._changed = asyncio.Event()
        self.device = Device(
            definition(**fields),
            configured=configured,
            supervisor=self.spawner,
            records=self.records,
            keep_sockets=self._keep,
            on_change=self._on_change,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.device.close()
        await self.spawner.close()

    def _keep(self, name: str, fds: Sequence[int]) -> None:
        self.kept[name] = list(fds)

    def _on_change(self, device: Device, _old: Status) -> None:
        self.told.append(device.status)
        self._changed.set()

    def now(self) -> State:
        return self.device.status.state

    @property
    def states(self) -> list[State]:
        """Every state so far, in order."""
        found = [State.DETACHED]
        for status in self.told:
            if status.state is not found[-1]:
                found.append(status.state)
        return found

    async def until(self, wanted: Callable[[Status], bool]) -> None:
        """Return as soon as the status is as wanted."""
        while not wanted(self.device.status):
            self._changed.clear()
            await self._changed.wait()

    async def reach(self, state: State) -> None:
        await self.until(lambda status: status.state is state)

    async def managed(self) -> None:
        """Return when a worker looks after the attached device."""
        await self.until(
            lambda status: (
                status.state in (State.ATTACHED, State.DEGRADED, State.RECONNECTING) and status.worker_pid != 0
            )
        )
        await self.device.statistics()


MakeBench = Callable[..., Bench]


def record_of(it: Bench, **changes: Any) -> Record:
    """The record of a device that the previous instance has bound."""
    it.spawner.bound["disk"] = 0
    binding = Binding.from_wire(it.spawner._binding("disk"))
    return replace(Record(it.device.definition, configured=True, binding=binding, attached_since=5), **changes)


def task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(work)
