# SPDX-License-Identifier: MIT
"""Every error that nbdd raises on purpose, in one tree.

    NbddError                         org.freedesktop.DBus.Error.Failed
    ├── DefinitionError
    │   ├── InvalidConfig             org.nbdd1.Error.InvalidConfig
    │   └── InvalidURI                org.nbdd1.Error.InvalidURI
    ├── ServerError
    │   ├── ConnectFailed             org.nbdd1.Error.ConnectFailed
    │   ├── NegotiationFailed         org.nbdd1.Error.NegotiationFailed
    │   │   ├── NoSuchExport          org.nbdd1.Error.NoSuchExport
    │   │   └── ExportChanged         org.nbdd1.Error.NegotiationFailed
    │   ├── TLSFailed                 org.nbdd1.Error.TLSFailed
    │   └── TimedOut                  org.nbdd1.Error.TimedOut
    ├── DeviceError
    │   ├── NoSuchDevice              org.nbdd1.Error.NoSuchDevice
    │   ├── AlreadyAttached           org.nbdd1.Error.AlreadyAttached
    │   ├── NotAttached               org.nbdd1.Error.NotAttached
    │   └── Busy                      org.nbdd1.Error.Busy
    ├── KernelError                   org.nbdd1.Error.KernelError
    │   ├── NoFreeDevice              org.nbdd1.Error.NoFreeDevice
    │   └── ConnectionNotServiced     org.nbdd1.Error.KernelError
    ├── CallerError
    │   ├── InvalidArgs               org.freedesktop.DBus.Error.InvalidArgs
    │   ├── AccessDenied              org.freedesktop.DBus.Error.AccessDenied
    │   └── InteractiveAuthorizationRequired
    │                                 org.freedesktop.DBus.Error.InteractiveAuthorizationRequired
    └── WorkerFailed                  org.freedesktop.DBus.Error.Failed

The text of an error is written for a person: what happened, to what, and what they can do.
The class is for programs; it crosses the worker's socket by its name, and the bus by ``dbus_name``.
"""

from __future__ import annotations

from typing import Any, ClassVar

_OWN = "org.nbdd1.Error."
_FREEDESKTOP = "org.freedesktop.DBus.Error."


class NbddError(Exception):
    """Any error of nbdd; ``str()`` is one or two sentences for a person."""

    dbus_name: ClassVar[str] = _FREEDESKTOP + "Failed"

    def to_wire(self) -> dict[str, Any]:
        """The error as the JSON object that crosses between worker and manager."""
        return {"error": type(self).__name__, "message": str(self)}

    @staticmethod
    def from_wire(wire: dict[str, Any]) -> NbddError:
        """Rebuild an error from `to_wire`; an unknown class becomes a plain NbddError."""
        found = _BY_NAME.get(wire.get("error", ""), NbddError)(wire.get("message", "unknown error"))
        if isinstance(found, KernelError):
            found.errno = wire.get("errno")
        return found


class DefinitionError(NbddError):
    """What was asked for is not a device definition."""


class InvalidConfig(DefinitionError):
    """The configuration is wrong; ``problems`` holds one line for each fault found, file:line:column first."""

    dbus_name = _OWN + "InvalidConfig"

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class InvalidURI(DefinitionError):
    """The text is not an NBD URI that nbdd can use."""

    dbus_name = _OWN + "InvalidURI"


class ServerError(NbddError):
    """The NBD server failed, or the network on the way to it."""


class ConnectFailed(ServerError):
    """No connection: the host is unknown, unreachable, or refuses."""

    dbus_name = _OWN + "ConnectFailed"


class NegotiationFailed(ServerError):
    """The server was reached, but the negotiation of an export with it failed."""

    dbus_name = _OWN + "NegotiationFailed"


class NoSuchExport(NegotiationFailed):
    """The server does not offer the export that was asked for."""

    dbus_name = _OWN + "NoSuchExport"


class ExportChanged(NegotiationFailed):
    """The server, or the next one of the list, offers another export than the one that is on the device."""


class TLSFailed(ServerError):
    """Encryption was asked for, by the URI or by the server, and is not available."""

    dbus_name = _OWN + "TLSFailed"


class TimedOut(ServerError):
    """A deadline passed."""

    dbus_name = _OWN + "TimedOut"


class DeviceError(NbddError):
    """The device is not in a state that allows the request."""


class NoSuchDevice(DeviceError):
    """No definition and no attached device has this name."""

    dbus_name = _OWN + "NoSuchDevice"


class AlreadyAttached(DeviceError):
    """The device is attached already."""

    dbus_name = _OWN + "AlreadyAttached"


class NotAttached(DeviceError):
    """The device is not attached."""

    dbus_name = _OWN + "NotAttached"


class Busy(DeviceError):
    """The device is in use; the text names the users."""

    dbus_name = _OWN + "Busy"


class KernelError(NbddError):
    """The kernel refused; ``errno`` is its number, or None if it gave none."""

    dbus_name = _OWN + "KernelError"

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    def to_wire(self) -> dict[str, Any]:
        """With the number."""
        return {**super().to_wire(), "errno": self.errno}


class NoFreeDevice(KernelError):
    """The kernel has no free NBD device."""

    dbus_name = _OWN + "NoFreeDevice"


class ConnectionNotServiced(KernelError):
    """The kernel took several connections and does not read from all of them; new ones may do. See `Client.bind`."""


class CallerError(NbddError):
    """The call is wrong, or the caller does not have the rights for it."""


class InvalidArgs(CallerError, ValueError):
    """Arguments of the wrong type, out of range, or with unknown keys."""

    dbus_name = _FREEDESKTOP + "InvalidArgs"


class AccessDenied(CallerError):
    """Polkit does not allow it."""

    dbus_name = _FREEDESKTOP + "AccessDenied"


class InteractiveAuthorizationRequired(CallerError):
    """Polkit wants to ask a person, and the caller did not allow that."""

    dbus_name = _FREEDESKTOP + "InteractiveAuthorizationRequired"


class WorkerFailed(NbddError):
    """A worker process ended before it had done what was asked."""


def _tree(root: type[NbddError]) -> dict[str, type[NbddError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_NAME = _tree(NbddError)
