# SPDX-License-Identifier: MIT
"""nbdd confined by the profile of config/apparmor: all that it does for a device, it still does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.lab import ATTACH_SECONDS, Lab
from tests.system.load import Load, strike
from tests.system.test_package import TESTS

PROFILE = Path(__file__).parents[2] / "config" / "apparmor" / "usr.bin.nbdd"
INSTALLED = "/etc/apparmor.d/usr.bin.nbdd"


@pytest.fixture
def confined(lab: Lab) -> Iterator[Lab]:
    """A guest whose nbdd is confined, as the profile's first lines say."""
    lab.guest.put(PROFILE, INSTALLED)
    lab.guest.run(f"apparmor_parser --replace {INSTALLED} && systemctl restart nbdd", timeout=ATTACH_SECONDS)
    yield lab
    lab.guest.run(
        f"apparmor_parser --remove {INSTALLED}; rm {INSTALLED}; systemctl restart nbdd", timeout=ATTACH_SECONDS
    )


@pytest.mark.prove_only
def test_apparmor_profile_lets_nbdd_attach_mend_adopt_and_name_who_uses_a_device(confined: Lab) -> None:
    lab = confined
    assert lab.guest.run(f"cat /proc/{lab.manager_pid()}/attr/current").stdout == "nbdd (enforce)\n"
    lab.guest.write("/root/main-job", (TESTS / "main-job").read_text(), mode=0o755)
    lab.guest.run("mkdir /root/tmp && AUTOPKGTEST_TMP=/root/tmp /root/main-job; e=$?; rm -r /root/tmp; exit $e")

    lab.guest.run("rm -f /root/disk.img; truncate -s 64M /root/disk.img")
    unit = "-p Restart=always -p RestartSec=100ms nbdkit -f -i 127.0.0.1 -p {port} file /root/disk.img"
    server = lab.serve(unit, "nbd://127.0.0.1:{port}/")
    lab.define(f"devices:\n  kept:\n    uri: {server.uri}\n")
    lab.attach("kept")
    load = Load(lab, "kept")
    try:
        killed = f"systemctl kill --kill-whom=all --signal=KILL {server.unit}"
        manager = "systemctl kill --kill-whom=main --signal=KILL nbdd"
        strike([load], {"kept": [("connection", killed), ("worker", "kill -KILL {worker}"), ("worker", manager)]}, 300)
        load.another_pass()
        load.end()
    finally:
        load.kill()
    assert lab.guest.run(f"cat /proc/{lab.manager_pid()}/attr/current").stdout == "nbdd (enforce)\n"
    assert "Permission denied" not in lab.guest.journal("nbdd")
    # As fio opens and closes the device.
    holder = "systemd-run -q --collect --unit=holder sh -c 'exec 3</dev/disk/by-nbd/kept; exec sleep 1000'"
    lab.guest.run(f"{holder}; until pgrep -x sleep; do :; done")
    done = lab.guest.run("nbdctl detach kept", check=False)
    assert "(sleep)" in done.stderr, done.stderr
    lab.guest.run("systemctl stop holder")
    lab.detach("kept", "{'wait': <uint32 10>}")
