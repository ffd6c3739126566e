# SPDX-License-Identifier: MIT
"""Runs in a guest with nbdd: loads on three devices, faults by a seed, and a verdict as JSON.

python3 campaign.py SECONDS SEED [nbdd.deb]
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HOME = Path("/root/chaos")
LOOK_INTERVAL = 5.0
"""Seconds between two looks whether the kernel complains."""

SETTLE_SECONDS = 240.0
"""For everything to be whole again after the last fault."""

TROUBLE = re.compile(
    r"I/O error|WARNING:|BUG:|Oops|blocked for more than|general protection|refcount_t|list_del corruption|"
    r"EXT4-fs error|Remounting filesystem read-only|XFS .*(?:error|[Ss]hutdown|[Cc]orruption)"
)


def run(command: str, *, check: bool = True, seconds: float = 300) -> str:
    """What a shell command prints."""
    done = subprocess.run(
        command, shell=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    if check and done.returncode:
        raise RuntimeError(f"{command}: exit {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Device:
    """One device, its server and what is on it."""

    name: str
    port: int
    server: str
    """The server's command; it serves HOME/NAME.img."""
    keys: str
    """More keys of its definition."""
    filesystem: str = ""
    may_term: bool = True
    """Whether the server just closes on SIGTERM. nbdkit answers ESHUTDOWN first, and the kernel makes EIO of that."""

    @property
    def unit(self) -> str:
        """The server's unit."""
        return f"chaos-{self.name}"

    @property
    def node(self) -> str:
        """Its name in the kernel."""
        return Path(f"/dev/disk/by-nbd/{self.name}").resolve().name

    @property
    def mount(self) -> Path:
        """Where its filesystem is."""
        return HOME / "mnt" / self.name

    def start(self) -> None:
        """Start the server, if it does not run."""
        image = HOME / f"{self.name}.img"
        command = self.server.format(port=self.port, image=image, name=self.name)
        # What we kill comes back when we say so; what dies by itself (nbdkit, over an assertion of its own) at once.
        unit = f"--unit={self.unit} -p Restart=on-abort -p RestartPreventExitStatus=SIGKILL -p StartLimitIntervalSec=0"
        run(f"systemctl is-active -q {self.unit} || systemd-run -q --collect {unit} {command}", check=False)


DEVICES = (
    Device("raw", 11801, "nbdkit -f -i 127.0.0.1 -p {port} file {image}", "network-timeout: 8", may_term=False),
    Device("ext", 11802, "qemu-nbd -t -f raw -b 127.0.0.1 -p {port} -x {name} {image}", "network-timeout: 15", "ext4"),
    Device(
        "xfs",
        11803,
        "nbdkit -f -i 127.0.0.1 -p {port} file {image}",
        "connections: 3",
        filesystem="xfs",
        may_term=False,
    ),
)


class Load(threading.Thread):
    """Something that writes, reads back and compares, over and over. `trouble` is what it met."""

    def __init__(self, name: str, once: Callable[[int], None], stop: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self._once = once
        self._stop_it = stop
        self.rounds = 0
        self.trouble = ""

    def run(self) -> None:
        """Until it is asked to stop, or something is wrong."""
        try:
            while not self._stop_it.is_set():
                self._once(self.rounds)
                self.rounds += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the verdict
            self.trouble = f"{type(error).__name__}: {error}"


def fio(_round: int) -> None:
    """Random writes, eight at once, around the page cache; all read back and verified."""
    run(
        "fio --name=raw --filename=/dev/disk/by-nbd/raw --rw=randwrite --bs=4k --size=4M --iodepth=8 --ioengine=libaio"
        " --direct=1 --verify=crc32c --verify_fatal=1",
        seconds=900,
    )


class Database:
    """SQLite with fsync: what was committed is there, and whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[int, str] = {}
        with sqlite3.connect(path) as base:
            base.execute("create table data (id integer primary key, octets blob)")
        base.close()

    def once(self, number: int) -> None:
        """One commit, and now and then a look at all of them."""
        octets = os.urandom(20_000)
        base = sqlite3.connect(self._path)
        try:
            base.execute("pragma synchronous=full")
            with base:
                base.execute("insert into data values (?, ?)", (number, octets))
                base.execute("delete from data where id < ?", (number - 200,))
            self._sums[number] = hashlib.sha256(octets).hexdigest()
            self._sums.pop(number - 201, None)
            if number % 25 == 0:
                self.check(base)
        finally:
            base.close()

    def check(self, base: sqlite3.Connection) -> None:
        """Every committed row, as it was."""
        [(verdict,)] = base.execute("pragma integrity_check").fetchall()
        found = {number: hashlib.sha256(octets).hexdigest() for number, octets in base.execute("select * from data")}
        if verdict != "ok" or found != self._sums:
            raise AssertionError(f"the database: {verdict}; {len(found)} rows of {len(self._sums)}")


def make_origin(origin: Path) -> None:
    """A repository with some history."""
    run(f"git init -q -b main {origin}")
    for commit in range(10):
        for number in range(20):
            (origin / f"file-{number}").write_bytes(random.Random(commit * 100 + number).randbytes(20_000))
        run(f"cd {origin} && git add -A && git -c user.name=n -c user.email=n@example.org commit -q -m {commit}")


def clone(origin: Path, where: Path) -> Callable[[int], None]:
    """Clone it, check it, compare it, take it away."""

    def once(number: int) -> None:
        place = where / f"clone-{number}"
        run(f"git clone -q --no-hardlinks {origin} {place} && sync -f {place}", seconds=900)
        run("echo 1 >/proc/sys/vm/drop_caches")
        run(f'cd {place} && git fsck --full --strict && test -z "$(git status --porcelain)"', seconds=900)
        run(f"diff -r --exclude=.git {origin} {place}", seconds=900)
        shutil.rmtree(place)

    return once


# Faults: each is begun, lasts, and is undone.


def server_killed(rng: random.Random) -> Iterator[float]:
    device = rng.choice(DEVICES)
    run(f"systemctl kill --signal=KILL {device.unit}", check=False)
    yield rng.uniform(0, 4)
    device.start()


def server_restarted(rng: random.Random) -> Iterator[float]:
    device = rng.choice([device for device in DEVICES if device.may_term])
    run(f"systemctl stop {device.unit}", check=False)
    yield rng.uniform(0, 2)
    device.start()


def server_stopped(rng: random.Random) -> Iterator[float]:
    device = rng.choice(DEVICES)
    run(f"systemctl kill --signal=STOP {device.unit}", check=False)
    yield rng.uniform(1, 10)
    run(f"systemctl kill --signal=CONT {device.unit}", check=False)


def packets_dropped(rng: random.Random) -> Iterator[float]:
    port = rng.choice(DEVICES).port
    run("nft add table inet chaos && nft add chain inet chaos in '{ type filter hook input priority 0; }'")
    for side in ("dport", "sport"):
        run(f"nft add rule inet chaos in tcp {side} {port} drop")
    yield rng.uniform(1, 14)
    run("nft delete table inet chaos")


def connections_reset(rng: random.Random) -> Iterator[float]:
    port = rng.choice(DEVICES).port
    run(f"ss -K state established dport = :{port} || ss -K dport = :{port}", check=False)
    yield 0


def network_slow(rng: random.Random) -> Iterator[float]:
    run(f"tc qdisc add dev lo root netem delay {rng.randint(1, 30)}ms loss {rng.randint(0, 10)}%", check=False)
    yield rng.uniform(2, 8)
    run("tc qdisc del dev lo root", check=False)


def worker_killed(rng: random.Random) -> Iterator[float]:
    workers = run("pgrep '^nbdd:'", check=False).split()
    for pid in rng.sample(workers, rng.randint(1, len(workers))) if workers else []:
        run(f"kill -KILL {pid}", check=False)
    yield 0


def manager_killed(rng: random.Random) -> Iterator[float]:
    whom = rng.choice(("main", "all"))
    run(f"systemctl kill --signal=KILL --kill-whom={whom} nbdd", check=False)
    yield rng.uniform(0, 1)


def fork_server_killed(_rng: random.Random) -> Iterator[float]:
    main = run("systemctl show -P MainPID nbdd")
    run(f"kill -KILL $(pgrep -P {main})", check=False)
    yield 0


def restarted(_rng: random.Random) -> Iterator[float]:
    run("systemctl restart nbdd")
    yield 0


def upgraded(_rng: random.Random) -> Iterator[float]:
    if len(sys.argv) > 3:
        run(f"dpkg --force-confold -i {sys.argv[3]}")
    yield 0


def reloaded(rng: random.Random) -> Iterator[float]:
    define(f"  other-{rng.randint(0, 9)}: {{uri: nbd://127.0.0.1:1/x}}\n")
    run("systemctl reload nbdd", check=False)
    yield 0


def links_exchanged(rng: random.Random) -> Iterator[float]:
    run(f"nbdctl reconnect {rng.choice(DEVICES).name}", check=False)
    yield 0


def timeout_changed(rng: random.Random) -> Iterator[float]:
    device = rng.choice(DEVICES)
    run(f"nbdctl set-timeout {device.name} {rng.choice((0, 0, 20, 60))}", check=False)
    yield 0


FAULTS: tuple[Callable[[random.Random], Iterator[float]], ...] = (
    *3 * (server_killed,), server_restarted, server_stopped, packets_dropped, connections_reset, network_slow,
    *2 * (worker_killed,), *2 * (manager_killed,), fork_server_killed, restarted, upgraded, reloaded, timeout_changed,
    links_exchanged,
)  # fmt: skip


def define(more: str = "") -> None:
    """Write the definitions of the devices."""
    text = "devices:\n" + "".join(
        f"  {device.name}:\n    uri: nbd://127.0.0.1:{device.port}/{device.name if 'qemu' in device.server else ''}\n"
        f"    {device.keys}\n"
        for device in DEVICES
    )
    Path("/etc/nbdd/devices.d/chaos.yaml").write_text(text + more)


@contextmanager
def stage() -> Iterator[dict[str, str]]:
    """Servers, devices and filesystems; yields who bound each device."""
    run(f"rm -rf {HOME}; mkdir -p {HOME}/mnt")
    for device in DEVICES:
        run(f"truncate -s 320M {HOME}/{device.name}.img")
        device.start()
    define()
    run("systemctl reload nbdd")
    for device in DEVICES:
        run(f"until ss -ltnH sport = :{device.port} | grep -q .; do sleep 0.1; done", seconds=60)
        run(f"nbdctl attach {device.name}")
        if device.filesystem:
            run(f"mkfs.{device.filesystem} -q /dev/disk/by-nbd/{device.name}; mkdir -p {device.mount}")
            run(f"mount /dev/disk/by-nbd/{device.name} {device.mount}")
    try:
        yield {device.name: f"{device.node} {Path(f'/sys/block/{device.node}/pid').read_text()}" for device in DEVICES}
    finally:
        run("rm -f /etc/nbdd/devices.d/chaos.yaml; systemctl reload nbdd", check=False)
        run(f"systemctl stop {' '.join(device.unit for device in DEVICES)}; rm -rf {HOME}", check=False)


def kernel_trouble(since: float) -> list[str]:
    """What the kernel complained of since then, in seconds since 1970; from the journal, as its own log forgets."""
    told = run(f"journalctl -k -b --no-pager -o short-precise --since=@{since:.0f}", check=False)
    return [line for line in told.splitlines() if TROUBLE.search(line)]


def play(seconds: float, seed: int, loads: list[Load], since: float) -> Counter[str]:
    """Fault after fault, sometimes two at once; all are undone at the end. Returns how often each was played.

    It ends early if a load or the kernel is in trouble, so that what led to it is still in the journal.
    """
    played: Counter[str] = Counter()
    # Each fault has chances of its own: which come, and what each does, does not depend on how long anything takes.
    coming = enumerate(iter(partial(random.Random(seed).choice, FAULTS), None))
    number, fault = next(coming)
    under_way: list[tuple[float, str, Iterator[float]]] = []
    end = time.monotonic() + seconds
    looked = time.monotonic()
    while time.monotonic() < end or under_way:
        if any(load.trouble for load in loads):
            end = 0
        elif time.monotonic() > looked + LOOK_INTERVAL:
            looked = time.monotonic()
            end = 0 if kernel_trouble(since) else end
        for due, name, steps in sorted(under_way, key=lambda entry: entry[0]):
            if due <= time.monotonic():
                next(steps, None)
                under_way.remove((due, name, steps))
        names = {name for _, name, _ in under_way}
        if time.monotonic() < end and len(under_way) < 2 and fault.__name__ not in names:
            chance = random.Random(f"{seed} {number}")
            steps = fault(chance)
            under_way.append((next(steps) + time.monotonic(), fault.__name__, steps))
            played[fault.__name__] += 1
            number, fault = next(coming)
            time.sleep(chance.uniform(0.1, 1.5))
        else:
            time.sleep(0.1)
    return played


def whole_again() -> str:
    """Wait until every device has all its connections; what is wrong, or ""."""
    end = time.monotonic() + SETTLE_SECONDS
    told: dict[str, object] = {}
    while time.monotonic() < end:
        for device in DEVICES:
            device.start()
        try:
            told = {device["name"]: device["state"] for device in json.loads(run("nbdctl list --json"))["devices"]}
        except (RuntimeError, ValueError) as error:
            told = {"nbdctl": str(error)}
        if all(told.get(device.name) == "attached" for device in DEVICES):
            return ""
        time.sleep(0.5)
    return f"not whole again within {SETTLE_SECONDS:.0f} s: {told}"


def verdict(bound: dict[str, str], loads: list[Load], since: float) -> list[str]:
    """All that is not as it should be, after the last fault."""
    found = [f"{load.name}: {load.trouble}" for load in loads if load.trouble]
    found += [f"{load.name}: hangs" for load in loads if load.is_alive()]
    for device in DEVICES:
        now = f"{device.node} {Path(f'/sys/block/{device.node}/pid').read_text()}"
        if now != bound[device.name]:
            found.append(f"{device.name} was bound again: {bound[device.name]!r}, now {now!r}")
        if device.filesystem and not any(load.is_alive() for load in loads):
            run(f"umount {device.mount}")
            path = f"/dev/disk/by-nbd/{device.name}"
            check = f"e2fsck -fn {path}" if device.filesystem == "ext4" else f"xfs_repair -n {path}"
            try:
                run(check)
            except RuntimeError as error:
                found.append(str(error))
    for device in DEVICES:
        try:
            run(f"nbdctl detach {device.name} --wait 20")
        except RuntimeError as error:
            found.append(str(error))
    return found + kernel_trouble(since)


def main() -> int:
    """See above."""
    seconds, seed = float(sys.argv[1]), int(sys.argv[2])
    make_origin_at = HOME / "origin"
    stop = threading.Event()
    with stage() as bound:
        make_origin(make_origin_at)
        ext, xfs = (device.mount for device in DEVICES if device.filesystem)
        loads = [
            Load("fio on raw", fio, stop),
            Load("SQLite on ext4", Database(ext / "base.sqlite").once, stop),
            Load("git on ext4", clone(make_origin_at, ext), stop),
            Load("SQLite on xfs", Database(xfs / "base.sqlite").once, stop),
            Load("git on xfs", clone(make_origin_at, xfs), stop),
        ]
        since = time.time()
        for load in loads:
            load.start()
        played = play(seconds, seed, loads, since)
        wrong = [told] if (told := whole_again()) else []
        stop.set()
        for load in loads:
            load.join(SETTLE_SECONDS)
        wrong += verdict(bound, loads, since)
    print(
        json.dumps(
            {
                "seed": seed,
                "seconds": seconds,
                "faults": dict(sorted(played.items())),
                "rounds": {load.name: load.rounds for load in loads},
                "wrong": wrong,
            }
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A load that hangs can't be ended.
    os._exit(code)
