# SPDX-License-Identifier: MIT
"""Slot for the current worker of a device.

Keeps duplicates of the connection sockets, so that the next worker can take over; systemd's descriptor store keeps the
same for the next manager. The slot knows nothing of what a worker does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from nbdd.errors import WorkerFailed
from nbdd.ipc.channel import Message
from nbdd.manager.supervisor import Ending, WorkerProcess
from nbdd.system.journal import DeviceLog

log = logging.getLogger(__name__)

KeepSockets = Callable[[str, Sequence[int]], None]
"""Stores duplicates of a device's sockets for a successor of this process; an empty list removes them."""


class Spawner(Protocol):
    """The part of the supervisor that a device needs."""

    def spawn(self, name: str, on_event: Callable[[Message, list[int]], None]) -> Coroutine[Any, Any, WorkerProcess]:
        """See `Supervisor.spawn`."""


class WorkerSlot:
    """Empty, occupied, or ready: occupied by a worker that has attached or adopted the device and takes orders."""

    def __init__(
        self,
        name: str,
        spawner: Spawner,
        keep_sockets: KeepSockets,
        *,
        on_event: Callable[[Message, list[int]], None],
        on_worker: Callable[[int], None],
    ) -> None:
        """`on_event` gets what a worker sends unasked, `on_worker` each new worker's process id, 0 for none."""
        self._log = DeviceLog(log, name)
        self._name = name
        self._spawner = spawner
        self._keep_sockets = keep_sockets
        self._on_event = on_event
        self._on_worker = on_worker
        self._worker: WorkerProcess | None = None
        self._ready = asyncio.Event()
        self._sockets: list[int] = []
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether no worker is started any more, as the process is stopping."""
        return self._closed

    @property
    def worker(self) -> WorkerProcess | None:
        """The current worker, which may have ended a moment ago."""
        return self._worker

    @property
    def is_ready(self) -> bool:
        """Whether a worker takes orders for the device."""
        return self._alive() and self._ready.is_set()

    @property
    def sockets(self) -> tuple[int, ...]:
        """The descriptors of the device's connections."""
        return tuple(self._sockets)

    # The worker

    async def respawn(self) -> WorkerProcess:
        """Start a new worker in place of the current one, which is ended. Raises WorkerFailed if that fails."""
        await self.stop()
        self._worker = worker = await self._spawner.spawn(self._name, self._on_event)
        self._log.debug("worker %d started", worker.pid)
        self._on_worker(worker.pid)
        return worker

    async def ensure(self) -> WorkerProcess:
        """Return the current worker, or a new one, which has not adopted the device. Raises WorkerFailed."""
        if self._closed:
            raise WorkerFailed("nbdd is stopping.")
        if self._worker is not None and self._alive():
            return self._worker
        return await self.respawn()

    def set_ready(self) -> None:
        """The worker has attached or adopted the device."""
        self._ready.set()

    async def wait_ready(self, seconds: float) -> WorkerProcess | None:
        """Return the worker that takes orders, waiting for it at most `seconds`; None if there is none by then."""
        if not self._alive():
            # It ended, and `wait_ended` has not returned yet.
            self._ready.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ready.wait()
        return self._worker if self._ready.is_set() else None

    async def wait_ended(self) -> Ending | None:
        """Wait until the worker ends, and return how; None if there is no worker."""
        worker = self._worker
        if worker is None:
            return None
        ending = await asyncio.shield(worker.ended)
        self._ready.clear()
        self._worker = None
        self._on_worker(0)
        return ending

    async def stop(self) -> None:
        """End the worker and wait until it has ended."""
        self._ready.clear()
        worker, self._worker = self._worker, None
        if worker is not None:
            ending = await worker.close()
            self._log.debug("worker %d stopped: it %s", worker.pid, ending)
            self._on_worker(0)

    def close(self) -> None:
        """Start no worker from now on; the current one is left to `stop`."""
        self._closed = True

    def kill(self) -> None:
        """Kill the worker, whatever it is doing; it stays in the slot until it has ended."""
        self._ready.clear()
        if self._worker is not None:
            self._worker.kill()

    def drop(self) -> None:
        """Kill the worker without waiting for its end, and give up the sockets: no worker is needed any more."""
        self.kill()
        self._worker = None
        self.replace_sockets([])

    def _alive(self) -> bool:
        return self._worker is not None and not self._worker.ended.done()

    # The sockets

    def inherit_sockets(self, fds: list[int]) -> None:
        """Take over the sockets that a predecessor of this process left; systemd has them already."""
        self._sockets = fds

    def replace_sockets(self, fds: list[int]) -> None:
        """Close the sockets held so far, take these instead, and have systemd keep duplicates of them."""
        self.close_sockets()
        self._sockets = fds
        self._keep_sockets(self._name, fds)

    def close_sockets(self) -> None:
        """Close our duplicates; those of systemd stay."""
        while self._sockets:
            os.close(self._sockets.pop())
