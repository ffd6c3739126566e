# SPDX-License-Identifier: MIT
"""What nbdd tells systemd: READY, STATUS, RELOADING, STOPPING, the watchdog, and the descriptor store.

Without systemd all of it is a no-op.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Sequence

from sdnotify import SystemdNotifier


class Notifier:
    """One connection to the service manager that started us."""

    def __init__(self) -> None:
        self._notifier = SystemdNotifier()
        # Children must not speak for us, and must not believe they are watched.
        os.environ.pop("NOTIFY_SOCKET", None)
        watched = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = int(os.environ.pop("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0

    def ready(self) -> None:
        """Started, or reloaded."""
        self._notifier.notify("READY=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it. Both fields go in one datagram, as systemd wants them."""
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The end begins."""
        self._notifier.notify("STOPPING=1")

    def extend(self, seconds: float) -> None:
        """Ask for that much more time to start or to stop."""
        self._notifier.notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``. sdnotify loses or garbles what is not ASCII."""
        self._notifier.notify("STATUS=" + text.encode("ascii", "backslashreplace").decode().replace("\n", " "))

    def keep_sockets(self, name: str, fds: Sequence[int]) -> None:
        """Have systemd keep duplicates of a device's links, instead of those it kept before, across a restart or crash.

        FDPOLL=0: a link that dies meanwhile is kept too, as its death is what the successor wants to see.
        """
        fdname = _to_fdname(name)
        self._notifier.notify(f"FDSTOREREMOVE=1\nFDNAME={fdname}")
        if fds and self._notifier.socket is not None:
            message = f"FDSTORE=1\nFDNAME={fdname}\nFDPOLL=0".encode()
            with contextlib.suppress(OSError):
                socket.send_fds(self._notifier.socket, [message], list(fds))

    async def watchdog(self) -> None:
        """Tell at half the interval that the loop turns; returns at once where no watchdog is set."""
        while self._watchdog:
            self._notifier.notify("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 2)


def kept_sockets() -> dict[str, list[int]]:
    """The descriptors that systemd kept, by device (sd_listen_fds_with_names(3)); for the first call only."""
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or len(names) != count:
        return {}
    found: dict[str, list[int]] = {}
    for number, fdname in enumerate(names):
        fd = _LISTEN_FDS_START + number
        os.set_inheritable(fd, False)
        found.setdefault(_from_fdname(fdname), []).append(fd)
    return found


_LISTEN_FDS_START = 3


def _to_fdname(name: str) -> str:
    # A descriptor's name can't hold the colon that separates names, a device's name can.
    return name.replace(":", "+")


def _from_fdname(fdname: str) -> str:
    return fdname.replace("+", ":")
