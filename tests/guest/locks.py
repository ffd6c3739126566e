# SPDX-License-Identifier: MIT
"""Locks of the cache: one process makes a thing, many use it, and what is in use is not removed."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.guest.progress import stage


@contextlib.contextmanager
def exclusive(path: Path, who: str) -> Iterator[None]:
    """Hold the lock file alone; `who` names what it waits for, if it has to wait."""
    with path.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with stage(f"waiting for {who}"):
                fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Keep a directory of the cache, which has a manifest, from being removed; `FileNotFoundError` if it is gone."""
    with (directory / "manifest.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield


def remove_unused(directory: Path) -> bool:
    """Remove a directory of the cache unless somebody uses it; says whether it is gone."""
    try:
        with (directory / "manifest.json").open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    except FileNotFoundError:
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        return False
    return True
