# SPDX-License-Identifier: MIT
"""The post of a device's worker: one holds it at a time, and what he leaves is there for the next.

What he leaves are duplicates of the device's links, for the next worker to watch; systemd keeps them for the next
manager's. Knows nothing of what a worker is there for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from nbdd.ipc.channel import Message
from nbdd.manager.supervisor import Ending, WorkerProcess

KeepSockets = Callable[[str, Sequence[int]], None]
"""Puts duplicates of a device's links where a successor of this process finds them; an empty list takes them away."""


class Spawner(Protocol):
    """The part of the supervisor that a device needs."""

    def spawn(self, name: str, on_event: Callable[[Message, list[int]], None]) -> Coroutine[Any, Any, WorkerProcess]:
        """See `Supervisor.spawn`."""


class Post:
    """Vacant, filled, or open: filled by a worker who has the device in hand and takes orders for it."""

    def __init__(
        self,
        name: str,
        spawner: Spawner,
        keep_sockets: KeepSockets,
        *,
        on_event: Callable[[Message, list[int]], None],
        on_holder: Callable[[int], None],
    ) -> None:
        """`on_holder` is called with the process id of who holds the post now; 0 is nobody."""
        self._name = name
        self._spawner = spawner
        self._keep_sockets = keep_sockets
        self._on_event = on_event
        self._on_holder = on_holder
        self._holder: WorkerProcess | None = None
        self._open = asyncio.Event()
        self._links: list[int] = []

    @property
    def holder(self) -> WorkerProcess | None:
        """Who holds the post; he may have ended a moment ago."""
        return self._holder

    @property
    def is_open(self) -> bool:
        """Whether somebody takes orders for the device."""
        return self._alive() and self._open.is_set()

    @property
    def links(self) -> tuple[int, ...]:
        """The descriptors of the device's links."""
        return tuple(self._links)

    # Who holds it

    async def fill(self) -> WorkerProcess:
        """Put a new worker in the place of whoever is there."""
        await self.vacate()
        self._holder = worker = await self._spawner.spawn(self._name, self._on_event)
        self._on_holder(worker.pid)
        return worker

    async def filled(self) -> WorkerProcess:
        """The worker who is there, or a new one, who has nothing in hand."""
        if self._holder is not None and self._alive():
            return self._holder
        return await self.fill()

    def open(self) -> None:
        """The worker has the device in hand."""
        self._open.set()

    async def manned(self, seconds: float) -> WorkerProcess | None:
        """The worker who has the device in hand, waiting so long for a successor who takes it up; None is nobody."""
        if not self._alive():
            # He ended, and nobody has looked yet.
            self._open.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._open.wait()
        return self._holder if self._open.is_set() else None

    async def left(self) -> Ending | None:
        """Wait until the worker ends, and say how; None where there is none."""
        worker = self._holder
        if worker is None:
            return None
        ending = await asyncio.shield(worker.ended)
        self._open.clear()
        self._holder = None
        self._on_holder(0)
        return ending

    async def vacate(self) -> None:
        """End the worker, and wait until he has."""
        self._open.clear()
        worker, self._holder = self._holder, None
        if worker is not None:
            await worker.close()
            self._on_holder(0)

    def dismiss(self) -> None:
        """End the worker in the middle of whatever he does; the post is his until he has."""
        self._open.clear()
        if self._holder is not None:
            self._holder.kill()

    def abandon(self) -> None:
        """Nobody looks after the device any more, and its links are let go."""
        self.dismiss()
        self._holder = None
        self.take_links([])

    def _alive(self) -> bool:
        return self._holder is not None and not self._holder.ended.done()

    # What he leaves

    def inherit(self, links: list[int]) -> None:
        """Take the links that a predecessor of this process kept; they are with systemd already."""
        self._links = links

    def take_links(self, links: list[int]) -> None:
        """Take these links instead of those that were here, and have them kept."""
        self.close_links()
        self._links = links
        self._keep_sockets(self._name, links)

    def close_links(self) -> None:
        """Close our duplicates; what systemd keeps stays."""
        while self._links:
            os.close(self._links.pop())
