# SPDX-License-Identifier: MIT
"""The long-running process: its parts put together, and its one life from start to end.

    claim the name ─> start the fork server ─> read the configuration ─> adopt ─> READY ─> serve ─> signal ─> end

The name comes first: it is the lock that keeps a second nbdd from touching the devices of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import Counter
from pathlib import Path

from nbdd.bus.daemon.connection import BusConnection
from nbdd.config.loader import load
from nbdd.errors import InvalidConfig, NbddError
from nbdd.manager.device import Device
from nbdd.manager.manager import Manager, Observer
from nbdd.manager.records import Records, runtime_directory
from nbdd.manager.status import State, Status
from nbdd.manager.supervisor import Supervisor
from nbdd.system.notify import Notifier, kept_sockets

log = logging.getLogger(__name__)

SHUTDOWN_WAIT = 30
"""Seconds that I/O waits for a dead server when the machine goes down, where the dead timeout is longer: an unmount
waits as long, and the machine with it. The server may still come back; and systemd gives an unmount 90 s."""

LEAVE_WAIT = 10
"""Seconds for the users of such a device to leave it when their I/O has failed."""

STOP_DEADLINE = 60.0
"""Seconds that the detaching of idle devices may take at a stop; what is left then stays attached."""


async def run(directory: Path) -> int:
    """Run until SIGTERM or SIGINT; `directory` holds the configuration. Returns the exit code.

    Raises NbddError when it can't start.
    """
    notifier = Notifier()
    bus = BusConnection()
    await bus.claim()
    asked = _Signals()
    supervisor = Supervisor()
    await supervisor.start()
    manager = Manager(
        lambda: load(directory),
        supervisor,
        Records(runtime_directory()),
        notifier.keep_sockets,
        _Told(bus.observer, notifier),
    )
    try:
        await manager.start(kept_sockets())
    except NbddError as error:
        await manager.stop(detach=False)
        if isinstance(error, InvalidConfig):
            await bus.close(InvalidConfig(*error.problems, "nbdd does not start with that."))
        else:
            await bus.close(error)
        raise
    bus.serve(manager)
    watchdog = asyncio.create_task(notifier.watchdog())
    lost = asyncio.create_task(bus.lost())
    down = asyncio.create_task(_go_down(bus, manager))
    notifier.ready()
    try:
        while True:
            event = asyncio.create_task(asked.next())
            await asyncio.wait({event, lost, watchdog}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                event.cancel()
                log.critical("the system bus is gone; ending, so that systemd starts us anew. The devices stay.")
                await manager.stop(detach=False)
                return 1
            if event.done() and event.result() is not signal.SIGHUP:
                break
            if event.done():
                await _reload(manager, notifier)
            else:
                event.cancel()
                watchdog = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
        await _stop(manager, bus, notifier)
        return 0
    finally:
        down.cancel()
        watchdog.cancel()
        lost.cancel()


async def _reload(manager: Manager, notifier: Notifier) -> None:
    notifier.reloading()
    with contextlib.suppress(NbddError):  # the manager has told the journal
        await manager.reload()
    notifier.ready()


async def _go_down(bus: BusConnection, manager: Manager) -> None:
    """Have nothing wait longer for a server than the machine should for its end."""
    await bus.shutdown()
    log.info("the machine goes down: I/O waits for a dead server for %d s from now on", SHUTDOWN_WAIT)
    await manager.hasten(SHUTDOWN_WAIT)


async def _stop(manager: Manager, bus: BusConnection, notifier: Notifier) -> None:
    """Detach what is idle if this is the end; keep everything if it is half of a restart, or a plain kill."""
    notifier.stopping()
    detach = await bus.job_type() == "stop"
    try:
        async with asyncio.timeout(STOP_DEADLINE):
            wait = 0
            if detach and await bus.is_going_down():
                # What is mounted without _netdev may be unmounted only now. Without a server that ends when we end the
                # waiting, so we stay until then.
                await manager.hasten(SHUTDOWN_WAIT)
                wait = SHUTDOWN_WAIT + LEAVE_WAIT
            for told in await manager.stop(detach=detach, wait=wait):
                log.warning("%s", told)
    except TimeoutError:
        log.error("detaching took longer than %g s; what is left stays attached", STOP_DEADLINE)
        await manager.stop(detach=False)
    await bus.close()


class _Signals:
    """SIGTERM, SIGINT and SIGHUP, one at a time."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._queue.put_nowait, number)

    async def next(self) -> signal.Signals:
        return await self._queue.get()


class _Told:
    """Passes the manager's news on to the bus, and sums them up for ``systemctl status``."""

    def __init__(self, observer: Observer, notifier: Notifier) -> None:
        self._observer = observer
        self._notifier = notifier
        self._states: dict[str, State] = {}
        self._line = ""
        self._soon: asyncio.Handle | None = None

    def added(self, device: Device) -> None:
        self._observer.added(device)
        self._states[device.name] = device.status.state
        self._sum_up()

    def changed(self, device: Device, old: Status) -> None:
        self._observer.changed(device, old)
        self._states[device.name] = device.status.state
        if device.status.state is not old.state:
            self._sum_up()

    def removed(self, device: Device) -> None:
        self._observer.removed(device)
        del self._states[device.name]
        self._sum_up()

    def _sum_up(self) -> None:
        # Once for all that happens in one turn of the loop: ten thousand devices are added in one.
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._soon = None
        count = Counter(self._states.values())
        bound = sum(number for state, number in count.items() if state.bound)
        others = [
            f"{count[state]} {state}"
            for state in State
            if count[state] and state not in (State.DETACHED, State.ATTACHED)
        ]
        line = f"{bound}/{len(self._states)} attached" + (f" ({', '.join(others)})" if others else "")
        if line != self._line:
            self._line = line
            self._notifier.status(line)
