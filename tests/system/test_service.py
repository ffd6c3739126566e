# SPDX-License-Identifier: MIT
"""nbdd as a part of the system: units, and the package from its installation to its purge."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import CleanGuest
from tests.system.lab import ATTACH_SECONDS, Lab

# Whether the pages of Documentation= can be shown is man's business, which a guest does without.
_VERIFY = "cd /usr/lib/systemd/system && systemd-analyze verify --man=no ./nbdd.service ./nbdd-attach@.service"


def test_units_verify_clean_with_an_exposure_of_at_most_3(lab: Lab) -> None:
    done = lab.guest.run(f"{_VERIFY} 2>&1")
    assert [line for line in done.stdout.splitlines() if "nbdd" in line] == []
    lab.guest.run("systemd-analyze security --offline=true --threshold=30 nbdd.service")


def test_attach_unit_attaches_when_started_and_detaches_when_stopped(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M")
    lab.define(f"devices:\n  a-b:c.d:\n    uri: {server.uri}\n")
    lab.guest.run("systemctl start nbdd-attach@a-b:c.d", timeout=ATTACH_SECONDS)
    assert lab.device("a-b:c.d")["State"] == "attached"
    lab.guest.run("test -b /dev/disk/by-nbd/a-b:c.d")
    lab.guest.run("systemctl stop nbdd-attach@a-b:c.d", timeout=ATTACH_SECONDS)
    assert lab.device("a-b:c.d")["State"] == "detached"


def test_attach_unit_succeeds_if_the_device_is_attached_or_detached_already(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M")
    lab.define(f"devices:\n  x:\n    uri: {server.uri}\n")
    lab.attach("x")
    lab.guest.run("systemctl start nbdd-attach@x", timeout=ATTACH_SECONDS)
    lab.detach("x")
    lab.guest.run("systemctl stop nbdd-attach@x", timeout=ATTACH_SECONDS)
    assert lab.guest.run("systemctl is-failed nbdd-attach@x", check=False).stdout.strip() != "failed"


def test_bus_call_starts_the_service(lab: Lab) -> None:
    lab.guest.run("systemctl stop nbdd", timeout=120)
    version = lab.guest.run("busctl --timeout=90 get-property org.nbdd1 /org/nbdd1 org.nbdd1.Manager Version").stdout
    assert version.startswith('s "')
    lab.guest.run("systemctl is-active nbdd")


def test_reload_of_a_bad_file_fails_with_its_line_and_changes_nothing(lab: Lab) -> None:
    lab.define("devices:\n  good:\n    uri: nbd://127.0.0.1:1/\n")
    lab.guest.write("/etc/nbdd/devices.d/test.yaml", "devices:\n  good:\n    uri: nbd://127.0.0.1:1/\n    tiemout: 3\n")
    done = lab.guest.run("systemctl reload nbdd", check=False, timeout=ATTACH_SECONDS)
    assert done.returncode != 0
    told = lab.guest.journal("nbdd", 20)
    assert "/etc/nbdd/devices.d/test.yaml:4:5: device 'good': key 'tiemout'" in told
    assert list(lab.devices()) == ["good"]
    lab.guest.run("systemctl is-active nbdd")


def test_start_with_a_bad_file_and_nothing_attached_fails_once_and_says_why(lab: Lab) -> None:
    lab.guest.run("systemctl stop nbdd", timeout=120)
    lab.guest.write("/etc/nbdd/devices.d/test.yaml", "devices: [\n")
    assert lab.guest.run("systemctl start nbdd", check=False, timeout=ATTACH_SECONDS).returncode != 0
    assert lab.guest.run("systemctl show -P ExecMainStatus nbdd").stdout.strip() == "78"
    assert "/etc/nbdd/devices.d/test.yaml:" in lab.guest.journal("nbdd", 20)
    # A call that starts it says so, too.
    asked = lab.guest.run("nbdctl list", check=False, timeout=ATTACH_SECONDS)
    assert (asked.returncode, asked.stderr.startswith("nbdctl: /etc/nbdd/devices.d/test.yaml:")) == (1, True), asked
    assert asked.stderr.endswith("nbdctl: nbdd does not start with that.\n")
    # It has said why before it ends, and a start meanwhile would join the one that fails.
    lab.guest.run("until systemctl is-failed --quiet nbdd; do sleep 0.1; done", timeout=ATTACH_SECONDS)
    lab.guest.run("rm /etc/nbdd/devices.d/test.yaml; systemctl start nbdd", timeout=ATTACH_SECONDS)


@pytest.mark.quick_on("debian13")
def test_readme_names_a_server_to_try_that_works(lab: Lab) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    found = re.search(r"`(nbdkit [^`]+)` \(.*\) serves `(nbd://[^`]+)`", readme)
    assert found is not None
    lab.guest.run(f"systemd-run -q --collect -p Type=forking --unit=tried {found[1]}")
    try:
        attached = lab.guest.run(f"nbdctl attach --wait 30 {found[2]}", timeout=ATTACH_SECONDS).stdout
        assert ", 1 GiB, from nbd://localhost/" in attached
        lab.guest.run(f"nbdctl detach {found[2]}", timeout=ATTACH_SECONDS)
    finally:
        lab.guest.run("systemctl stop tried")


@pytest.mark.quick_on("debian13")
def test_package_from_installation_to_purge(clean_guest: CleanGuest, nbdd_deb: Path) -> None:
    guest = clean_guest(bare=True)
    before = guest.run("find /etc /run /var/lib -xdev -path '*nbd*' ! -path '*nbd-*' | sort").stdout
    lab = Lab(guest)
    guest.install(nbdd_deb)
    assert guest.run("systemctl is-active nbdd; systemctl is-enabled nbdd").stdout.split() == ["active", "enabled"]
    assert lab.bound() == []
    assert lab.devices() == {}
    assert guest.run("lsmod | grep -c ^nbd").stdout.strip() == "1"
    server = lab.nbdkit("memory 64M")
    lab.define(f"devices:\n  used:\n    uri: {server.uri}\n  idle:\n    uri: {server.uri}\n")
    lab.attach("used")
    lab.attach("idle")
    guest.run("mkfs.ext4 -q /dev/disk/by-nbd/used && mount /dev/disk/by-nbd/used /mnt")
    removed = guest.run("dpkg -r nbdd 2>&1", timeout=300).stdout
    assert "(used) is in use and stays attached" in removed
    assert "idle" not in removed
    assert len(lab.bound()) == 1
    guest.run("echo still > /mnt/file && sync && umount /mnt && nbd-client -d /dev/nbd0")
    guest.run("dpkg -P nbdd 2>&1", timeout=300)
    after = guest.run("find /etc /run /var/lib -xdev -path '*nbd*' ! -path '*nbd-*' | sort").stdout
    assert after == before
    assert "could not be found" in guest.run("systemctl status nbdd 2>&1", check=False).stdout
    assert guest.run("find /usr /etc -name '*nbdd*' ! -name '*nbddump*'").stdout == ""
