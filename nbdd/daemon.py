# SPDX-License-Identifier: MIT
"""The long-running process: puts its parts together and runs them from start to end.

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
from nbdd.manager.status import Phase, State, Status
from nbdd.manager.supervisor import Supervisor
from nbdd.system.notify import Notifier, kept_sockets

log = logging.getLogger(__name__)

SHUTDOWN_WAIT = 30
"""Seconds that I/O waits for a dead server when the machine shuts down, if the dead timeout is longer. An unmount waits
as long, and the machine with it; systemd gives an unmount 90 s. The server may still come back."""

LEAVE_WAIT = 10
"""Seconds for the users of such a device to close it when their I/O has failed."""

STOP_DEADLINE = 60.0
"""Seconds that a stop may take to detach idle devices; those not detached by then stay attached."""


async def run(directory: Path) -> int:
    """Run until SIGTERM or SIGINT; `directory` holds the configuration. Returns the exit code.

    Raises NbddError when it can't start.
    """
    notifier = Notifier()
    bus = BusConnection()
    await bus.claim()
    signals = _Signals()
    supervisor = Supervisor()
    await supervisor.start()
    manager = Manager(
        lambda: load(directory),
        supervisor,
        Records(runtime_directory()),
        notifier.keep_sockets,
        StatusReporter(bus.observer, notifier),
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
    shutdown = asyncio.create_task(_prepare_shutdown(bus, manager))
    notifier.ready()
    log.debug("ready, %d devices", len(manager.devices))
    try:
        while True:
            event = asyncio.create_task(signals.next())
            await asyncio.wait({event, lost, watchdog}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                event.cancel()
                log.critical(
                    "the system bus is gone; ending, so that systemd starts nbdd again. The devices stay attached."
                )
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
        shutdown.cancel()
        watchdog.cancel()
        lost.cancel()


async def _reload(manager: Manager, notifier: Notifier) -> None:
    notifier.reloading()
    with contextlib.suppress(NbddError):  # the manager has logged it
        await manager.reload()
    notifier.ready()


async def _prepare_shutdown(bus: BusConnection, manager: Manager) -> None:
    """Shorten the dead timeouts when the machine shuts down, so that it does not wait long for a dead server."""
    await bus.shutdown()
    log.info("the machine is shutting down: from now on I/O waits at most %d s for a dead server", SHUTDOWN_WAIT)
    await manager.shorten_dead_timeouts(SHUTDOWN_WAIT)


async def _stop(manager: Manager, bus: BusConnection, notifier: Notifier) -> None:
    """Detach idle devices if systemd stops the service; keep all if it restarts it, or if a signal came alone."""
    notifier.stopping()
    detach = await bus.job_type() == "stop"
    log.debug("stopping, %s", "idle devices are detached" if detach else "all devices stay attached")
    try:
        async with asyncio.timeout(STOP_DEADLINE):
            wait = 0
            if detach and await bus.is_going_down():
                # A filesystem mounted without _netdev may be unmounted only now. If its server is dead, that takes
                # until its I/O fails, so nbdd stays until then.
                await manager.shorten_dead_timeouts(SHUTDOWN_WAIT)
                wait = SHUTDOWN_WAIT + LEAVE_WAIT
            for refusal in await manager.stop(detach=detach, wait=wait):
                log.warning("%s", refusal)
    except TimeoutError:
        log.error("detaching took longer than %g s; the devices not detached by now stay attached", STOP_DEADLINE)
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


class StatusReporter:
    """Passes changes of devices on to the bus, and sums them up in a line for ``systemctl status``."""

    def __init__(self, observer: Observer, notifier: Notifier) -> None:
        self._observer = observer
        self._notifier = notifier
        self._phases: dict[str, Phase] = {}
        self._line = ""
        self._scheduled: asyncio.Handle | None = None

    def added(self, device: Device) -> None:
        """See `Observer`."""
        self._observer.added(device)
        self._phases[device.name] = device.status.phase
        self._schedule()

    def changed(self, device: Device, old: Status) -> None:
        """See `Observer`."""
        self._observer.changed(device, old)
        self._phases[device.name] = device.status.phase
        if device.status.phase is not old.phase:
            self._schedule()

    def removed(self, device: Device) -> None:
        """See `Observer`."""
        self._observer.removed(device)
        del self._phases[device.name]
        self._schedule()

    def _schedule(self) -> None:
        # One line for all changes in one turn of the loop: ten thousand devices are added in one.
        if self._scheduled is None:
            self._scheduled = asyncio.get_running_loop().call_soon(self._report)

    def _report(self) -> None:
        self._scheduled = None
        attached = sum(phase.bound and phase is not Phase.IO_FAILED for phase in self._phases.values())
        count = Counter(phase.state for phase in self._phases.values())
        others = [
            f"{count[state]} {state}"
            for state in State
            if count[state] and state not in (State.DETACHED, State.ATTACHED)
        ]
        line = f"{attached}/{len(self._phases)} attached" + (f" ({', '.join(others)})" if others else "")
        if line != self._line:
            self._line = line
            self._notifier.status(line)
