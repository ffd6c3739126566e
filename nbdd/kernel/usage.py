# SPDX-License-Identifier: MIT
"""Who uses a device, in sentences, and a claim that keeps new users away while it is taken down."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nbdd.errors import Busy, KernelError, NotAttached
from nbdd.kernel.bounded import bounded
from nbdd.kernel.sysfs import SYSFS, Node, listing, read

if TYPE_CHECKING:
    from collections.abc import Iterator

OPEN_SECONDS = 10.0
"""Opening a device whose partitions are known needs no I/O; longer than this it hangs."""
_PAUSE = 0.05

# udev's workers open each new or changed device for a moment. They own nothing on it.
_PASSING = {"systemd-udevd", "(udev-worker)"}
_OCTAL = re.compile(r"\\([0-7]{3})")
_DISK = re.compile(r"nbd\d+")
_BLOCK_LINK = re.compile(r"/dev/|.*nbd")


class Usage:
    """Looks for users of a device; the roots are for tests. Finds processes of others only as root."""

    def __init__(self, *, proc: str = "/proc", sysfs_root: str = SYSFS) -> None:
        self._proc = proc
        self._sysfs = sysfs_root
        # Our own descriptors count as uses as well, except this one.
        self._claim: int | None = None

    def users(self, node: Node) -> list[str]:
        """One sentence (without its full stop) for each use of the disk or a partition; [] for none."""
        devices = self._devices(node)
        return self.claims(node) + self._processes(devices)

    def claims(self, node: Node) -> list[str]:
        """The users that hold the disk or a partition by the kernel: mounts, swap, what is stacked on it."""
        devices = self._devices(node)
        if not devices:
            return []
        found = self._mounts(devices)
        found += self._btrfs(devices, found)
        found += self._swaps(devices)
        found += self._holders(node, os.path.dirname(node.path))
        found += self._loops(devices)
        return found

    def all_claims(self, dev: str = "/dev") -> dict[str, list[str]]:
        """The claims on every NBD device of the machine by the path of its disk, in the words of `claims`.

        It looks once, however many devices there are, and at what is stacked from above.
        """
        names = {number: name for number, name in self._all_devices() if name.startswith("nbd")}
        devices = {number: f"{dev}/{name}" for number, name in names.items()}
        mounts = self._mounts(devices)
        found = mounts + self._btrfs(devices, mounts) + self._swaps(devices) + self._stacked(devices)
        claims: dict[str, list[str]] = {}
        for claim in found + self._loops(devices):
            disk = _DISK.match(claim.removeprefix(f"{dev}/"))
            if disk is not None:
                claims.setdefault(f"{dev}/{disk[0]}", []).append(claim)
        return claims

    def sees_all(self) -> bool:
        """Whether this process may look into all others; without that, users can be missing from what is found."""
        return os.access(f"{self._proc}/1/fd", os.R_OK)

    def written(self, node: Node) -> bool:
        """Whether a program has the disk or a partition open for writing, as mkfs does. A mount does not open it."""
        return any(
            int(line.removeprefix("flags:"), 8) & os.O_ACCMODE != os.O_RDONLY
            for _, fdinfo, _ in self._open_files(self._devices(node))
            for line in (read(fdinfo) or "").splitlines()
            if line.startswith("flags:")
        )

    def probed(self, node: Node) -> bool:
        """Whether udev is looking at the disk or a partition right now. It is never among the `users`."""
        return any(program in _PASSING for _, _, program in self._openers(self._devices(node)))

    @contextmanager
    def claim(self, node: Node, *, patience: float = 0.0, seconds: float = OPEN_SECONDS) -> Iterator[int]:
        """Hold the device exclusively: nothing is mounted, swapped or stacked on it meanwhile; yields a descriptor.

        The kernel refuses the claim (EBUSY) while the disk or a partition is mounted, swapped on or held; a process
        that merely has it open is found by looking. Raises Busy with the names after `patience` seconds, and
        TimedOut if the open hangs for `seconds`.

        The open does no I/O on a device whose partitions were scanned. If they were not (`settle` never ran), it
        would read them through the server; therefore it is bounded.
        """
        end = time.monotonic() + patience
        while True:
            fd = self._claim = self._open_exclusively(node, seconds)
            try:
                users = self.users(node)
                if fd is not None and not users:
                    yield fd
                    return
            finally:
                self._claim = None
                if fd is not None:
                    os.close(fd)
            if time.monotonic() >= end:
                raise Busy(f"{node.path} is in use: {'; '.join(users) or 'another program has claimed it'}.")
            # Closing a device raises no event that others can wait for.
            time.sleep(_PAUSE)

    @staticmethod
    def _devices(node: Node) -> dict[str, str]:
        """Path by "major:minor", for the disk and its partitions."""
        dev = os.path.dirname(node.path)
        return {number: f"{dev}/{name}" for name, number in node.devices().items()}

    @staticmethod
    def _open_exclusively(node: Node, seconds: float) -> int | None:
        """A descriptor, or None if the kernel says that it is claimed already."""
        try:
            return bounded(
                # Read-only, or udev would look at the device again when it is closed.
                lambda: os.open(node.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC),
                seconds,
                f"Opening {node.path} hangs; its server doesn't answer.",
                late=os.close,
            )
        except OSError as error:
            if error.errno == errno.EBUSY:
                return None
            if error.errno in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
                raise NotAttached(f"{node.path} is gone.") from error
            raise KernelError(f"{node.path} can't be opened: {error.strerror}.", error.errno) from error

    def _mounts(self, devices: dict[str, str]) -> list[str]:
        found: dict[tuple[str, str], None] = {}
        for path in self._mountinfos():
            for line in (read(path) or "").splitlines():
                # proc_pid_mountinfo(5): id parent major:minor root mount-point options ... - type source options
                left, _, right = line.partition(" - ")
                before, after = left.split(" "), right.split(" ")
                if len(before) < 5 or len(after) < 2:
                    continue
                # btrfs shows a device number of its own; its source still names one device.
                node = devices.get(before[2]) or self._known(_unescape(after[1]), devices)
                if node:
                    found[node, _unescape(before[4])] = None
        return [f"{node} is mounted on {where}" for node, where in found]

    def _mountinfos(self) -> Iterator[str]:
        """One mountinfo for each mount namespace in sight, our own and the system's first."""
        seen: set[str] = set()
        for pid in ("self", "1", *self._pids()):
            try:
                namespace = os.readlink(f"{self._proc}/{pid}/ns/mnt")
            except OSError:
                # Without the right to see the link, /proc/1 is still worth a try.
                if pid not in {"self", "1"}:
                    continue
                namespace = pid
            if namespace not in seen:
                seen.add(namespace)
                yield f"{self._proc}/{pid}/mountinfo"

    def _btrfs(self, devices: dict[str, str], mounts: list[str]) -> list[str]:
        """A btrfs of several devices names only one of them as its source, which is among the `mounts`."""
        mounted = {claim.partition(" ")[0] for claim in mounts}
        names = {os.path.basename(path): path for path in devices.values()}
        return [
            f"{names[member]} is part of the mounted btrfs {identifier}"
            for identifier in listing(f"{self._sysfs}/fs/btrfs")
            for member in listing(f"{self._sysfs}/fs/btrfs/{identifier}/devices")
            if member in names and names[member] not in mounted
        ]

    def _swaps(self, devices: dict[str, str]) -> list[str]:
        lines = (read(f"{self._proc}/swaps") or "").splitlines()[1:]
        paths = (self._known(_unescape(line.split()[0]), devices) for line in lines if line.strip())
        return [f"{path} is used as swap" for path in paths if path]

    def _holders(self, node: Node, dev: str) -> list[str]:
        return [
            self._held(f"{dev}/{name}", holder)
            for name in (node.name, *node.partitions())
            for holder in listing(f"{node.block_directory(name)}/holders")
        ]

    def _all_devices(self) -> Iterator[tuple[str, str]]:
        """The "major:minor" and the name of each disk and partition that has a size."""
        for line in (read(f"{self._proc}/partitions") or "").splitlines():
            # major minor #blocks name
            words = line.split()
            if len(words) == 4 and words[0].isdecimal():
                yield f"{words[0]}:{words[1]}", words[3]

    def _stacked(self, devices: dict[str, str]) -> list[str]:
        """As `_holders`, for all devices."""
        names = {os.path.basename(path): path for path in devices.values()}
        return [
            self._held(names[name], holder)
            for holder in listing(f"{self._sysfs}/block")
            if not holder.startswith("nbd")  # there may be hundreds, and none of them stands on another
            for name in listing(f"{self._sysfs}/block/{holder}/slaves")
            if name in names
        ]

    def _held(self, path: str, holder: str) -> str:
        label = read(f"{self._sysfs}/block/{holder}/dm/name")
        return f"{path} is held by {holder}" + (f" ({label})" if label else "")

    def _loops(self, devices: dict[str, str]) -> list[str]:
        found = []
        for name in listing(f"{self._sysfs}/block"):
            if name.startswith("loop"):
                path = self._known(read(f"{self._sysfs}/block/{name}/loop/backing_file") or "", devices)
                if path:
                    found.append(f"{path} is behind /dev/{name}")
        return found

    def _processes(self, devices: dict[str, str]) -> list[str]:
        return [
            f"{path} is open in process {pid} ({program})"
            for path, pid, program in self._openers(devices)
            if program not in _PASSING
        ]

    def _openers(self, devices: dict[str, str]) -> Iterator[tuple[str, str, str]]:
        """Device, process id and program of each process that has one open."""
        before = ""
        for path, _, pid in self._open_files(devices):
            if pid != before:
                yield path, pid, read(f"{self._proc}/{pid}/comm") or "?"
            before = pid

    def _open_files(self, devices: dict[str, str]) -> Iterator[tuple[str, str, str]]:
        """Device, fdinfo and process id of each descriptor of one, but for the claim."""
        for pid in self._pids():
            for fd in listing(f"{self._proc}/{pid}/fd"):
                if int(pid) == os.getpid() and fd == str(self._claim):
                    continue
                path = self._open_device(f"{self._proc}/{pid}/fd/{fd}", devices)
                if path:
                    yield path, f"{self._proc}/{pid}/fdinfo/{fd}", pid

    def _open_device(self, link: str, devices: dict[str, str]) -> str | None:
        try:
            target = os.readlink(link)
        except OSError:
            return None
        # Asking for the number of every open file could hang on a dead network filesystem.
        return self._known(target, devices, number_of=link) if _BLOCK_LINK.match(target) else None

    @staticmethod
    def _known(path: str, devices: dict[str, str], number_of: str | None = None) -> str | None:
        """Which of our devices `path` is, by its number, or by its name if it can't be looked at."""
        if not path.startswith("/"):
            return None
        if path in devices.values():
            return path
        try:
            status = os.stat(number_of or path)
        except OSError:
            return None
        if not stat.S_ISBLK(status.st_mode):
            return None
        return devices.get(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")

    def _pids(self) -> list[str]:
        return [name for name in listing(self._proc) if name.isdecimal()]


def _unescape(text: str) -> str:
    r"""The path behind the kernel's \040 and the like."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
