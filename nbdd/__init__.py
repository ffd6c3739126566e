# SPDX-License-Identifier: MIT
"""nbdd keeps remote disks attached to Linux. Programs use its library: `Client` and `connect`; see docs/client.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdd.client import Client
    from nbdd.connection import Connection, connect
    from nbdd.errors import NbddError
    from nbdd.service import End, Reason

__version__ = "0.1.0"

__all__ = ["Client", "Connection", "End", "NbddError", "Reason", "connect"]

_HOMES = {
    "Client": "nbdd.client",
    "Connection": "nbdd.connection",
    "End": "nbdd.service",
    "NbddError": "nbdd.errors",
    "Reason": "nbdd.service",
    "connect": "nbdd.connection",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the parts of the daemon start with less.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
