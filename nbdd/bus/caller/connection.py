# SPDX-License-Identifier: MIT
"""A connection to a message bus for programs that call and listen, and serve nothing.

dbus-next 0.2.3 needs some care here, marked "dbus-next:" below.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from nbdd.bus.caller.ssh import AnonymousExternal, Bridge
from nbdd.bus.wire.calls import own_name
from nbdd.bus.wire.library import AuthError, BusType, InvalidAddressError
from nbdd.bus.wire.message_bus import MessageBusFixes
from nbdd.errors import NbddError

CONNECT_SECONDS = 25
"""How long the bus may take to let us in; a healthy one needs a millisecond."""


class CallerBus(MessageBusFixes):
    """A connection that ends when the bus ends, and leaves nothing open. Make it in a running loop.

    To the system bus or the session's, or through a bridge to the system bus of another machine.
    """

    def __init__(self, way: BusType | Bridge) -> None:
        self._bridge = way if isinstance(way, Bridge) else None
        if isinstance(way, Bridge):
            # dbus-next: wants an address, but never looks at it, as _setup_socket below needs none.
            super().__init__(long_replies=True, bus_address="unixexec:path=ssh", auth=AnonymousExternal())
        else:
            super().__init__(long_replies=True, bus_type=way)

    def _setup_socket(self) -> None:
        if self._bridge is not None:
            self._sock = self._bridge.socket
            self._stream = self._sock.makefile("rwb")
            self._fd = self._sock.fileno()
            return
        # dbus-next: forgets the socket when it can't connect it.
        base: Any = super()
        try:
            base._setup_socket()  # noqa: SLF001
        except Exception:
            if hasattr(self, "_sock"):
                self.close()
            raise

    async def own(self, name: str) -> bool:
        """Own a well-known name; False if another connection has it."""
        return await own_name(self, name)

    async def ended(self) -> None:
        """Return when the connection has ended, whatever dbus-next raises then."""
        with contextlib.suppress(Exception):
            await self.wait_for_disconnect()

    def close(self) -> None:
        """Close the descriptors; dbus-next only shuts the socket down."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._sock.close()


def system_bus() -> contextlib.AbstractAsyncContextManager[CallerBus]:
    """A connection to the system bus. Raises NbddError if it can't be reached."""
    return _connection(BusType.SYSTEM)


def session_bus() -> contextlib.AbstractAsyncContextManager[CallerBus]:
    """A connection to the bus of the session. Raises NbddError if it can't be reached."""
    return _connection(BusType.SESSION)


@contextlib.asynccontextmanager
async def _connection(kind: BusType) -> AsyncIterator[CallerBus]:
    what = f"The {kind.name.lower()} bus"
    bus = None
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            bus = CallerBus(kind)
            await bus.connect()
    except (OSError, EOFError, AuthError, InvalidAddressError, TimeoutError) as problem:
        if bus is not None:
            bus.close()
        reason = str(problem).rstrip(".") or ("it hung up" if isinstance(problem, EOFError) else "it does not answer")
        raise NbddError(f"{what} can't be reached ({reason}).") from problem
    end = asyncio.ensure_future(bus.ended())
    try:
        yield bus
    finally:
        if not end.done():
            bus.disconnect()
        await asyncio.wait({end}, timeout=1)
        end.cancel()
        bus.close()
