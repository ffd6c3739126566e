# SPDX-License-Identifier: MIT
"""What nbdd costs in memory: attach many devices, look at every process of the service, detach.

Run it as root where nbdd runs, with an NBD server to attach to, any number of times:

    python3 -m bench.memory nbd://127.0.0.1 --devices 64

PSS (proportional set size, /proc/PID/smaps_rollup) counts each shared page once for all who share it. So the sum over
the processes is what the service costs, and a forked worker is not charged for what it shares. All figures in KiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

UNIT = "nbdd.service"
AT_ONCE = 8
"""Calls under way at a time: enough to keep the service busy, too few to run into a caller's time limit."""


class CallFailed(Exception):
    """A D-Bus call failed; the text holds the error's name and sentence."""


class Service:
    """nbdd over one connection to the system bus."""

    def __init__(self, bus: Any) -> None:
        self._bus = bus

    @classmethod
    async def connect(cls) -> Service:
        """Connect. The library is imported here, so that the rest of this file needs none."""
        from dbus_next.aio import MessageBus  # noqa: PLC0415
        from dbus_next.constants import BusType  # noqa: PLC0415

        return cls(await MessageBus(bus_type=BusType.SYSTEM).connect())

    async def call(self, member: str, signature: str, *arguments: object) -> list[Any]:
        """Call a method of org.nbdd1.Manager; raises CallFailed."""
        from dbus_next import Message  # noqa: PLC0415
        from dbus_next.constants import MessageType  # noqa: PLC0415

        reply = await self._bus.call(
            Message("org.nbdd1", "/org/nbdd1", "org.nbdd1.Manager", member, signature=signature, body=list(arguments))
        )
        if reply.message_type is MessageType.ERROR:
            raise CallFailed(f"{member}: {reply.error_name}: {reply.body[0] if reply.body else ''}")
        found: list[Any] = reply.body
        return found

    async def attach(self, name: str) -> None:
        """Attach a configured device."""
        await self.call("Attach", "sa{sv}", name, {})

    async def attach_uri(self, uri: str, name: str) -> None:
        """Attach a device that no file defines."""
        from dbus_next import Variant  # noqa: PLC0415

        await self.call("AttachURI", "sa{sv}", uri, {"name": Variant("s", name)})

    async def detach(self, name: str) -> None:
        """Detach a device."""
        await self.call("Detach", "sa{sv}", name, {})

    def close(self) -> None:
        """Leave the bus."""
        self._bus.disconnect()


@dataclass(frozen=True)
class Process:
    """One process of the service."""

    pid: int
    role: str
    """`manager`, `fork server`, `worker`, `task` (a child of a worker, for a moment), or what else runs there."""
    pss: int
    """KiB; so are all that follow."""
    anonymous: int
    file: int
    private: int
    rss: int
    descriptors: int
    threads: int


def processes() -> list[Process]:
    """Every process in the service's control group, the manager first."""
    shown = subprocess.run(
        ["systemctl", "show", "-P", "MainPID", "-P", "ControlGroup", UNIT], capture_output=True, text=True, check=True
    ).stdout.split()
    main, group = sorted(shown, key=lambda word: word.startswith("/"))
    pids = Path(f"/sys/fs/cgroup{group}/cgroup.procs").read_text().split()
    found = []
    for pid in pids:
        try:
            found.append(_process(int(pid), int(main)))
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended while we looked.
    return sorted(found, key=lambda process: (_ROLES.index(process.role), process.pid))


_ROLES = ("manager", "fork server", "worker", "task", "other")


def _process(pid: int, main: int) -> Process:
    proc = Path(f"/proc/{pid}")
    rollup = Counter[str]()
    _add(rollup, (proc / "smaps_rollup").read_text().splitlines()[1:])
    if pid == main:
        role = "manager"
    elif (proc / "comm").read_text().startswith("nbdd:"):
        role = "worker"
    elif (proc / "comm").read_text().startswith("task:"):
        role = "task"
    else:
        role = "fork server" if b"forkserver" in (proc / "cmdline").read_bytes() else "other"
    return Process(
        pid=pid,
        role=role,
        pss=rollup["Pss"],
        anonymous=rollup["Pss_Anon"],
        file=rollup["Pss_File"],
        private=rollup["Private_Clean"] + rollup["Private_Dirty"],
        rss=rollup["Rss"],
        descriptors=len(list((proc / "fd").iterdir())),
        threads=len(list((proc / "task").iterdir())),
    )


def mappings(pid: int) -> list[tuple[str, int]]:
    """PSS by what is mapped (a library, the heap, anonymous memory), the largest first."""
    found = Counter[str]()
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = Path(words[5]).name if len(words) > 5 else "[anonymous]"
        elif words[0] == "Pss:":
            found[name] += int(words[1])
    return found.most_common()


def _add(total: Counter[str], lines: Iterable[str]) -> None:
    for line in lines:
        key, value = line.split()[:2]
        total[key.removesuffix(":")] += int(value)


@dataclass(frozen=True)
class Measurement:
    """What so many devices cost."""

    devices: int
    seconds: float
    """From the first call to the last reply of the attaching."""
    idle: list[Process]
    loaded: list[Process]
    worker: list[tuple[str, int]]
    """The mappings of one worker."""

    def mean(self) -> float:
        """PSS of a worker."""
        return _mean([process.pss for process in self.loaded if process.role == "worker"])

    def both(self) -> int:
        """PSS of manager and fork server with all devices attached."""
        return sum(process.pss for process in self.loaded if process.role in {"manager", "fork server"})

    def to_json(self) -> str:
        """All of it, for another program."""
        return json.dumps({**asdict(self), "mean": self.mean(), "both": self.both(), "table": self.table()})

    def table(self) -> str:
        """All of it, for a person."""
        head = f"{'KiB':<24}{'PSS':>8}{'anonymous':>11}{'files':>8}{'private':>9}{'RSS':>8}{'fds':>5}{'threads':>9}"
        lines = [f"memory with {self.devices} devices attached, in {self.seconds:.1f} s", head]
        for title, found in (("idle", self.idle), (f"{self.devices} attached", self.loaded)):
            lines += [
                _line(f"{process.role}, {title}", [process])
                for process in found
                if process.role in {"manager", "fork server"}
            ]
        workers = sorted((p for p in self.loaded if p.role == "worker"), key=lambda process: process.pss)
        if workers:
            lines += [_line("worker, least", workers[:1]), _line("worker, mean", workers)]
            lines.append(_line("worker, most", workers[-1:]))
        lines.append(f"{'all together':<24}{sum(process.pss for process in self.loaded):>8}")
        biggest = ", ".join(f"{name} {pss}" for name, pss in self.worker[:8] if pss)
        lines.append(f"one worker's PSS by mapping: {biggest}")
        return "\n".join(lines)


def _line(title: str, found: list[Process]) -> str:
    def of(field: str) -> int:
        return round(_mean([getattr(process, field) for process in found]))

    return (
        f"{title:<24}{of('pss'):>8}{of('anonymous'):>11}{of('file'):>8}{of('private'):>9}{of('rss'):>8}"
        f"{of('descriptors'):>5}{of('threads'):>9}"
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


async def measure(uri: str, devices: int) -> Measurement:
    """Attach, look, detach."""
    service = await Service.connect()
    names = [f"bench-{number}" for number in range(devices)]
    places = asyncio.Semaphore(AT_ONCE)
    attached: list[str] = []

    async def attach(name: str) -> None:
        async with places:
            await service.attach_uri(uri, name)
            attached.append(name)

    async def detach(name: str) -> None:
        async with places:
            await service.detach(name)

    try:
        idle = processes()
        start = time.monotonic()
        outcomes = await asyncio.gather(*map(attach, names), return_exceptions=True)
        seconds = time.monotonic() - start
        loaded = processes()
        workers = [process.pid for process in loaded if process.role == "worker"]
        detail = mappings(workers[len(workers) // 2]) if workers else []
        outcomes += await asyncio.gather(*map(detach, attached), return_exceptions=True)
    finally:
        service.close()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return Measurement(devices, seconds, idle, loaded, detail)


def main() -> int:
    """Print the table, or with --json all figures."""
    parser = argparse.ArgumentParser(description="Measure the memory of nbdd with many devices attached.")
    parser.add_argument("uri", help="an export that may be attached many times")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    try:
        found = asyncio.run(measure(chosen.uri, chosen.devices))
    except CallFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(found.to_json() if chosen.json else found.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
