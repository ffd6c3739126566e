# SPDX-License-Identifier: MIT
"""What a process does to itself right after a fork: its title, its descriptors, and when it is to die."""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Iterable
from contextlib import suppress


def set_title(text: str) -> None:
    """Show the text, cut to 15 bytes, in ``ps -o comm`` and ``top``."""
    # Not as a text file: the first one that a process opens costs it 900 KiB.
    try:
        fd = os.open("/proc/self/comm", os.O_WRONLY)
    except OSError:
        return  # a nicety
    os.write(fd, text[:15].encode())
    os.close(fd)


def close_all_but(*kept: int) -> None:
    """Close every descriptor of this process but 0 to 2 and these: a fresh fork has no use for the others."""
    found: Iterable[int]
    try:
        found = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        # No descriptor is left to list them with.
        found = range(os.sysconf("SC_OPEN_MAX"))
    for fd in found:
        if fd > 2 and fd not in kept:
            # The one that listed the directory is closed already.
            with suppress(OSError):
                os.close(fd)


def die_at_end_of(pipe: int) -> None:
    """Have the kernel kill this process as soon as no process has the other end of `pipe` open (fcntl(2), F_SETSIG)."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)
    poll = select.poll()
    poll.register(pipe, 0)
    if poll.poll(0):
        os._exit(0)  # It happened before.
