# SPDX-License-Identifier: MIT
"""Guests that were booted once and saved: restoring one takes two seconds, a boot and the installation half a minute.

A snapshot is a directory of the cache: the guest's memory as a file that is mapped, the state of its devices, and its
disk, an overlay of the image's. It is never written to again. Its key is all that decides what is in it: the image (its
build, not its recipe alone), what the package holds, QEMU's version and arguments, the processor, the guest's size, and
what is done before it is saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest import host, qemu
from tests.guest.errors import GuestError
from tests.guest.image import Image, cache
from tests.guest.locks import exclusive, in_use, remove_unused
from tests.guest.progress import say, stage

VARIABLE = "NBDD_GUEST_SNAPSHOTS"
"""In the environment: `no` has every guest booted."""

KEPT = 2
"""Snapshots of a release that stay in the cache; each takes half a GiB."""

QUIESCE = (
    # Nothing that the boot or the installation set off is still at work, and all of it is on the disk.
    'systemctl is-system-running --wait; until [ -z "$(systemctl list-jobs --no-legend)" ]; do sleep 0.1; done;'
    "udevadm settle; journalctl --sync; sync"
)
"""What is run in the guest before it is saved."""

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A saved guest: a directory of the cache, never written to again."""

    directory: Path

    @property
    def disk(self) -> Path:
        """What was written to the disk, over the image's."""
        return self.directory / "disk.qcow2"

    @property
    def saved(self) -> qemu.Saved:
        """The machine itself."""
        return qemu.Saved(self.directory / "memory", self.directory / "devices")

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep it from being removed; `FileNotFoundError` if it is gone."""
        with in_use(self.directory):
            # The last use decides which go first.
            os.utime(self.directory)
            yield

    def discard(self) -> None:
        """Remove it, unless another guest runs on it: then it restored there, and the next one finds out again."""
        remove_unused(self.directory)


Make = Callable[[Snapshot], None]


def wanted() -> bool:
    """Whether guests are restored at all; raises `GuestError` if the variable is neither yes nor no."""
    said = os.environ.get(VARIABLE) or "yes"
    if said not in ("yes", "no"):
        raise GuestError(f"{VARIABLE} is {said!r}; it can be yes or no")
    return said == "yes"


def key(image: Image, package: Path, *, memory: int, cpus: int) -> str:
    """Return twelve hex digits for all that decides what a snapshot holds."""
    parts = (
        *(_FORMAT, image.identity, _sum(package), qemu.machine(), qemu.accelerator(image).arguments),
        *(memory, cpus, QUIESCE),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def ensure(image: Image, package: Path, make: Make, *, memory: int, cpus: int) -> Snapshot:
    """Return the snapshot of an image with a package installed; `make` fills the directory of one that is missing.

    Two at once wait for each other. Those that were used least recently are removed once nobody uses them.
    """
    home = cache() / "snapshots"
    home.mkdir(exist_ok=True)
    found = Snapshot(home / f"{image.release}-{key(image, package, memory=memory, cpus=cpus)}")
    if found.directory.is_dir():
        return found
    with exclusive(home / f"{image.release}.lock", f"another snapshot of {image.release}"):
        if not found.directory.is_dir():
            _remove_leftovers(home, image.release)
            with stage(f"{image.release}: making a snapshot with {package.name}"):
                _make(found, image.release, make)
            _remove_oldest(home, image.release)
    return found


def _make(wanted: Snapshot, release: str, make: Make) -> None:
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f"{release}.making-", dir=wanted.directory.parent))
    try:
        made = Snapshot(work)
        make(made)
        # The guest had most of its memory never in use: holes take no room, and no time to read.
        host.command(["fallocate", "--dig-holes", str(made.saved.memory)], "making memory's file sparse", timeout=120)
        manifest = {"release": release, "made": int(time.time()), "seconds": round(time.monotonic() - start, 1)}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        work.rename(wanted.directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_leftovers(home: Path, release: str) -> None:
    # Under the lock: whoever made these is dead.
    for path in home.glob(f"{release}.making-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_oldest(home: Path, release: str) -> None:
    found = sorted(home.glob(f"{release}-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found[KEPT:]:
        if not remove_unused(path):
            say(f"{path.name}: an older snapshot, in use by a running guest, is kept")


def _sum(package: Path) -> str:
    with package.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()
