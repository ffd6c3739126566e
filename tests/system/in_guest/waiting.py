# SPDX-License-Identifier: MIT
"""Runs in a guest: what becomes of reads whose server is away. Prints one JSON object.

    waiting.py DEVICE LINK SECONDS COMMAND_TO_STOP COMMAND_TO_START

A read is sent to a server that is stopped, so that it is under way when the server is killed; another one comes
after that. The server is started again after SECONDS. LINK is what the kernel says when it has a new connection, "" for
what is never given one. Not what nbdd says: it waits a second before it does.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LIMIT = 120.0


class Read(threading.Thread):
    """One sector, around the page cache."""

    def __init__(self, device: str, offset: int) -> None:
        super().__init__(daemon=True)
        self._fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        self._offset = offset
        self.ended: float | None = None
        self.error = ""
        self.start()

    def run(self) -> None:
        """Read, and note when that ended, and how."""
        try:
            os.preadv(self._fd, [mmap.mmap(-1, 4096)], self._offset)
        except OSError as error:
            self.error = os.strerror(error.errno or 0)
        self.ended = time.monotonic()


def in_flight(device: str) -> int:
    """Requests under way."""
    name = Path(device).resolve().name
    return sum(map(int, Path(f"/sys/block/{name}/inflight").read_text().split()))


def lines(log: int) -> Iterator[str]:
    """What the kernel has said since it was asked last."""
    with suppress(BlockingIOError):
        while True:
            yield os.read(log, 8192).decode(errors="replace")


def main() -> None:
    """See above."""
    device, link, seconds, stop, start = sys.argv[1:]
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    subprocess.run(f"{stop} STOP", shell=True, check=True)
    early = Read(device, 0)
    while not in_flight(device):
        time.sleep(0.005)
    killed = time.monotonic()
    subprocess.run(f"{stop} KILL", shell=True, check=True)
    late = Read(device, 1 << 16)
    back = None
    started = None
    while time.monotonic() < killed + LIMIT and (
        early.ended is None or late.ended is None or (link and started and back is None)
    ):
        if started is None and time.monotonic() >= killed + float(seconds):
            subprocess.run(start, shell=True, check=True)
            started = time.monotonic()
        if back is None and link and any(link in line for line in lines(log)):
            back = time.monotonic()
        time.sleep(0.005)

    def since(moment: float | None, event: float | None) -> float | None:
        return None if moment is None or event is None else round(event - moment, 2)

    told = {
        name: {
            "error": read.error,
            "after the kill": since(killed, read.ended),
            "after the server was back": since(started, read.ended),
            "after the connection was back": since(back, read.ended),
        }
        for name, read in (("early", early), ("late", late))
    }
    print(json.dumps(told))
    # A read that still waits can't be ended.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
