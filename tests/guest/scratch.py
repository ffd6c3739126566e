# SPDX-License-Identifier: MIT
"""A private directory with a short name, which does not outlive its owner for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "nbdd-guest-"

_LOCKLESS_SECONDS = 86400


class Scratch:
    """A directory under the system's temporary one.

    Its owner holds a lock in it. A killed owner cannot remove it, so whoever makes the next one does: a guest's
    overlay can hold gigabytes.
    """

    def __init__(self) -> None:
        """Make it, and remove what dead owners left."""
        _remove_orphans(Path(tempfile.gettempdir()))
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = (self.directory / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it with all it holds; again does nothing."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()


def _remove_orphans(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        try:
            status = path.lstat()
            if status.st_uid != os.geteuid() or path.is_symlink():
                continue
            with (path / "lock").open("r") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            # No lock yet: it is being made at this moment, or its owner died while making it.
            if path.exists() and time.time() - path.stat().st_mtime > _LOCKLESS_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
