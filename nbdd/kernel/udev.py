# SPDX-License-Identifier: MIT
"""Wait until udev has finished with a device: its partitions known, its links made or gone.

How it is known: an event with a token of ours is written into the device's `uevent` file
(Documentation/ABI/testing/sysfs-uevent). The kernel sends it to udevd, which handles the events of a disk and its
partitions in order and then sends them on, the token still in them, to the multicast group that libudev reads.
So when ours comes back, everything before it is done too. It also cures Linux 6.1, where the uevent of CONNECT
comes before the `backend` file that the rule for the links wants to read.

For a disk that was just bound it is an `add`, as if it had been plugged in; for all else a `change`. The kernel's own
event is a `change`, as the node was there before, and upon that LVM activates no volume and mdadm assembles no array
(69-lvm.rules, 64-md-raid-assembly.rules).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Self

from nbdd.errors import KernelError, TimedOut
from nbdd.kernel.bounded import bounded

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdd.kernel.sysfs import Node

CONTROL = "/run/udev/control"
"""Exists while udevd runs."""

NETLINK_KOBJECT_UEVENT = 15
GROUP_UDEV = 2
SO_RCVBUFFORCE = 33

# libudev's monitor header (systemd, src/libsystemd/sd-device/device-monitor.c): prefix, magic (big-endian), then
# header size, offset and length of the properties.
_HEADER = struct.Struct("=8s4sIII")
_PREFIX = b"libudev\0"
_MAGIC = b"\xfe\xed\xca\xfe"
_TOKEN = b"SYNTH_UUID="

_RECEIVE = 65536
_BUFFER = 4 * 1024 * 1024
"""Bytes; while many devices come up at once, each process that waits receives the events of all."""
_LOOK = 0.25
"""Seconds after which a device that has gone meanwhile is looked for, and not waited for any longer."""
_NODE_PAUSE = 0.02


class Monitor:
    """Receives the events that udevd has finished."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        self._socket = sock if sock is not None else self._open()
        self.lost = False

    @staticmethod
    def _open() -> socket.socket:
        try:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT)
        except OSError as error:
            raise KernelError(f"udev's events can't be received: {error.strerror}.", error.errno) from error
        try:
            # Only root may go beyond the system's limit; anybody else gets what there is.
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        try:
            sock.bind((0, GROUP_UDEV))
        except OSError as error:
            sock.close()
            raise KernelError(f"udev's events can't be received: {error.strerror}.", error.errno) from error
        return sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def tokens(self, seconds: float) -> list[str]:
        """Tokens of synthetic events that udevd has finished, [] after `seconds`.

        Sets `lost` if the kernel had to drop events; those that it kept are still read.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(max(seconds, 0.0) * 1000):
            return []
        found: list[str] = []
        while True:
            try:
                data = self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"udev's events can't be received: {error.strerror}.", error.errno) from error
                self.lost = True
                continue
            token = synthetic_token(data)
            if token:
                found.append(token)


def synthetic_token(data: bytes) -> str | None:
    """The SYNTH_UUID in one message of libudev's monitor, or None.

    Who sent it is not asked: a token is 122 random bits, and only a program that sees udev's events can know one.
    """
    if len(data) < _HEADER.size:
        return None
    prefix, magic, _, offset, length = _HEADER.unpack_from(data)
    if prefix != _PREFIX or magic != _MAGIC:
        return None
    for entry in data[offset : offset + length].split(b"\0"):
        if entry.startswith(_TOKEN):
            return entry[len(_TOKEN) :].decode("ascii", errors="replace")
    return None


def settle(
    node: Node,
    seconds: float,
    *,
    new: bool = True,
    nudge: Callable[[], None] | None = None,
    control: str = CONTROL,
    monitor: Monitor | None = None,
) -> bool:
    """Return True when udev has handled everything that happened to the disk and its partitions so far.

    A `new` disk's node is opened once first, since the kernel looks for partitions on the first open. That reads
    through the server and may hang for good: then TimedOut is raised after `seconds`, and DISCONNECT frees the
    thread that is left waiting. `nudge` is called after two seconds of that, and again and again while udev is waited
    for: it may end a device whose server is gone. Returns False if udev needs longer than `seconds`, True at once if no
    udevd runs. Raises KernelError if the device is gone or this process lacks the rights.
    """
    end = time.monotonic() + seconds
    if new:
        scan_partitions(node, seconds, nudge=nudge)
    if not os.path.exists(control):
        return True
    done: set[str] = set()
    with monitor if monitor is not None else Monitor() as events:
        while True:
            # Partitions that a rescan brought up meanwhile come in here.
            wanted = [name for name in (node.name, *node.partitions()) if name not in done]
            if not wanted:
                return True
            tokens = {name: new_token() for name in wanted}
            pending = {
                token: name
                for name, token in tokens.items()
                if trigger(node, name, token, "add" if new and name == node.name else "change")
            }
            left = _wait(events, node, pending, end, nudge)
            if left and time.monotonic() >= end:
                return False
            done.update(name for name in wanted if name not in left)


def _wait(
    events: Monitor, node: Node, pending: dict[str, str], end: float, nudge: Callable[[], None] | None
) -> set[str]:
    """Wait until the tokens in `pending` are back or their devices gone.

    Returns the devices still to come: at `end`, and before it if events were lost and no more arrive.
    """
    events.lost = False
    while pending:
        left = end - time.monotonic()
        if left <= 0:
            break
        tokens = events.tokens(min(left, _LOOK))
        if events.lost and not tokens:
            break
        if nudge is not None and not tokens:
            nudge()
        for token in tokens:
            pending.pop(token, None)
        pending = {token: name for token, name in pending.items() if os.path.exists(_uevent(node, name))}
    return set(pending.values())


def trigger(node: Node, name: str, token: str, action: str) -> bool:
    """Send `add` or `change` with `token` for the disk or a partition; False if it is gone."""
    try:
        with open(_uevent(node, name), "r+b", buffering=0) as file:
            file.write(f"{action} {token}".encode())
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
            return False
        raise KernelError(f"no event of {name} can be sent to udev: {error.strerror}.", error.errno) from error
    return True


def _uevent(node: Node, name: str) -> str:
    return f"{node.block_directory(name)}/uevent"


def new_token() -> str:
    """A random UUID, in the only form that the kernel takes (lib/kobject_uevent.c)."""
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}"


def scan_partitions(node: Node, seconds: float, *, nudge: Callable[[], None] | None = None) -> None:
    """Open the node once and close it, for the kernel to look for partitions, or to drop those of a dead device."""
    end = time.monotonic() + seconds
    stuck = f"{node.path} can't be read within {seconds:g} seconds; its server doesn't answer."

    def touch() -> None:
        os.close(os.open(node.path, os.O_RDONLY | os.O_CLOEXEC))

    while True:
        try:
            # Nothing to do for one that comes back late: it has closed what it opened.
            bounded(touch, end - time.monotonic(), stuck, nudge=nudge)
        except OSError as error:
            # devtmpfs makes the node before CONNECT answers; a /dev without it gets its nodes from udev, later.
            if error.errno not in {errno.ENOENT, errno.ENXIO} or not node.exists:
                raise KernelError(f"{node.path} can't be opened: {error.strerror}.", error.errno) from error
            if time.monotonic() + _NODE_PAUSE >= end:
                raise TimedOut(f"{node.path} did not appear within {seconds:g} seconds.") from error
            time.sleep(_NODE_PAUSE)
        else:
            return
