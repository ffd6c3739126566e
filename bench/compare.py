# SPDX-License-Identifier: MIT
"""Two packages of nbdd in one guest, in turns: memory, the start of nbdctl, and the time of an attach, as ratios.

Run it on the machine that has the guests, with the two packages:

    python3 -m bench.compare before.deb after.deb --release debian13 --rounds 3

Each round installs one package, then the other, so that a machine whose speed drifts slows both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from tests.guest.guest import Guest
from tests.guest.recipe import RELEASES

TREE = Path(__file__).resolve().parents[1]
DEVICES = 16
SAMPLES = 7
"""Of each time, in each round; the median counts."""

_SERVER = "nbdkit --port=10999 --ipaddr=127.0.0.1 --pidfile=/run/bench.pid memory 16M"

_TIMES = f"""
import json, statistics, subprocess, time
def seconds(*command):
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start
called = ("busctl", "call", "org.nbdd1", "/org/nbdd1", "org.nbdd1.Manager")
attach, nbdctl = [], []
for _ in range({SAMPLES}):
    attach.append(seconds(*called, "AttachURI", "sa{{sv}}", "nbd://127.0.0.1:10999", "1", "name", "s", "timed"))
    subprocess.run((*called, "Detach", "sa{{sv}}", "timed", "0"), check=True, stdout=subprocess.DEVNULL)
    nbdctl.append(seconds("nbdctl", "list"))
print(json.dumps({{"attach, s": statistics.median(attach), "nbdctl list, s": statistics.median(nbdctl)}}))
"""


def look(guest: Guest, package: Path) -> dict[str, float]:
    """All figures of one package, which is installed for them."""
    guest.install(package)
    guest.run("systemctl restart nbdd", timeout=120)
    done = guest.run(f"cd /root/bench && python3 -m bench.memory nbd://127.0.0.1:10999 --devices {DEVICES} --json")
    memory = json.loads(done.stdout)
    figures = {"worker, PSS KiB": float(memory["mean"])}
    for process in memory["idle"]:
        figures[f"{process['role']}, PSS KiB, idle"] = float(process["pss"])
    guest.run("cat >/root/bench/times.py", input=_TIMES.encode())
    figures |= json.loads(guest.run("python3 /root/bench/times.py", timeout=300).stdout)
    return figures


def main() -> int:
    """Print a row for each figure: before, after, after by before."""
    parser = argparse.ArgumentParser(description="Compare two packages of nbdd in one guest.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--release", choices=sorted(RELEASES), default="debian13")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    found: dict[Path, dict[str, list[float]]] = {chosen.before: defaultdict(list), chosen.after: defaultdict(list)}
    with Guest(chosen.release) as guest:
        guest.write("/root/bench/bench/memory.py", (TREE / "bench/memory.py").read_text())
        guest.run(_SERVER)
        for _ in range(chosen.rounds):
            for package, figures in found.items():
                for name, value in look(guest, package).items():
                    figures[name].append(value)
    print(f"{chosen.release}, medians of {chosen.rounds} rounds{'before':>24}{'after':>10}{'ratio':>8}")
    for name, values in found[chosen.before].items():
        before, after = median(values), median(found[chosen.after][name])
        print(f"{name:<42}{before:>14.2f}{after:>10.2f}{after / before:>8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
