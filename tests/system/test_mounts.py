# SPDX-License-Identifier: MIT
"""The recipes of docs/mounts.md, to the letter, in a guest that boots with its server there, late, and absent."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CleanGuest, Show
from tests.guest import HOST, Guest
from tests.scale import times
from tests.system.far import FarServers
from tests.system.lab import Lab

PAGE = (Path(__file__).parents[2] / "docs" / "mounts.md").read_text()

ADDED_TO = {"/etc/fstab", "/etc/crypttab"}
"""Files that are there already, and get lines more."""

MOUNTS = {
    "/srv/data": "/dev/disk/by-nbd/data",
    "/srv/vault": "/dev/mapper/vault",
    "/srv/home": "/dev/backups/home",
    "/srv/mirror": "/dev/md/mirror",
}

BOOTS = times(2, 10)
"""Every second one with a server that is late."""

LATE = 20
"""Seconds after the guest has come up."""

PROMISED, EMULATED = 90, 150
"""Seconds for a shutdown; an emulated machine that others want needs some for itself."""


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServers]:
    """Servers that are another machine's: they do not end with the guest."""
    with FarServers(tmp_path, sorted(set(re.findall(r"nbd://storage\.example/([\w-]+)", PAGE)))) as servers:
        yield servers


@pytest.mark.prove_only
@pytest.mark.timeout(900 + 180 * BOOTS, func_only=True)
def test_mounts_of_filesystem_luks_lvm_mdraid_and_swap_are_there_after_each_boot_also_with_a_late_server(
    clean_guest: CleanGuest, far: FarServers, show: Show, release: str
) -> None:
    guest = clean_guest(sees_host=True)
    lab = Lab(guest)
    _follow_the_page(lab, far)
    downs, ups = [], []
    for boot in range(BOOTS):
        guest.run(f"for m in {' '.join(MOUNTS)}; do echo {boot} >$m/boot; done")
        downs.append(guest.power_off(300, command="systemctl reboot"))
        late = boot % 2 == 0
        if late:
            far.kill()
        guest.boot()
        started = time.monotonic()
        if late:
            lab.until("systemctl is-active -q multi-user.target", 120, what="the boot does not wait for the server")
            time.sleep(max(0, started + LATE - time.monotonic()))
            assert guest.run("findmnt -rno TARGET -t ext4 | grep /srv/ || :").stdout == ""
            far.start()
            started = time.monotonic()
        _wait_for_all(lab)
        ups.append(time.monotonic() - started)
        assert guest.run(f"cat {' '.join(f'{mount}/boot' for mount in MOUNTS)}").stdout == f"{boot}\n" * len(MOUNTS)
        _check_all(guest)
    promised = PROMISED if guest.accelerator == "kvm" else EMULATED
    assert max(downs) < promised
    # The automount: nobody has looked yet, so that nothing was attached. Without a server it fails, and tries again.
    assert lab.device("rare")["State"] == "detached"
    far.kill()
    assert guest.run("ls /srv/rare/lost+found", check=False, timeout=120).returncode != 0
    far.start()
    lab.until("ls -d /srv/rare/lost+found", 120)
    assert lab.device("rare")["State"] == "attached"
    show(
        f"{release}: {BOOTS} boots, every second one with the server {LATE} s late: all mounted at most"
        f" {max(ups):.0f} s after the machine or its server was up, down in at most {max(downs):.0f} s"
    )


def _follow_the_page(lab: Lab, far: FarServers) -> None:
    """Write the page's files, attach its disks, run its commands, and take what it wants from systemd."""
    guest, commands = lab.guest, []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        first, text = block.split("\n", 1)
        if kind == "sh":
            assert first == "# once"
            commands.append(text)
            continue
        path = first.removeprefix("# ")
        for name, port in far.ports.items():
            text = text.replace(f"nbd://storage.example/{name},", f"'nbd://{HOST}:{port}/{name}',")
            text = text.replace(f"nbd://storage.example/{name}}}", f"'nbd://{HOST}:{port}/{name}'}}")
        if path in ADDED_TO:
            guest.run(f"cat >>{path}", input=text.encode())
        else:
            guest.write(path, text)
    assert "storage.example" not in guest.run("cat /etc/nbdd/devices.d/mounts.yaml").stdout
    guest.run("systemctl reload nbdd", timeout=120)
    for name in far.ports:
        if name != "rare":
            lab.wait_for(name, "State", 's "attached"')
    # With as much work for the key as a guest can take.
    cheap = 'cryptsetup() { command cryptsetup "$@" $([ "$1" != luksFormat ] || echo --pbkdf=pbkdf2); }\n'
    guest.run(f"bash -ec {shlex.quote(cheap + ''.join(commands))}", timeout=300)
    guest.run("systemctl daemon-reload; udevadm settle")
    guest.run(
        "systemctl start srv-data.mount srv-vault.mount srv-home.mount srv-mirror.mount srv-rare.automount", timeout=120
    )
    guest.run("systemctl start 'dev-disk-by\\x2dnbd-swap.swap'", timeout=120)
    _wait_for_all(lab)


def _wait_for_all(lab: Lab) -> None:
    mounted = " && ".join(f"mountpoint -q {mount}" for mount in MOUNTS)
    lab.until(f"{mounted} && grep -q /dev/nbd /proc/swaps", 240, what="all is mounted")
    for target in ("emergency.target", "rescue.target"):
        assert lab.guest.run(f"systemctl is-active {target}", check=False).stdout == "inactive\n"


def _check_all(guest: Guest) -> None:
    """Each filesystem is clean when it is not mounted, the mirror is whole; all is as before then."""
    for mount, device in MOUNTS.items():
        unit = f"{mount.strip('/').replace('/', '-')}.mount"
        guest.run(f"systemctl stop {unit} && e2fsck -f -n {device} && systemctl start {unit} && mountpoint {mount}")
    assert "[2/2]" in guest.run("cat /proc/mdstat").stdout
    failed = guest.run("systemctl list-units --failed --plain --no-legend").stdout
    assert failed == "", failed
