# SPDX-License-Identifier: MIT
"""nbdd keeps remote disks attached to Linux. Programs use its library: `Client` and `connect`; see docs/client.md."""

from __future__ import annotations

TYPE_CHECKING = False
"""As in `typing`, which costs every start more than all the rest of this."""

if TYPE_CHECKING:
    from nbdd.client.client import Client
    from nbdd.client.open import Connection, connect
    from nbdd.client.service import End, Reason
    from nbdd.errors import NbddError

__version__ = "0.1.0"

__all__ = ["Client", "Connection", "End", "NbddError", "Reason", "connect"]

_HOMES = {
    "Client": "nbdd.client.client",
    "Connection": "nbdd.client.open",
    "End": "nbdd.client.service",
    "NbddError": "nbdd.errors",
    "Reason": "nbdd.client.service",
    "connect": "nbdd.client.open",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Loaded when asked for: the parts of the daemon start with less.
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module  # noqa: PLC0415

        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
