# SPDX-License-Identifier: MIT
"""The daemon's connection to the system bus: connect, own the name, serve."""

from __future__ import annotations

from nbdd.bus.daemon.objects import ManagerInterface, ObjectExporter
from nbdd.bus.daemon.polkit import Polkit
from nbdd.bus.daemon.service import ServiceBus
from nbdd.bus.daemon.systemd1 import is_going_down, job_type, shutdown
from nbdd.bus.wire.calls import CallError, own_name
from nbdd.bus.wire.library import AuthError, InvalidAddressError
from nbdd.bus.wire.names import BUS_NAME, ROOT_PATH
from nbdd.errors import NbddError
from nbdd.manager.manager import Manager


class BusConnection:
    """nbdd on the system bus. Make it in a running loop."""

    def __init__(self) -> None:
        try:
            self._bus = ServiceBus(ROOT_PATH)
        except (OSError, InvalidAddressError) as error:
            raise NbddError(f"The system bus can't be reached: {error}. nbdd needs dbus.service.") from None
        self.observer = ObjectExporter(self._bus)

    async def claim(self) -> None:
        """Connect and own the name. Raises NbddError if another nbdd runs, or the bus forbids the name.

        Calls that come from now on wait until `serve`.
        """
        try:
            await self._bus.connect()
            owned = await own_name(self._bus, BUS_NAME)
        except CallError as error:
            raise NbddError(
                f"The bus name {BUS_NAME} can't be owned: {error} nbdd runs as root, with its bus policy installed."
            ) from None
        except (OSError, EOFError, AuthError) as error:
            raise NbddError(f"The system bus does not let us in: {str(error) or 'it hung up'}.") from None
        if not owned:
            raise NbddError(
                f"Another nbdd is running: it owns the bus name {BUS_NAME}. "
                "This one ends without having touched anything."
            )

    def serve(self, manager: Manager) -> None:
        """Begin to answer calls."""
        self._bus.add_object(ROOT_PATH, ManagerInterface(manager, Polkit(self._bus)))
        self._bus.open()

    async def job_type(self) -> str:
        """See `systemd1.job_type`."""
        return await job_type(self._bus)

    async def is_going_down(self) -> bool:
        """See `systemd1.is_going_down`."""
        return await is_going_down(self._bus)

    async def shutdown(self) -> None:
        """See `systemd1.shutdown`."""
        await shutdown(self._bus)

    async def lost(self) -> None:
        """Return when the bus is gone. Without it no caller can reach us, so that is fatal."""
        try:
            await self._bus.wait_for_disconnect()
        except (EOFError, OSError):
            return

    async def close(self, reason: NbddError | None = None) -> None:
        """Answer the calls that are open and disconnect; `reason` is for an end that was not asked for."""
        await self._bus.finish(reason)
        self._bus.disconnect()
