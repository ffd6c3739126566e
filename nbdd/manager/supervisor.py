# SPDX-License-Identifier: MIT
"""Worker processes, seen from the manager: started by the fork server, given orders, watched and ended.

A worker is one class with one way in (`Supervisor.spawn`) and one way out (`WorkerProcess._end`), whatever ended it.
Each outcome is one `Ending`:

    exit      it returned by itself, with an exit code
    signal    a signal killed it
    hang      it did not answer in time, or sent messages without end, and was killed by us
    orphaned  its fork server died; it was killed by us, and the next spawn starts a new fork server
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

from nbdd.errors import NbddError, WorkerFailed
from nbdd.ipc.channel import Channel, ChannelError, Message
from nbdd.system.journal import DeviceLog

log = logging.getLogger(__name__)

PING_INTERVAL = 10.0
"""Seconds between two pings of a worker that has no order to carry out."""

PING_DEADLINE = 10.0
"""Seconds a worker may take to answer one; after that it counts as hung."""

SPAWN_DEADLINE = 10.0
"""Seconds a fork may take."""

KILL_DEADLINE = 10.0
"""Seconds a killed process may take to end. One that takes longer is stuck in the kernel, and is not waited for."""

MAX_MESSAGES = 10_000
"""Messages between two pings; a worker that sends more counts as hung."""

_READS = 16
"""Reads from one worker before the loop reads from the others."""


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
    """One worker process. `request` gives it an order; the future `ended` is done when the process has ended."""

    def __init__(
        self, name: str, pid: int, pidfd: int, channel: Channel, on_event: Callable[[Message, list[int]], None]
    ) -> None:
        self.name = name
        self.pid = pid
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._channel = channel
        self._on_event = on_event
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._reply_fds: dict[int, list[int]] = {}
        self._next_id = 0
        self._received = 0
        self._killed_as: How | None = None
        self._giving_up: asyncio.TimerHandle | None = None
        # A descriptor for the process, not its number: a kill can never hit a stranger that got the number later.
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel.fileno(), self._readable)
        self._heartbeat = asyncio.create_task(self._beat())

    async def request(self, order: str, *, deadline: float, fds: tuple[int, ...] = (), **arguments: Any) -> Message:
        """Give an order and return the reply; `deadline` in seconds, after which the worker counts as hung.

        Raises the error that the worker met, or WorkerFailed if it ended first.
        """
        reply, returned = await self.request_fds(order, deadline=deadline, fds=fds, **arguments)
        for fd in returned:
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
            # Some hundred kilobytes of orders are unread: the worker hangs.
            self.kill(How.HANG)
        except OSError:
            pass  # It is ending; _end resolves the future.
        try:
            async with asyncio.timeout(deadline):
                reply = await future
            if "error" in reply:
                raise NbddError.from_wire({key: str(reply.get(key, "")) for key in ("error", "message")})
            return reply, self._reply_fds.pop(number, [])
        except TimeoutError:
            self.kill(How.HANG)
            raise WorkerFailed(f"The worker of {self.name!r} did not finish {order!r} in {deadline:g} s.") from None
        finally:
            self._replies.pop(number, None)
            # Not taken after an error, or if the caller was cancelled just when the reply came.
            for fd in self._reply_fds.pop(number, []):
                os.close(fd)

    def kill(self, how: How | None = None) -> None:
        """Kill the process at once. That costs no I/O, as the kernel keeps the device. `how` goes into the `Ending`."""
        if self.ended.done():
            return
        self._killed_as = self._killed_as or how
        if self._giving_up is None:
            self._giving_up = self._loop.call_later(KILL_DEADLINE, self._give_up)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def close(self) -> Ending:
        """End the worker and wait until it is reaped. An attached device stays attached."""
        self.kill()
        return await asyncio.shield(self.ended)

    def _give_up(self) -> None:
        DeviceLog(log, self.name).error(
            "worker %d was killed and does not die: it is stuck in the kernel; going on without it", self.pid
        )
        self._end(How.HANG)

    def _end(self, how: How, code: int = 0) -> None:
        """The one way out: called once by the supervisor when the process is gone."""
        if self.ended.done():
            return
        self._readable(reads=MAX_MESSAGES)  # its last messages
        self._heartbeat.cancel()
        if self._giving_up is not None:
            self._giving_up.cancel()
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        os.close(self._pidfd)
        ending = Ending(self._killed_as or how, code)
        log.debug("%s: worker %d %s", self.name, self.pid, ending)
        self.ended.set_result(ending)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(WorkerFailed(f"The worker of {self.name!r} {ending}."))
                future.exception()  # fetched, in case the caller was cancelled

    def _readable(self, reads: int = _READS) -> None:
        try:
            for _ in range(reads):
                if not self._channel.receive():
                    break
                while (found := self._channel.pop()) is not None:
                    self._handle(*found)
            else:
                return  # The loop calls again.
        except BlockingIOError:
            return
        except (ChannelError, OSError) as error:
            DeviceLog(log, self.name).warning("worker %d is killed, its channel can't be used: %s", self.pid, error)
        except Exception:  # noqa: BLE001 - whatever a worker sends, only the worker ends
            DeviceLog(log, self.name).exception(
                "worker %d is killed, it sent a message that can't be handled", self.pid
            )
        # End of the stream: the process is ending, and the fork server will report how.
        # If it has an exit code by now, the signal does not replace that.
        self._loop.remove_reader(self._channel.fileno())
        self.kill()

    def _handle(self, message: Message, fds: list[int]) -> None:
        self._received += 1
        if self._received > MAX_MESSAGES:
            self._killed_as = self._killed_as or How.HANG
            for fd in fds:
                os.close(fd)
            raise ChannelError("it sends too many messages")
        number = message.get("id")
        future = self._replies.get(number) if isinstance(number, int) else None
        if isinstance(number, int) and future is not None and not future.done():
            self._reply_fds[number] = fds
            # The number is ours and not part of the reply.
            future.set_result({key: value for key, value in message.items() if key != "id"})
        elif "event" in message:
            self._on_event(message, fds)
        else:
            for fd in fds:
                os.close(fd)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(PING_INTERVAL)
            self._received = 0
            if not self._replies:
                with contextlib.suppress(NbddError):
                    await self.request("ping", deadline=PING_DEADLINE)


class Supervisor:
    """Owns the fork server and every worker."""

    def __init__(self) -> None:
        self._workers: dict[int, WorkerProcess] = {}
        self._births: dict[int, _Birth] = {}
        self._next_id = 0
        self._server: asyncio.subprocess.Process | None = None
        self._control: Channel | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        """Start the fork server, if it does not run; raises WorkerFailed if that fails."""
        async with self._starting:
            if self._closed:
                raise WorkerFailed("nbdd is stopping.")
            if self._control is not None:
                return
            await self._reap_server()
            try:
                ours, theirs = Channel.pair()
            except OSError as error:
                raise WorkerFailed(f"The fork server can't be started: {error.strerror}.") from None
            try:
                with theirs:
                    # -S: the start-up files of site-packages only cost memory. PYTHONPATH leads to the package.
                    self._server = await asyncio.create_subprocess_exec(
                        sys.executable,
                        "-S",
                        "-m",
                        "nbdd.worker.forkserver",
                        str(theirs.fileno()),
                        pass_fds=(theirs.fileno(),),
                        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                    )
            except OSError as error:
                ours.close()
                raise WorkerFailed(f"The fork server can't be started: {error.strerror}.") from None
            except BaseException:
                ours.close()
                raise
            ours.setblocking(False)
            self._control = Channel(ours)
            asyncio.get_running_loop().add_reader(ours.fileno(), self._readable, self._control)
            self._watcher = asyncio.create_task(self._watch(self._server, self._control))

    async def spawn(self, name: str, on_event: Callable[[Message, list[int]], None]) -> WorkerProcess:
        """Fork a worker for the device `name`; `on_event` gets what it sends unasked, and owns the descriptors.

        Raises WorkerFailed if no process can be started.
        """
        await self.start()
        control = self._control
        assert control is not None  # noqa: S101 - start() returned
        try:
            ours, theirs = Channel.pair()
        except OSError as error:
            raise WorkerFailed(f"No worker could be started for {name!r}: {error.strerror}.") from None
        ours.setblocking(False)
        birth = _Birth(name, Channel(ours), on_event, asyncio.get_running_loop().create_future())
        self._next_id += 1
        number = self._next_id
        self._births[number] = birth
        try:
            with theirs:
                control.send({"order": "spawn", "id": number, "name": name}, [theirs.fileno()])
            async with asyncio.timeout(SPAWN_DEADLINE):
                return await birth.worker
        except OSError as error:  # TimeoutError is one
            birth.abort()
            self._server_gone(control)
            raise WorkerFailed(
                f"No worker could be started for {name!r}: {error.strerror or 'the fork server does not answer'}."
            ) from None
        except BaseException:
            # Refused, or the caller was cancelled.
            birth.abort()
            raise
        finally:
            del self._births[number]

    async def close(self) -> None:
        """End every worker and the fork server; the kernel keeps the devices."""
        self._closed = True
        await asyncio.gather(*(worker.close() for worker in list(self._workers.values())))
        async with self._starting:
            if self._control is not None:
                self._server_gone(self._control)
            await self._reap_server()

    async def _reap_server(self) -> None:
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_DEADLINE):
                    await self._server.wait()

    async def _watch(self, server: asyncio.subprocess.Process, control: Channel) -> None:
        # The end of the channel is not enough: a worker that is stopped right after its fork still has it open.
        await server.wait()
        if control is self._control:
            self._readable(control)  # its last messages
            self._server_gone(control)

    def _readable(self, control: Channel) -> None:
        try:
            while control.receive():
                while (found := control.pop()) is not None:
                    self._handle(*found)
        except BlockingIOError:
            return
        except (ChannelError, OSError) as error:
            log.warning("the fork server is ended, its channel can't be used: %s", error)
        self._server_gone(control)

    def _handle(self, message: Message, fds: list[int]) -> None:
        match message["event"]:
            case "ended":
                worker = self._workers.pop(message["pid"], None)
                code = message["code"]
                if worker is not None and code < 0:
                    worker._end(How.SIGNAL, -code)  # noqa: SLF001 - reserved for the supervisor
                elif worker is not None:
                    worker._end(How.EXIT, code)  # noqa: SLF001
            case "spawned":
                birth = self._births.get(message["id"])
                if birth is not None and not birth.worker.done():
                    # Here and not in spawn(): the next message may already report its end.
                    worker = WorkerProcess(birth.name, message["pid"], fds.pop(), birth.channel, birth.on_event)
                    self._workers[worker.pid] = worker
                    birth.worker.set_result(worker)
                # Else the caller was cancelled: the worker ends by itself, at the end of its channel.
            case "refused":
                birth = self._births.get(message["id"])
                if birth is not None:
                    birth.fail(f"No worker could be started for {birth.name!r}: {message['message']}.")
        for fd in fds:
            os.close(fd)

    def _server_gone(self, control: Channel) -> None:
        """Every worker is orphaned: end them all. Their successors, of a new fork server, adopt the devices."""
        if control is not self._control:
            return
        asyncio.get_running_loop().remove_reader(control.fileno())
        control.close()
        self._control = None
        if self._server is not None and self._server.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._server.kill()
        if not self._closed:
            log.error("the fork server ended; a new one is started, the devices stay attached")
        for birth in self._births.values():
            birth.fail("The fork server ended.")
        while self._workers:
            _, worker = self._workers.popitem()
            worker.kill(How.ORPHANED)
            worker._end(How.ORPHANED)  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class _Birth:
    """A worker that the fork server was asked for and has not started yet."""

    name: str
    channel: Channel
    on_event: Callable[[Message, list[int]], None]
    worker: asyncio.Future[WorkerProcess]

    def fail(self, why: str) -> None:
        if not self.worker.done():
            self.worker.set_exception(WorkerFailed(why))

    def abort(self) -> None:
        """The caller does not wait for it any more."""
        if not self.worker.cancel() and not self.worker.cancelled() and self.worker.exception() is None:
            # It was started at the last moment.
            self.worker.result().kill()
        else:
            # If it is forked already, the end of its channel ends it.
            self.channel.close()
