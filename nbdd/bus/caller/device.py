# SPDX-License-Identifier: MIT
"""A device as callers see it: the properties of org.nbdd1.Device under the names of the JSON documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from nbdd.bus.wire.properties import FIELDS


@dataclass(frozen=True, slots=True)
class Failure:
    """The last thing that went wrong."""

    name: str
    """The D-Bus name of the error, such as org.nbdd1.Error.ConnectFailed."""
    message: str


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device at one moment. A property that the service, of another version, does not have keeps its default."""

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
    """Microseconds since 1970: when I/O that waits for a connection fails; 0 while there is a connection."""
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
        """A device from its D-Bus properties, as plain values; those that this version does not know are left out."""
        return cls(**fields(properties))

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """The device with some of its `fields` changed. A value that was not sent stays as it was."""
        known = {key: value for key, value in changes.items() if value is not None or key == "last_error"}
        return replace(self, **known)

    def to_json(self) -> dict[str, Any]:
        """The JSON object. Each key always has the same type, except that no last-error is null."""
        return document({field: getattr(self, field) for field in FIELDS.values()})


def fields(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a DeviceView that these D-Bus properties give; None stands for a value that was not sent."""
    return {FIELDS[key]: _value(key, value) for key, value in properties.items() if key in FIELDS}


def document(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a DeviceView as a JSON object, with the keys of `DeviceView.to_json`."""
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
