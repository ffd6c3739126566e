# SPDX-License-Identifier: MIT
"""The properties of org.nbdd1.Device: one table for the service and its callers.

dbus/org.nbdd1.Device.xml is the reference; a test holds this table against it.
"""

from __future__ import annotations

from typing import NamedTuple


class DeviceProperty(NamedTuple):
    """One property."""

    name: str
    signature: str
    """Its D-Bus type."""
    field: str
    """Of the manager's `Status` and of the callers' `DeviceView`. The key in JSON documents has - for _."""


DEVICE_PROPERTIES = (
    DeviceProperty("Name", "s", "name"),
    DeviceProperty("Node", "s", "node"),
    DeviceProperty("State", "s", "state"),
    DeviceProperty("Size", "t", "size"),
    DeviceProperty("BlockSize", "u", "block_size"),
    DeviceProperty("ReadOnly", "b", "read_only"),
    DeviceProperty("URI", "s", "uri"),
    DeviceProperty("URIs", "as", "uris"),
    DeviceProperty("Timeout", "u", "timeout"),
    DeviceProperty("DeadTimeout", "u", "dead_timeout"),
    DeviceProperty("Connections", "u", "connections"),
    DeviceProperty("LiveConnections", "u", "live_connections"),
    DeviceProperty("Encryption", "s", "encryption"),
    DeviceProperty("WorkerPID", "u", "worker_pid"),
    DeviceProperty("Reconnects", "t", "reconnects"),
    DeviceProperty("AttachedSince", "t", "attached_since"),
    DeviceProperty("AttachedBy", "u", "attached_by"),
    DeviceProperty("FailsAt", "t", "fails_at"),
    DeviceProperty("Configured", "b", "configured"),
    DeviceProperty("LastError", "(ss)", "last_error"),
    DeviceProperty("Desktop", "b", "desktop"),
    DeviceProperty("DisplayName", "s", "display_name"),
    DeviceProperty("IconName", "s", "icon_name"),
)
"""In the order of the JSON documents."""

FIELDS = {item.name: item.field for item in DEVICE_PROPERTIES}
"""D-Bus name to field."""
