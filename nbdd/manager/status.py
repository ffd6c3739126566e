# SPDX-License-Identifier: MIT
"""The status of a device: its phase and everything else that D-Bus shows of it, and the one place that changes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from typing import Any

from nbdd.config.definition import Definition
from nbdd.errors import NbddError
from nbdd.system.journal import DeviceLog
from nbdd.worker.binding import Binding, ConnectionState


class State(StrEnum):
    """What D-Bus says that a device is doing: the values of the property State."""

    DETACHED = "detached"
    CONNECTING = "connecting"
    ATTACHED = "attached"
    DEGRADED = "degraded"
    RECONNECTING = "reconnecting"
    FAILED = "failed"
    DETACHING = "detaching"


class Phase(Enum):
    """What a device is doing. The states `connecting` and `failed` of D-Bus have two phases each."""

    DETACHED = auto()
    ATTACHING = auto()
    """It is being connected and bound."""
    ADOPTING = auto()
    """It was bound by the previous instance, and a worker is about to take it over."""
    ATTACHED = auto()
    DEGRADED = auto()
    """Bound, with some of its connections dead."""
    RECONNECTING = auto()
    """Bound, with all of its connections dead: I/O waits."""
    IO_FAILED = auto()
    """Bound; I/O fails as the dead timeout is over, or waits although a server answers, as that has other data."""
    FAILED = auto()
    """Not attached, and no attempt is made any more."""
    DETACHING = auto()

    @property
    def state(self) -> State:
        """The phase as D-Bus has it."""
        return _STATES[self]

    @property
    def bound(self) -> bool:
        """Whether the kernel has the device, its worker takes orders, and I/O goes on, waits or fails."""
        return self in {Phase.ATTACHED, Phase.DEGRADED, Phase.RECONNECTING, Phase.IO_FAILED}

    @property
    def connecting(self) -> bool:
        """Whether the device is being attached or adopted."""
        return self in {Phase.ATTACHING, Phase.ADOPTING}

    @staticmethod
    def of_connections(live: int, connections: int, *, io_failed: bool = False) -> Phase:
        """The phase of a bound device with `live` of `connections` connections; `io_failed` counts if none lives."""
        if live == 0:
            return Phase.IO_FAILED if io_failed else Phase.RECONNECTING
        return Phase.ATTACHED if live >= connections else Phase.DEGRADED


_STATES = {
    Phase.DETACHED: State.DETACHED,
    Phase.ATTACHING: State.CONNECTING,
    Phase.ADOPTING: State.CONNECTING,
    Phase.ATTACHED: State.ATTACHED,
    Phase.DEGRADED: State.DEGRADED,
    Phase.RECONNECTING: State.RECONNECTING,
    Phase.IO_FAILED: State.FAILED,
    Phase.FAILED: State.FAILED,
    Phase.DETACHING: State.DETACHING,
}

LastError = tuple[str, str]
"""The D-Bus name of an error and its sentence."""

NO_ERROR: LastError = ("", "")


def last_error(error: NbddError) -> LastError:
    """An error as `Status.last_error` holds it."""
    return error.dbus_name, str(error)


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a device at one moment; the fields are the properties of org.nbdd1.Device."""

    name: str
    uri: str
    """The server that it is connected to, or was, or will be first."""
    uris: tuple[str, ...]
    """All its servers, in the order in which they are asked."""
    phase: Phase
    """`state` is what D-Bus shows of it."""
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
    """The user id of the caller who attached it; 0 if that was root, or if the configuration wants it."""
    fails_at: int = 0
    last_error: LastError = NO_ERROR
    desktop: bool = False
    display_name: str = ""
    """"" if the name will do."""
    icon_name: str = ""

    @property
    def state(self) -> State:
        """The phase as D-Bus has it."""
        return self.phase.state

    @property
    def bound(self) -> bool:
        """Whether the kernel has the device and its worker takes orders; see `Phase.bound`."""
        return self.phase.bound

    @staticmethod
    def idle(definition: Definition, *, configured: bool) -> Status:
        """The status of a device that is not attached."""
        desktop = definition.desktop
        return Status(
            name=definition.name,
            uri=str(definition.uri[0]),
            uris=tuple(map(str, definition.uri)),
            phase=Phase.DETACHED,
            read_only=bool(definition.read_only),
            timeout=definition.timeout,
            dead_timeout=definition.dead_timeout,
            connections=definition.connections,
            configured=configured,
            desktop=desktop is not None,
            display_name=desktop.name if desktop is not None else "",
            icon_name=desktop.icon if desktop is not None else "",
        )

    def with_definition(self, definition: Definition) -> Status:
        """The same status with the fields that a definition determines."""
        defined = Status.idle(definition, configured=self.configured)
        return replace(
            self,
            uri=defined.uri,
            uris=defined.uris,
            read_only=defined.read_only,
            timeout=defined.timeout,
            dead_timeout=defined.dead_timeout,
            connections=defined.connections,
            desktop=defined.desktop,
            display_name=defined.display_name,
            icon_name=defined.icon_name,
        )

    def with_binding(self, binding: Binding, *, attached_since: int) -> Status:
        """The same status with what a binding says, whether a worker has adopted it yet or not."""
        return replace(
            self,
            node=binding.node,
            size=binding.size,
            block_size=binding.block_size,
            uri=binding.uri,
            connections=binding.connections,
            live_connections=binding.live,
            attached_since=attached_since,
        )

    def with_connections(self, found: ConnectionState) -> Status:
        """The same status with what a worker reports of the connections, but for the phase and the error."""
        return replace(self, live_connections=found.live, reconnects=found.reconnects, uri=found.uri, size=found.size)


class StatusTracker:
    """The current status of a device. Changes in one method, `set`, which logs and passes on the change."""

    def __init__(self, status: Status, log: DeviceLog, on_change: Callable[[Status], None]) -> None:
        """`on_change` is called after each change, with the status before it."""
        self._now = status
        self._log = log
        self._on_change = on_change

    @property
    def now(self) -> Status:
        """The status now."""
        return self._now

    @property
    def phase(self) -> Phase:
        """The phase now."""
        return self._now.phase

    def change(self, **changes: Any) -> None:
        """Change single fields of the status."""
        self.set(replace(self._now, **changes))

    def reset(
        self, phase: Phase, definition: Definition, *, last_error: LastError = NO_ERROR, attached_by: int = 0
    ) -> None:
        """Set the status of a device that is not attached, whatever it was before."""
        idle = Status.idle(definition, configured=self._now.configured)
        self.set(replace(idle, phase=phase, last_error=last_error, attached_by=attached_by))

    def set(self, new: Status) -> None:
        """Change the status."""
        old = self._now
        if new == old:
            return
        self._now = new
        if new.phase is not old.phase:
            self._log.debug("phase %s -> %s", old.phase.name, new.phase.name)
        if new.state is not old.state:
            where = f" ({new.node}, {new.uri})" if new.node else ""
            self._log.info("%s -> %s%s", old.state, new.state, where)
        self._on_change(old)
