# SPDX-License-Identifier: MIT
"""What can go wrong with a call to nbdd, as the errors of `nbdd.errors` with a sentence for a person."""

from __future__ import annotations

from collections.abc import Iterator

from nbdd.bus.wire.calls import CallError
from nbdd.bus.wire.names import DBUS_ERROR, DBUS_NAME
from nbdd.errors import AccessDenied, InvalidConfig, NbddError, NoSuchDevice
from nbdd.text import clause

SEE_JOURNAL = "See `systemctl status nbdd`."

_ENDED = frozenset({DBUS_ERROR + "NoReply", DBUS_ERROR + "Disconnected"})
_NOT_THERE = frozenset({DBUS_ERROR + "ServiceUnknown", DBUS_ERROR + "NameHasNoOwner"})
_UNKNOWN_OBJECT = frozenset(
    {DBUS_ERROR + "UnknownObject", DBUS_ERROR + "UnknownInterface", DBUS_ERROR + "UnknownMethod"}
)
# What the bus, or systemd by way of the bus, answers if it could not start nbdd for us.
_NOT_STARTED = (DBUS_ERROR + "TimedOut", DBUS_ERROR + "Timeout", DBUS_ERROR + "Spawn.", "org.freedesktop.systemd1.")


class UnknownObject(NbddError):
    """There is no such object, interface or method; only the caller knows which device was meant."""


def error_of(problem: CallError, *, activated: bool) -> NbddError:
    """The exception for an error that came over the bus. A call that was not `activated` starts no service."""
    name, text = problem.name, problem.text
    if name in _NOT_THERE and not activated:
        return NbddError(f"nbdd is not running. {SEE_JOURNAL}")
    if name in _UNKNOWN_OBJECT:
        return UnknownObject(text)
    if name in _ENDED:
        return NbddError(f"nbdd ended before it answered, so what was asked may or may not be done. {SEE_JOURNAL}")
    if name in _NOT_THERE:
        return NbddError(f"nbdd is not running and D-Bus does not know how to start it; is it installed? {SEE_JOURNAL}")
    if name.startswith(_NOT_STARTED):
        return NbddError(f"nbdd is not running and could not be started ({clause(text or name)}). {SEE_JOURNAL}")
    if name == AccessDenied.dbus_name and problem.sender == DBUS_NAME:
        return AccessDenied(f"The system bus does not let this user talk to nbdd ({clause(text)}).")
    found = {kind.dbus_name: kind for kind in _classes(NbddError) if "dbus_name" in vars(kind)}.get(name, NbddError)
    if found is InvalidConfig:
        return InvalidConfig(*text.splitlines())
    return found(text or f"nbdd failed with {name} and gave no reason.")


def no_device(name: str) -> NoSuchDevice:
    """No device has this name."""
    return NoSuchDevice(f"No device is named {name!r}; `nbdctl list` shows those there are.")


def no_bus(problem: Exception) -> NbddError:
    """The system bus of this machine can't be reached."""
    return NbddError(
        f"The system bus can't be reached ({_reason(problem)}), and nbdd is spoken to over it. {SEE_JOURNAL}"
    )


def no_remote_bus(host: str, problem: Exception, said: str | None) -> NbddError:
    """The system bus of `host` can't be reached; `said` is what ssh wrote, "" for nothing, None if it did not end."""
    reason = _reason(problem) if said is None else said or "it hung up"
    return NbddError(f"The system bus of {host} can't be reached with ssh: {reason}.")


def _classes(root: type[NbddError]) -> Iterator[type[NbddError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


def _reason(problem: Exception) -> str:
    if isinstance(problem, TimeoutError):
        return "it does not answer"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    return "it hung up" if isinstance(problem, EOFError) else clause(str(problem)) or type(problem).__name__
