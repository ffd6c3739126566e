# SPDX-License-Identifier: MIT
"""What the kernel says about its NBD devices, read from sysfs.

`pid`, `size` and `backend` say whether a device is bound. The netlink STATUS command does not: it claims
"connected" for a device that somebody merely opened (drivers/block/nbd.c, populate_nbd_status).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from nbdd.errors import KernelError
from nbdd.kernel.bounded import bounded
from nbdd.kernel.node_name import DEV, node_path

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSFS = "/sys"
WRITE_SECONDS = 2.0
"""For a write of `queue/io_timeout`, which may wait for a server."""

KERNEL_IO_TIMEOUT = 30_000
"""Milliseconds; the `queue/io_timeout` of a device that was given no other."""

SECTOR = 512
"""Bytes; sysfs counts sizes and I/O in sectors of this size, whatever the block size."""

# Documentation/block/stat.rst; times in milliseconds, amounts in sectors.
_STATISTICS = (
    "read-requests", "read-merges", "read-sectors", "read-milliseconds",
    "write-requests", "write-merges", "write-sectors", "write-milliseconds",
    "in-flight", "busy-milliseconds", "queue-milliseconds",
    "discard-requests", "discard-merges", "discard-sectors", "discard-milliseconds",
    "flush-requests", "flush-milliseconds",
)  # fmt: skip


def read(path: str) -> str | None:
    """The text of a sysfs or proc file without its newline, or None if it can't be read.

    A device may go while it is read: ENODEV and ENXIO mean the same as an absent file.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError as error:
        _check(path, error)
        return None


def _check(path: str, error: OSError) -> None:
    """Raise KernelError if this process or the system lacks resources: that says nothing about the file."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise KernelError(f"{path} can't be read: {error.strerror}.", error.errno) from error


class Node:
    """One /dev/nbdX, bound or not. Holds no state: every property asks the kernel again."""

    __slots__ = ("directory", "index", "name", "path", "sysfs")

    def __init__(self, index: int, *, sysfs: str = SYSFS, dev: str = DEV) -> None:
        self.index = index
        self.name = f"nbd{index}"
        self.sysfs = sysfs
        self.path = node_path(index, dev=dev)
        self.directory = f"{sysfs}/block/{self.name}"

    def __repr__(self) -> str:
        return f"Node({self.index})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.directory == other.directory

    def __hash__(self) -> int:
        return hash(self.directory)

    @property
    def exists(self) -> bool:
        """Whether the kernel has made this device, bound or not."""
        return os.path.isdir(self.directory)

    @property
    def pid(self) -> int | None:
        """The thread that bound the device, or None while it isn't bound. It may be gone and its number given away."""
        return self._number("pid")

    @property
    def bound(self) -> bool:
        """Whether some program has bound the device."""
        return self.pid is not None

    @property
    def size(self) -> int:
        """Bytes; 0 while not bound."""
        return (self._number("size") or 0) * SECTOR

    @property
    def backend(self) -> str | None:
        """The identifier given with CONNECT (for ours: the device's name), or None."""
        return read(f"{self.directory}/backend") or None

    @property
    def read_only(self) -> bool:
        """Whether the kernel refuses writes."""
        return self._number("ro") == 1

    @property
    def block_size(self) -> int:
        """Logical block size in bytes; 0 if the device is gone."""
        return self._number("queue/logical_block_size") or 0

    @property
    def diskseq(self) -> int | None:
        """The kernel's counter of disks, or None before Linux 5.15."""
        return self._number("diskseq")

    @property
    def io_timeout(self) -> int:
        """Milliseconds until the kernel looks after a request that got no answer."""
        return self._number("queue/io_timeout") or 0

    def set_io_timeout(self, milliseconds: int) -> None:
        """Write `queue/io_timeout`; raise KernelError if the kernel refuses. See `io_timeout`.

        From Linux 6.12 on the kernel first waits for all requests under way (queue_attr_store freezes the queue), which
        with a server that doesn't answer may be for ever, and takes no new ones meanwhile: TimedOut then, after
        WRITE_SECONDS. It is written all the same as soon as they have ended.
        """
        path = f"{self.directory}/queue/io_timeout"

        def write() -> None:
            # Not O_CREAT: a device that went must not become a file.
            with open(path, "r+b", buffering=0) as file:
                file.write(b"%d" % milliseconds)

        try:
            bounded(write, WRITE_SECONDS, f"The request timer of {self.path} waits for requests under way.")
        except OSError as error:
            raise KernelError(
                f"The request timer of {self.path} can't be set to {milliseconds} ms: {error.strerror}.", error.errno
            ) from error

    def partitions(self) -> list[str]:
        """Kernel names of the partitions, "nbd0p1" first."""
        found: list[tuple[int, str]] = []
        try:
            entries = os.listdir(self.directory)
        except OSError:
            return []
        for entry in entries:
            if entry.startswith(self.name):
                number = self._number(f"{entry}/partition")
                if number is not None:
                    found.append((number, entry))
        return [name for _, name in sorted(found)]

    def devices(self) -> dict[str, str]:
        """The disk and its partitions: kernel name to "major:minor"."""
        found: dict[str, str] = {}
        for name in (self.name, *self.partitions()):
            number = read(f"{self.block_directory(name)}/dev")
            if number:
                found[name] = number
        return found

    def statistics(self) -> dict[str, int]:
        """I/O counters since the kernel made the device (Documentation/block/stat.rst); {} if it is gone."""
        words = (read(f"{self.directory}/stat") or "").split()
        return {key: int(word) for key, word in zip(_STATISTICS, words, strict=False)}

    def block_directory(self, name: str) -> str:
        """The sysfs directory of the disk or of one of its partitions."""
        return self.directory if name == self.name else f"{self.directory}/{name}"

    def _number(self, attribute: str) -> int | None:
        text = read(f"{self.directory}/{attribute}")
        return int(text) if text is not None and text.strip().isdecimal() else None


def listing(path: str) -> list[str]:
    """The entries of a directory in order, [] if there is none."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        _check(path, error)
        return []


def nodes(*, sysfs: str = SYSFS, dev: str = DEV) -> Iterator[Node]:
    """Every NBD device the kernel has made, by index."""
    names = (name[3:] for name in listing(f"{sysfs}/block") if name.startswith("nbd"))
    for index in sorted(int(number) for number in names if number.isdecimal()):
        yield Node(index, sysfs=sysfs, dev=dev)


def find(backend: str, *, sysfs: str = SYSFS, dev: str = DEV) -> list[Node]:
    """The bound devices that carry this identifier; more than one only after something went wrong."""
    return [node for node in nodes(sysfs=sysfs, dev=dev) if node.backend == backend and node.bound]


def module_loaded(*, sysfs: str = SYSFS) -> bool:
    """Whether the kernel has its NBD driver at hand, as a module or built in."""
    return os.path.isdir(f"{sysfs}/module/nbd")


def highest_index(*, sysfs: str = SYSFS) -> int:
    """The largest X of /dev/nbdX that the kernel can make.

    It gives each device a fixed share of its 2**20 minor numbers, for the partitions (nbd.c, part_shift).
    """
    most = read(f"{sysfs}/module/nbd/parameters/max_part") or ""
    return (1 << 20 >> (int(most) if most.isdecimal() else 0).bit_length()) - 1
