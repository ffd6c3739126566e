# SPDX-License-Identifier: MIT
"""nbdd's own package, as `make deb` left it."""

from __future__ import annotations

from pathlib import Path

from tests.guest.errors import GuestError

_DIST = Path(__file__).parents[2] / "dist"


def newest(directory: Path = _DIST) -> Path | None:
    """Return the package that was built last, or None if there is none."""
    return max(directory.glob("nbdd_*_all.deb"), key=lambda path: path.stat().st_mtime_ns, default=None)


def required(directory: Path = _DIST) -> Path:
    """Return the package that was built last; `GuestError` if there is none."""
    found = newest(directory)
    if found is None:
        raise GuestError(f"there is no nbdd package in {directory}: run `make deb` first")
    return found
