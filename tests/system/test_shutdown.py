# SPDX-License-Identifier: MIT
"""A filesystem of /etc/fstab, as the machine comes up and goes down: with its server, and without."""

from __future__ import annotations

import pytest

from tests.conftest import CleanGuest, Show
from tests.guest import Guest
from tests.scale import is_full, times
from tests.system.lab import Lab

MOUNT = "/srv/backup"
FSTAB = f"/dev/disk/by-nbd/backup {MOUNT} ext4 _netdev,nofail,x-systemd.requires=nbdd-attach@backup.service 0 0"
"""As the README has it."""

SERVICE = """\
[Service]
# Late on purpose: nbdd has to keep trying.
ExecStartPre=/bin/sleep 5
ExecStart=nbdkit -f -i 127.0.0.1 file /root/disk.img
# It just goes, as a server does whose machine goes.
KillSignal=SIGKILL
[Install]
WantedBy=multi-user.target
"""

PROMISED, EMULATED = 90, 150
"""Seconds from the command to the end of the machine; an emulated one that others want needs some for itself."""


@pytest.mark.quick_on("debian12")
@pytest.mark.timeout(1500, func_only=True)
def test_shutdown_ends_in_time_with_and_without_the_server_and_boot_mounts_what_fstab_says(
    clean_guest: CleanGuest, show: Show, release: str
) -> None:
    guest = clean_guest()
    guest.run(f"truncate -s 64M /root/disk.img && mkfs.ext4 -q /root/disk.img && mkdir -p {MOUNT} /var/log/journal")
    guest.write("/etc/systemd/system/nbdkit.service", SERVICE)
    guest.write("/etc/nbdd/devices.d/t.yaml", "devices:\n  backup:\n    uri: nbd://127.0.0.1/\n    attach: boot\n")
    # On the way down it stays until the filesystem is unmounted; in /run, so that this holds for the first one alone.
    guest.write("/run/systemd/system/nbdkit.service.d/stays.conf", "[Unit]\nBefore=remote-fs-pre.target\n")
    guest.run(f"echo '{FSTAB}' >>/etc/fstab; systemctl enable -q --now nbdkit; systemctl reload nbdd", timeout=120)
    lab = Lab(guest)
    lab.wait_for("backup", "State", 's "attached"')

    # With the server.
    guest.run(f"systemctl daemon-reload; systemctl start srv-backup.mount; mountpoint -q {MOUNT}", timeout=120)
    guest.run(f"echo kept >{MOUNT}/file; sync")
    if is_full():
        guest.reboot()
        lab.until(f"mountpoint -q {MOUNT}", 120)
        assert guest.read(f"{MOUNT}/file") == "kept\n"
        log = guest.run("journalctl -b -1 --no-pager -o cat").stdout
        assert "Unmounted srv-backup.mount" in log
        assert log.index("Unmounted srv-backup.mount") < log.index("Stopped nbdd.service")
        assert "timed out" not in log.split("Unmounted srv-backup.mount")[1].lower()
        assert _is_clean(guest)

    # Without it.
    ways = {
        "systemctl reboot": "true",
        # Mounted by hand, so that systemd sees no reason to unmount it before nbdd is stopped; and in the way of that.
        "systemctl poweroff": f"systemctl stop srv-backup.mount && mount /dev/disk/by-nbd/backup {MOUNT} &&"
        f"systemd-run -q sh -c 'exec >{MOUNT}/busy; while :; do date; sync {MOUNT}/busy; done'",
    }
    promised = PROMISED if guest.accelerator == "kvm" else EMULATED
    for command, before in list(ways.items())[: times(1, 2)]:
        guest.run(
            f"{before}; head -c 4M /dev/urandom >{MOUNT}/dirty; systemctl stop nbdkit;"
            "awk '/^(Dirty|Writeback):/ { kib += $2 } END { exit kib < 4096 }' /proc/meminfo"
        )
        seconds = guest.power_off(600, command=command)
        show(f"{release}: {command}, with 4 MiB unwritten and the server dead, takes {seconds:.0f} s")
        assert seconds < promised
        guest.boot()
        log = guest.run("journalctl -b -1 --no-pager -o cat -u nbdd").stdout
        assert "the machine is shutting down: from now on I/O waits at most 30 s for a dead server" in log
        assert "backup: No server came back within " in log
        lab.until(f"mountpoint -q {MOUNT}", 120)
        assert guest.read(f"{MOUNT}/file") == "kept\n"
        assert _is_clean(guest)


def _is_clean(guest: Guest) -> bool:
    """Whether the filesystem, which is mounted, is found clean when it is not, and is mounted again."""
    check = f"umount {MOUNT} && e2fsck -f -n /dev/disk/by-nbd/backup"
    done = guest.run(f"{check} && systemctl restart srv-backup.mount && mountpoint {MOUNT}", check=False)
    return done.returncode == 0
