# SPDX-License-Identifier: MIT
"""Workers as the manager sees them: spawned from the fork server, spoken to, watched, ended.

A worker is one class with one way in (`Supervisor.spawn`) and one way out (`WorkerProcess._end`), whatever killed it.
Every outcome of a worker's life is one `Ending`:

    exit      it returned by itself, with an exit code
    signal    somebody killed it
    hang      it did not answer in time and was killed by us
    orphaned  its fork server died; it was killed by us, and a new fork server started
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nbdd.channel import Channel, ChannelError, Message
from nbdd.errors import NbddError, WorkerFailed

log = logging.getLogger(__name__)

PING_INTERVAL = 10.0
"""Seconds between two questions to a worker that has nothing else to do."""

PING_DEADLINE = 10.0
"""Seconds a worker may take to answer one; then it hangs."""

SPAWN_DEADLINE = 10.0
"""Seconds a fork may take."""


class How(StrEnum):
    """How a worker ended."""

    EXIT = "exit"
    SIGNAL = "signal"
    HANG = "hang"
    ORPHANED = "orphaned"


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of one worker; `code` is an exit code or a signal's number, by `how`."""

    how: How
    code: int = 0

    def __str__(self) -> str:
        match self.how:
            case How.EXIT:
                return f"exited with code {self.code}"
            case How.SIGNAL:
                return f"was killed by {_signal_name(self.code)}"
            case How.HANG:
                return "did not answer and was killed"
            case _:
                return "lost its fork server and was killed"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def backoff(first: float = 0.1, most: float = 5.0) -> Iterator[float]:
    """Endless waits in seconds: doubling from `first` to `most`, each with up to a quarter of jitter."""
    wait = first
    while True:
        yield wait * random.uniform(0.75, 1.0)  # noqa: S311 - spreads retries, guards nothing
        wait = min(wait * 2, most)


class WorkerProcess:
    """One running worker. `request` asks it something, `ended` is done when it is gone."""

    def __init__(self, name: str, pid: int, channel: Channel, on_event: Callable[[Message, list[int]], None]) -> None:
        self.name = name
        self.pid = pid
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._channel = channel
        self._on_event = on_event
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._reply_fds: dict[int, list[int]] = {}
        self._next_id = 0
        self._killed_as: How | None = None
        # A descriptor for the process, not its number: a kill can never hit a stranger that got the number later.
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel.fileno(), self._readable)
        self._heartbeat = asyncio.create_task(self._beat())

    async def request(self, order: str, *, deadline: float, **arguments: Any) -> Message:
        """Give an order and return the reply; `deadline` in seconds, after which the worker counts as hung.

        Raises the error that the worker met, or WorkerFailed if it ended first.
        """
        reply, fds = await self.request_fds(order, deadline=deadline, **arguments)
        for fd in fds:
            os.close(fd)
        return reply

    async def request_fds(
        self, order: str, *, deadline: float, fds: tuple[int, ...] = (), **arguments: Any
    ) -> tuple[Message, list[int]]:
        """As `request`, with descriptors for the worker, and those of the reply, which are the caller's to close."""
        if self.ended.done():
            raise WorkerFailed(f"The worker of {self.name!r} {self.ended.result()}.")
        self._next_id += 1
        number = self._next_id
        future = self._replies[number] = self._loop.create_future()
        try:
            self._channel.send({"order": order, "id": number, **arguments}, fds)
        except BlockingIOError:
            # Some hundred kilobytes of orders unread: nobody is at home.
            self.kill(How.HANG)
        except OSError:
            pass  # It is ending; _end resolves the future.
        try:
            async with asyncio.timeout(deadline):
                reply = await future
        except TimeoutError:
            self.kill(How.HANG)
            raise WorkerFailed(f"The worker of {self.name!r} did not finish {order!r} in {deadline:g} s.") from None
        finally:
            self._replies.pop(number, None)
            fds_back = self._reply_fds.pop(number, [])
        if "error" in reply:
            raise NbddError.from_wire(reply)
        return reply, fds_back

    def kill(self, how: How | None = None) -> None:
        """Kill the process at once; costs no I/O, the kernel keeps the device. `how` is told as its ending."""
        if self.ended.done():
            return
        self._killed_as = self._killed_as or how
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def close(self) -> Ending:
        """End the worker and wait until it is reaped. An attached device stays attached."""
        self.kill()
        return await asyncio.shield(self.ended)

    def _end(self, how: How, code: int = 0) -> None:
        """The one way out: called once by the supervisor when the process is gone."""
        if self.ended.done():
            return
        self._readable()  # what it still had to say
        self._heartbeat.cancel()
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        os.close(self._pidfd)
        ending = Ending(self._killed_as or how, code)
        self.ended.set_result(ending)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(WorkerFailed(f"The worker of {self.name!r} {ending}."))
                # Whoever asked may have been cancelled; an exception nobody fetches is then no news.
                future.exception()

    def _readable(self) -> None:
        try:
            while self._channel.receive():
                while (found := self._channel.pop()) is not None:
                    self._handle(*found)
        except BlockingIOError:
            return
        except (ChannelError, OSError) as error:
            log.warning("%s: worker %d broke its channel: %s", self.name, self.pid, error)
        # End of the stream: the process is on its way out, and the fork server will tell how it went.
        # Its own exit code, if it has one by now, survives the signal.
        self._loop.remove_reader(self._channel.fileno())
        self.kill()

    def _handle(self, message: Message, fds: list[int]) -> None:
        future = self._replies.get(message.get("id", 0))
        if future is not None and not future.done():
            self._reply_fds[message["id"]] = fds
            future.set_result(message)
        elif "event" in message:
            self._on_event(message, fds)
        else:
            for fd in fds:
                os.close(fd)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(PING_INTERVAL)
            if not self._replies:
                with contextlib.suppress(NbddError):
                    await self.request("ping", deadline=PING_DEADLINE)


class Supervisor:
    """Owns the fork server and every worker."""

    def __init__(self) -> None:
        self._workers: dict[int, WorkerProcess] = {}
        self._spawning: dict[int, asyncio.Future[int]] = {}
        # A worker may end before its spawner runs again: None while it lives, its code once it does not.
        self._unclaimed: dict[int, int | None] = {}
        self._next_id = 0
        self._server: asyncio.subprocess.Process | None = None
        self._control: Channel | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    @property
    def server_pid(self) -> int:
        """The fork server's process id; 0 while there is none."""
        return self._server.pid if self._server else 0

    async def start(self) -> None:
        """Start the fork server, if it does not run."""
        async with self._starting:
            if self._control is not None:
                return
            ours, theirs = Channel.pair()
            with theirs:
                # -S: site-packages' start-up files would only cost memory; the package is found by PYTHONPATH.
                self._server = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-S",
                    "-m",
                    "nbdd.forkserver",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
                )
            ours.setblocking(False)
            self._control = Channel(ours)
            asyncio.get_running_loop().add_reader(ours.fileno(), self._readable, self._control)

    async def spawn(self, name: str, on_event: Callable[[Message, list[int]], None]) -> WorkerProcess:
        """Fork a worker for the device `name`; `on_event` gets what it says unasked, with its descriptors.

        Raises WorkerFailed when no process can be had.
        """
        if self._closed:
            raise WorkerFailed("nbdd is stopping.")
        await self.start()
        control = self._control
        assert control is not None  # noqa: S101 - start() returned
        self._next_id += 1
        number = self._next_id
        future = self._spawning[number] = asyncio.get_running_loop().create_future()
        ours, theirs = Channel.pair()
        ours.setblocking(False)
        channel = Channel(ours)
        try:
            with theirs:
                control.send({"order": "spawn", "id": number, "name": name}, [theirs.fileno()])
            async with asyncio.timeout(SPAWN_DEADLINE):
                pid = await future
            code = self._unclaimed.pop(pid, None)
            worker = WorkerProcess(name, pid, channel, on_event)
        except OSError as error:  # TimeoutError is one
            channel.close()
            self._stop_server()
            raise WorkerFailed(
                f"No worker could be started for {name!r}: {error.strerror or 'the fork server does not answer'}."
            ) from None
        except BaseException:
            # Refused, or whoever wanted it no longer does: the closed channel ends a worker that was forked.
            channel.close()
            raise
        finally:
            self._spawning.pop(number, None)
            if future.done() and not future.cancelled() and future.exception() is None:
                self._unclaimed.pop(future.result(), None)
        self._workers[pid] = worker
        if control is not self._control:
            self._orphan(worker)
        elif code is not None:
            self._finish(pid, code)
        return worker

    async def close(self) -> None:
        """End every worker and the fork server; the kernel keeps the devices."""
        self._closed = True
        await asyncio.gather(*(worker.close() for worker in list(self._workers.values())))
        self._stop_server()
        if self._server is not None:
            await self._server.wait()

    def _readable(self, control: Channel) -> None:
        try:
            while control.receive():
                while (found := control.pop()) is not None:
                    self._handle(found[0])
        except BlockingIOError:
            return
        except (ChannelError, OSError) as error:
            log.warning("fork server: %s", error)
        self._server_gone(control)

    def _handle(self, message: Message) -> None:
        match message["event"]:
            case "ended":
                pid = message["pid"]
                if pid in self._workers:
                    self._finish(pid, message["code"])
                elif pid in self._unclaimed:
                    self._unclaimed[pid] = message["code"]
            case "spawned":
                future = self._spawning.get(message["id"])
                if future is not None and not future.done():
                    self._unclaimed[message["pid"]] = None
                    future.set_result(message["pid"])
                # A worker whose pid nobody awaits any more ends by itself, at the end of its channel.
            case "refused":
                future = self._spawning.get(message["id"])
                if future is not None and not future.done():
                    future.set_exception(WorkerFailed(f"No worker could be started: {message['message']}."))

    def _finish(self, pid: int, code: int) -> None:
        worker = self._workers.pop(pid)
        if code < 0:
            worker._end(How.SIGNAL, -code)  # noqa: SLF001 - the supervisor is the one who may
        else:
            worker._end(How.EXIT, code)  # noqa: SLF001

    def _stop_server(self) -> None:
        if self._control is not None:
            self._server_gone(self._control)

    def _server_gone(self, control: Channel) -> None:
        """Every worker is orphaned: end them all; the next spawn starts a new fork server and adopts."""
        if control is not self._control:
            return
        asyncio.get_running_loop().remove_reader(control.fileno())
        control.close()
        self._control = None
        if self._server is not None and self._server.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._server.kill()
        if not self._closed:
            log.error("the fork server ended; starting a new one, the devices stay attached")
        self._unclaimed.clear()
        for future in self._spawning.values():
            if not future.done():
                future.set_exception(WorkerFailed("The fork server ended."))
        for worker in list(self._workers.values()):
            self._orphan(worker)

    def _orphan(self, worker: WorkerProcess) -> None:
        del self._workers[worker.pid]
        worker.kill(How.ORPHANED)
        worker._end(How.ORPHANED)  # noqa: SLF001
