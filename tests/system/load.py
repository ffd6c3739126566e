# SPDX-License-Identifier: MIT
"""Devices under fio, and what strikes them meanwhile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.system.lab import Lab

# Writes and verifies over and over until it is told to stop; its exit code is the verdict.
_FIO = """\
#!/bin/sh
passes=0
while [ ! -e /run/$1.stop ]; do
    fio --name=$1 --filename=/dev/disk/by-nbd/$1 --rw=randwrite --bs=4k --size=2M --iodepth=8 --ioengine=libaio \\
        --direct=1 --verify=crc32c --verify_fatal=1 --output=/run/$1.log || exit 1
    passes=$((passes + 1))
    echo $passes > /run/$1.passes
done
"""


class Load:
    """An attached device under fio, eight requests at a time, from the first one on; `end` waits for the verdict."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.unit = f"load-{name}"
        self.before = lab.device(name)
        self.kernel_name = self.before["Node"].removeprefix("/dev/")
        self.binding = self._binding()
        lab.guest.write("/run/load.sh", _FIO, 0o755)
        # BindsTo and the like must not touch it: it is somebody else's program.
        lab.guest.run(
            f"rm -f /run/{name}.stop /run/{name}.passes; systemctl reset-failed {self.unit} 2>/dev/null;"
            f"systemd-run -q --unit={self.unit} /run/load.sh {name}"
        )
        lab.until(f"grep -q '[1-9]' /sys/block/{self.kernel_name}/inflight", 60, what="fio began", unit=self.unit)

    def another_pass(self) -> None:
        """Wait until fio has written and verified everything once more, begun after this call."""
        self.lab.until(
            f"[ $(cat /run/{self.name}.passes 2>/dev/null || echo 0) -ge "
            f"{self._passes() + 2} ] || ! systemctl -q is-active {self.unit}",
            300,
            what="fio goes on",
        )
        assert self.lab.guest.run(f"systemctl is-active {self.unit}", check=False).stdout.strip() == "active", (
            self._log()
        )

    def end(self) -> None:
        """Stop fio; it must have met no error, on a device that was never bound again."""
        self.lab.guest.run(f"touch /run/{self.name}.stop")
        self.lab.until(f"! systemctl -q is-active {self.unit}", 300)
        failed = self.lab.guest.run(f"systemctl is-failed {self.unit}", check=False).stdout.strip()
        assert failed != "failed", self._log()
        after = self.lab.device(self.name)
        assert after["State"] == "attached"
        assert after["Node"] == self.before["Node"]
        assert after["AttachedSince"] == self.before["AttachedSince"]
        assert self._binding() == self.binding, "the device was bound again"
        # Since this test began: a device that was detached in an earlier one may have had a reader, udev's for one.
        assert [line for line in self.lab.kernel_log() if "I/O error" in line] == []

    def kill(self) -> None:
        """End fio whatever it does, and forget how it ended."""
        self.lab.guest.run(
            f"systemctl stop {self.unit} 2>/dev/null; systemctl reset-failed {self.unit} 2>/dev/null", check=False
        )

    def _passes(self) -> int:
        return int(self.lab.guest.run(f"cat /run/{self.name}.passes 2>/dev/null || echo 0").stdout)

    def _binding(self) -> str:
        # The thread that gave the kernel the device; the next binding has another. (diskseq stays over bindings.)
        return self.lab.guest.run(f"cat /sys/block/{self.kernel_name}/pid").stdout.strip()

    def _log(self) -> str:
        return self.lab.guest.run(
            f"cat /run/{self.name}.log; journalctl -u {self.unit} -u nbdd -n 40 --no-pager"
        ).stdout


@dataclass(frozen=True)
class Recovery:
    """What a device went through."""

    seconds: list[float]
    """From each strike until the device was attached, with what the strike had taken replaced."""
    since_start: list[float]
    """The same from when the manager was started that ran by then."""

    def __str__(self) -> str:
        return f"{len(self.seconds)} strikes, {told(self.seconds)}"


def told(seconds: Sequence[float]) -> str:
    """Median and maximum, for `show`."""
    return f"{statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s at most"


def emulation(lab: Lab) -> float:
    """How many times longer Python takes to start in the guest, under whatever load there is, than here when it can.

    What a real processor needs is what an emulated one needed, divided by this.
    """
    start = "import asyncio, yaml, dbus_next.aio"
    script = "for i in 1 2 3 4 5; do s=$(date +%s%N); python3 -c '{}'; echo $(($(date +%s%N) - s)); done"
    there = [int(line) / 1e9 for line in lab.guest.run(script.format(start), timeout=300).stdout.split()]
    here = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", start], check=True)
        here.append(time.monotonic() - began)
    return statistics.median(there) / min(here)


def strike(
    loads: Sequence[Load], strikes: Mapping[str, Sequence[tuple[str, str]]], seconds: float
) -> dict[str, Recovery]:
    """See strikes.py; `seconds` is for all of them. No strike may cost a device its binding."""
    lab = loads[0].lab
    lab.guest.put(Path(__file__).with_name("in_guest") / "strikes.py", "/run/strikes.py")
    done = lab.guest.run("python3 /run/strikes.py", input=json.dumps(strikes).encode(), check=False, timeout=seconds)
    assert done.returncode == 0, f"{done.stderr}\n{lab.guest.journal('nbdd', 40)}"
    found = json.loads(done.stdout)
    for load in loads:
        bound_by = {strike["bound_by"] for strike in found.get(load.name, ())}
        assert bound_by <= {load.binding}, f"{load.name} was bound again"
    return {
        name: Recovery([strike["seconds"] for strike in told], [strike["since_start"] for strike in told])
        for name, told in found.items()
    }
