# SPDX-License-Identifier: MIT
"""What is told of a device: its state and everything beside it, frozen at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nbdd.errors import NbddError


class State(StrEnum):
    """What a device is doing; the values are those of the D-Bus property State."""

    DETACHED = "detached"
    CONNECTING = "connecting"
    ATTACHED = "attached"
    DEGRADED = "degraded"
    RECONNECTING = "reconnecting"
    FAILED = "failed"
    DETACHING = "detaching"

    @property
    def bound(self) -> bool:
        """Whether the kernel has the device and its I/O goes on, or may."""
        return self in (State.ATTACHED, State.DEGRADED, State.RECONNECTING)


@dataclass(frozen=True, slots=True)
class Status:
    """All that is told of a device, at one moment; the fields are the properties of org.nbdd1.Device."""

    name: str
    uri: str
    """The server that it is connected to, or was, or will be first."""
    uris: tuple[str, ...]
    """All its servers, in the order in which they are asked."""
    state: State
    read_only: bool
    timeout: int
    dead_timeout: int
    connections: int
    configured: bool
    node: str = ""
    size: int = 0
    block_size: int = 0
    live_connections: int = 0
    encryption: str = "none"
    worker_pid: int = 0
    reconnects: int = 0
    attached_since: int = 0
    attached_by: int = 0
    """The user id of who asked for it; 0 where that was root, or the configuration."""
    fails_at: int = 0
    last_error: tuple[str, str] = ("", "")
    desktop: bool = False
    display_name: str = ""
    """"" where the name will do."""
    icon_name: str = ""

    @property
    def bound(self) -> bool:
        """Whether the kernel has the device, one included whose I/O fails or waits for another server than came."""
        return self.state.bound or (self.state is State.FAILED and bool(self.node))


def told_of(error: NbddError) -> tuple[str, str]:
    """An error as `Status.last_error` holds it: its D-Bus name and its sentence."""
    return error.dbus_name, str(error)


def state_for(live: int, connections: int, *, failed: bool = False) -> State:
    """The state of a bound device that has `live` links of `connections`; without any it may have `failed`."""
    if live == 0:
        return State.FAILED if failed else State.RECONNECTING
    return State.ATTACHED if live >= connections else State.DEGRADED
