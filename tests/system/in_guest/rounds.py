# SPDX-License-Identifier: MIT
"""Many rounds of attach, write, verify, detach on one configured device; put into a guest and run there.

    python3 -m tests.system.in_guest.rounds NAME --rounds 200 --warm-up 20 --link '' --link -part1

One connection to the bus, no process started in a round. Prints one JSON object: the seconds of every round, and what
the service held after the warm-up and at nine moments from there to the end. Ends with 1 and a sentence at the first
thing that is not as it should be; the links are looked at the moment a reply is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.memory import CallFailed, Service, processes

LINKS = Path("/dev/disk/by-nbd")
LENGTH = 1 << 17
"""Bytes written and read back in each round."""

SETTLE_SECONDS = 30
"""How long what Detach does not wait for may take, on a machine that is busy with other things."""


class Broken(Exception):
    """A promise was not kept."""


def write(node: Path, data: bytes, offset: int) -> None:
    """Write around the page cache, through to the server."""
    with mmap.mmap(-1, len(data)) as buffer:
        buffer[:] = data
        fd = os.open(node, os.O_WRONLY | os.O_DIRECT)
        try:
            done = os.pwritev(fd, [buffer], offset)
            os.fsync(fd)
        finally:
            os.close(fd)
    if done != len(data):
        raise Broken(f"{done} bytes of {len(data)} were written")


def read(node: Path, length: int, offset: int) -> bytes:
    """Read from the server, not from the page cache."""
    with mmap.mmap(-1, length) as buffer:
        fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
        try:
            done = os.preadv(fd, [buffer], offset)
        finally:
            os.close(fd)
        return buffer[:done]


def pattern(number: int) -> bytes:
    """What a round writes; no two rounds write the same."""
    return (b"round %08d |" % number * (LENGTH // 16 + 1))[:LENGTH]


async def one_round(service: Service, name: str, links: list[Path], number: int, offset: int) -> None:
    """Attach, write, verify, detach; the links are there when Attach replies, and gone when Detach does."""
    await service.attach(name)
    missing = [str(link) for link in links if not link.is_block_device()]
    if missing:
        raise Broken(f"round {number}: Attach has replied, and there is no {', '.join(missing)}")
    data = pattern(number)
    write(links[-1], data, offset)
    if read(links[-1], LENGTH, offset) != data:
        raise Broken(f"round {number}: what was read is not what was written")
    await service.detach(name)
    left = still_there()
    if left:
        raise Broken(f"round {number}: Detach has replied, and {', '.join(left)} is still there")


def still_there() -> list[str]:
    """The names of all links."""
    return sorted(path.name for path in LINKS.iterdir()) if LINKS.exists() else []


def held(number: int) -> dict[str, Any]:
    """What the service holds when nothing is attached."""
    found = processes()
    workers = [process for process in found if process.role not in {"manager", "fork server"}]
    records = Path("/run/nbdd/devices")
    return {
        "round": number,
        "pss": {process.role: process.pss for process in found if process not in workers},
        "descriptors": {process.role: process.descriptors for process in found if process not in workers},
        "threads": {process.role: process.threads for process in found if process not in workers},
        "pids": {process.role: process.pid for process in found if process not in workers},
        "workers": len(workers),
        "bound": len(list(Path("/sys/block").glob("nbd*/pid"))),
        "records": len(list(records.iterdir())) if records.exists() else 0,
    }


def settled(number: int) -> dict[str, Any]:
    """The same once the last worker is reaped, which Detach does not wait for."""
    end = time.monotonic() + SETTLE_SECONDS
    while (found := held(number))["workers"] and time.monotonic() < end:
        time.sleep(0.05)
    return found


async def run(name: str, rounds: int, warm_up: int, suffixes: list[str]) -> dict[str, Any]:
    """All rounds; the warm-up is part of them."""
    links = [LINKS / f"{name}{suffix}" for suffix in suffixes]
    looks = {warm_up + (rounds - warm_up) * part // 9 for part in range(10)}
    service = await Service.connect()
    seconds: list[float] = []
    snapshots: list[dict[str, Any]] = []
    try:
        for number in range(1, rounds + 1):
            start = time.monotonic()
            await one_round(service, name, links, number, number % 8 * LENGTH)
            seconds.append(time.monotonic() - start)
            if number in looks:
                snapshots.append(settled(number))
    finally:
        service.close()
    return {"seconds": seconds, "snapshots": snapshots}


def main() -> int:
    """Print the JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument(
        "--link", action="append", default=[], help="what follows NAME in a link that must be there; the last is used"
    )
    chosen = parser.parse_args()
    try:
        found = asyncio.run(run(chosen.name, chosen.rounds, chosen.warm_up, chosen.link or [""]))
    except (Broken, CallFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
