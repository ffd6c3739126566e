# SPDX-License-Identifier: MIT
"""The metrics as a part of the system: systemd's socket, the bus policy, the sandbox, and the real counters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.lab import ATTACH_SECONDS, Lab

pytestmark = pytest.mark.quick_on("debian13")

_GET = (
    "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:10819/metrics', timeout=60).read().decode())"
)


def scrape(lab: Lab, wanted: str) -> str:
    """The metrics, as soon as `wanted` is in them: on a busy machine a guest may be too slow for a scrape or two."""
    end = time.monotonic() + ATTACH_SECONDS
    while wanted not in (told := lab.guest.run(f'python3 -c "{_GET}"', user="nobody").stdout):
        assert time.monotonic() < end, told
    return told


@pytest.fixture
def switched_on(lab: Lab) -> Iterator[Lab]:
    assert lab.guest.run("systemctl is-enabled nbdd-metrics.socket", check=False).stdout == "disabled\n"
    assert lab.guest.run("systemctl is-active nbdd-metrics.socket", check=False).stdout == "inactive\n"
    lab.guest.run("systemctl start nbdd-metrics.socket")
    yield lab
    lab.guest.run("systemctl stop nbdd-metrics.socket nbdd-metrics.service")


def test_scrape_has_the_kernels_counters_and_runs_without_privileges(switched_on: Lab) -> None:
    lab = switched_on
    server = lab.nbdkit("memory 16M")
    lab.define(f"devices:\n  a-b:c.d:\n    uri: {server.uri}\n")
    lab.attach("a-b:c.d")
    lab.guest.run("dd if=/dev/zero of=/dev/disk/by-nbd/a-b:c.d bs=1M count=8 oflag=direct status=none")
    told = scrape(lab, 'nbdd_device_written_bytes_total{device="a-b:c.d"} 8.388608e+06\n')
    assert "nbdd_up 1.0\n" in told
    assert 'nbdd_device_state{device="a-b:c.d",nbdd_device_state="attached"} 1.0\n' in told
    assert 'nbdd_device_size_bytes{device="a-b:c.d"} 1.6777216e+07\n' in told
    lab.guest.run(
        "pid=$(systemctl show -P MainPID nbdd-metrics) && [ $(stat -c %U /proc/$pid) = nbdd-metrics ]"
        " && grep -q '^CapEff:.*0000000000000000$' /proc/$pid/status"
    )
    lab.guest.run("systemd-analyze security --offline=true --threshold=20 nbdd-metrics.service")


def test_scrape_of_a_stopped_nbdd_says_so_and_does_not_start_it(switched_on: Lab) -> None:
    lab = switched_on
    lab.guest.run("systemctl stop nbdd", timeout=120)
    scrape(lab, "nbdd_up 0.0\n")
    lab.guest.run("nbdd-metrics --textfile /run/nbdd.prom && grep -q '^nbdd_up 0' /run/nbdd.prom", user="root")
    assert lab.guest.run("systemctl is-active nbdd", check=False).stdout == "inactive\n"
    lab.guest.run("systemctl start nbdd", timeout=120)
    scrape(lab, "nbdd_up 1.0\n")


@pytest.mark.prove_only
def test_metrics_are_restarted_by_an_upgrade_if_they_are_on(switched_on: Lab, nbdd_deb: Path) -> None:
    lab = switched_on
    scrape(lab, "nbdd_up 1.0\n")
    before = lab.guest.run("systemctl show -P MainPID nbdd-metrics").stdout
    lab.guest.install(nbdd_deb)
    scrape(lab, "nbdd_up 1.0\n")
    assert lab.guest.run("systemctl show -P MainPID nbdd-metrics").stdout not in {before, "0\n"}
