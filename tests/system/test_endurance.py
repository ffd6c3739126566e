# SPDX-License-Identifier: MIT
"""What nbdd holds after many rounds, and with many devices: nothing that it need not."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Show
from tests.scale import times
from tests.system.lab import ATTACH_SECONDS, Lab

ROOT = Path(__file__).parents[2]

ROUNDS = times(30, 200)
WARM_UP = 20

DEVICES = 64
WORKER_LIMIT, SERVICE_LIMIT = 1700, 45_000
"""KiB of PSS with so many devices attached: a worker on average; manager and fork server together. A worker was seen
with 1490 on Debian 12 and 1400 on Debian 13: it shares its parent's memory until it touches it, and leaves what touches
much to its children."""


def run(lab: Lab, module: str, arguments: str, timeout: float) -> Any:
    """Run one of our scripts in the guest; what it prints is JSON."""
    for script in ("bench/memory.py", "tests/system/in_guest/rounds.py"):
        lab.guest.write(f"/root/lab/{script}", (ROOT / script).read_text())
    return json.loads(lab.guest.run(f"cd /root/lab && python3 -m {module} {arguments}", timeout=timeout).stdout)


@pytest.mark.quick_on("debian12")
@pytest.mark.timeout(1200, func_only=True)
def test_rounds_of_attach_write_verify_detach_leave_nothing_behind(lab: Lab, show: Show, release: str) -> None:
    # UDisks looks at every new disk; how that goes is seen in test_main_job, and here it would take most of the time.
    lab.guest.run("systemctl stop udisks2")
    server = lab.nbdkit("memory 16M")
    lab.define(f"devices:\n  round: {{uri: '{server.uri}'}}\n")
    found = run(lab, "tests.system.in_guest.rounds", f"round --rounds {ROUNDS} --warm-up {WARM_UP}", timeout=1100)
    seconds, looks = found["seconds"], found["snapshots"]
    show(rounds_table(release, seconds, looks))
    first, last = looks[0], looks[-1]
    assert len(seconds) == ROUNDS
    assert (first["round"], last["round"]) == (WARM_UP, ROUNDS)
    assert {key: last[key] for key in ("workers", "bound", "records")} == {"workers": 0, "bound": 0, "records": 0}
    for kept in ("pids", "descriptors", "threads"):
        assert last[kept] == first[kept], kept
    before, after = sum(first["pss"].values()), sum(last["pss"].values())
    assert after <= before * 1.05, f"PSS of manager and fork server grew from {before} to {after} KiB"
    port = server.uri.split(":")[2].rstrip("/")
    # The kernel closes them behind the back of whom it tells that the device is free.
    lab.until(f'[ -z "$(ss -tnH state established dport = :{port})" ]', 30, what="no connection is left")
    # The kernel's log is looked at by the lab, after each test.


def rounds_table(release: str, seconds: list[float], looks: list[dict[str, Any]]) -> str:
    """The time of a round, and what was held along the way."""
    middle, most = statistics.median(seconds), max(seconds)
    lines = [
        f"{release}: {len(seconds)} rounds in {sum(seconds):.1f} s, {middle:.2f} s each (median), {most:.2f} s at most",
        f"{'round':>7}{'manager':>10}{'fork server':>13}{'together':>10}  KiB PSS{'fds':>8}{'threads':>9}",
    ]
    for look in looks:
        pss = look["pss"]
        fds, threads = ("+".join(map(str, look[key].values())) for key in ("descriptors", "threads"))
        lines.append(
            f"{look['round']:>7}{pss['manager']:>10}{pss['fork server']:>13}{sum(pss.values()):>10}"
            f"{fds:>17}{threads:>9}"
        )
    return "\n".join(lines)


@pytest.mark.prove_only
def test_memory_of_many_attached_devices_is_little(lab: Lab, show: Show, release: str) -> None:
    # What a test with thousands of devices left in the manager's heap is not what these cost.
    lab.guest.run("systemctl restart nbdd", timeout=ATTACH_SECONDS)
    server = lab.nbdkit("memory 16M")
    found = run(lab, "bench.memory", f"{server.uri} --devices {DEVICES} --json", timeout=500)
    show(f"{release}: {found['table']}")
    assert sum(process["role"] == "worker" for process in found["loaded"]) == DEVICES
    assert found["mean"] <= WORKER_LIMIT, "PSS of a worker, KiB"
    assert found["both"] <= SERVICE_LIMIT, "PSS of manager and fork server, KiB"
