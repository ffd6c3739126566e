# SPDX-License-Identifier: MIT
"""A device as nbdctl shows it: the properties of org.nbdd1.Device under the names of the JSON documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

_FIELDS = {
    "Name": "name",
    "Node": "node",
    "State": "state",
    "Size": "size",
    "BlockSize": "block_size",
    "ReadOnly": "read_only",
    "URI": "uri",
    "URIs": "uris",
    "Timeout": "timeout",
    "DeadTimeout": "dead_timeout",
    "Connections": "connections",
    "LiveConnections": "live_connections",
    "Encryption": "encryption",
    "WorkerPID": "worker_pid",
    "Reconnects": "reconnects",
    "AttachedSince": "attached_since",
    "AttachedBy": "attached_by",
    "FailsAt": "fails_at",
    "Configured": "configured",
    "LastError": "last_error",
    "Desktop": "desktop",
    "DisplayName": "display_name",
    "IconName": "icon_name",
}
"""D-Bus property to field; the JSON key is the field with - for _."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The last thing that went wrong."""

    name: str
    """The D-Bus name of the error, such as org.nbdd1.Error.ConnectFailed."""
    message: str


@dataclass(frozen=True, slots=True)
class Device:
    """One device. A property that the service does not know yet, or no longer, keeps its default."""

    name: str = ""
    node: str = ""
    """/dev/nbdX, or "" while there is none."""
    state: str = "unknown"
    size: int = 0
    """Bytes; 0 while not attached."""
    block_size: int = 0
    read_only: bool = False
    uri: str = ""
    uris: tuple[str, ...] = ()
    """All its servers, in the order in which they are asked."""
    timeout: int = 0
    """Seconds; 0 is no limit."""
    dead_timeout: int = 0
    """Seconds."""
    connections: int = 0
    live_connections: int = 0
    encryption: str = ""
    worker_pid: int = 0
    reconnects: int = 0
    attached_since: int = 0
    """Microseconds since 1970; 0 while not attached."""
    attached_by: int = 0
    """A user id."""
    fails_at: int = 0
    """Microseconds since 1970: when I/O that waits for a link fails; 0 while there is a link."""
    configured: bool = False
    last_error: Failure | None = None
    desktop: bool = False
    """Whether desktops show it like a removable drive."""
    display_name: str = ""
    icon_name: str = ""

    @property
    def servers(self) -> tuple[str, ...]:
        """The URIs that mean this device; a service from before URIs has one."""
        return self.uris or (self.uri,)

    def is_at(self, uri: str) -> bool:
        """Whether the URI means an export of this device."""
        from nbdd.uri import same_export  # noqa: PLC0415 - most commands compare none

        return any(same_export(mine, uri) for mine in self.servers)

    @classmethod
    def of(cls, properties: Mapping[str, Any]) -> Self:
        """A device from its D-Bus properties; those that nbdctl does not know are left out."""
        return cls(**fields(properties))

    def to_json(self) -> dict[str, Any]:
        """The JSON object. Each key always has the same type, except that no last-error is null."""
        return _document({field: getattr(self, field) for field in _FIELDS.values()})


def changes(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Changed properties as a JSON object, with the keys of `Device.to_json`."""
    return _document(fields(properties))


def fields(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Device that some of its D-Bus properties give; None stands for a value that was not told."""
    return {_FIELDS[key]: _value(key, value) for key, value in properties.items() if key in _FIELDS}


def _document(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.replace("_", "-"): asdict(value) if isinstance(value, Failure) else value for key, value in values.items()
    }


def _value(key: str, value: Any) -> Any:
    if key == "URIs" and value is not None:
        return tuple(value)
    if key == "LastError" and value is not None:
        name, message = value
        return Failure(name, message) if name or message else None
    return value
