# SPDX-License-Identifier: MIT
"""Notifications to systemd: READY, STATUS, RELOADING, STOPPING, the watchdog, and the descriptor store.

Without systemd, each of them does nothing.
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
    """One connection to the service manager that started this process."""

    def __init__(self) -> None:
        self._notifier = SystemdNotifier()
        # Children must not send notifications, nor expect a watchdog.
        os.environ.pop("NOTIFY_SOCKET", None)
        watched = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = int(os.environ.pop("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0

    def ready(self) -> None:
        """Report that the start, or a reload, is complete."""
        self._notifier.notify("READY=1")

    def reloading(self) -> None:
        """Report that a reload begins; `ready` ends it. systemd wants both fields in one datagram."""
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Report that the process is about to end."""
        self._notifier.notify("STOPPING=1")

    def status(self, text: str) -> None:
        """Set the line that ``systemctl status`` shows. sdnotify loses or garbles what is not ASCII."""
        self._notifier.notify("STATUS=" + text.encode("ascii", "backslashreplace").decode().replace("\n", " "))

    def keep_sockets(self, name: str, fds: Sequence[int]) -> None:
        """Have systemd keep duplicates of a device's sockets, instead of those it kept before, over a restart or crash.

        FDPOLL=0: a connection that dies meanwhile is kept too, as the successor must see that it is dead.
        """
        fdname = _to_fdname(name)
        self._notifier.notify(f"FDSTOREREMOVE=1\nFDNAME={fdname}")
        if fds and self._notifier.socket is not None:
            message = f"FDSTORE=1\nFDNAME={fdname}\nFDPOLL=0".encode()
            with contextlib.suppress(OSError):
                socket.send_fds(self._notifier.socket, [message], list(fds))

    async def watchdog(self) -> None:
        """Report at half the interval that the event loop runs; returns at once if no watchdog is set."""
        while self._watchdog:
            self._notifier.notify("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 2)


def kept_sockets() -> dict[str, list[int]]:
    """The descriptors that systemd kept, by device (sd_listen_fds_with_names(3)); only the first call returns them."""
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
