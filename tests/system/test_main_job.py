# SPDX-License-Identifier: MIT
"""The main job: a definition becomes a block device, the device carries a filesystem, and goes again."""

from __future__ import annotations

from tests.system.lab import Lab


def test_busctl_attach_gives_a_device_on_which_ext4_is_made_filled_checked_and_compared(lab: Lab) -> None:
    server = lab.nbdkit("memory 256M")
    lab.define(f"devices:\n  backup:\n    uri: {server.uri}\n")
    lab.guest.run("busctl call --timeout=60 org.nbdd1 /org/nbdd1 org.nbdd1.Manager Attach 'sa{sv}' backup 0")
    node = lab.device("backup")["Node"]
    assert lab.guest.run("readlink -f /dev/disk/by-nbd/backup").stdout.strip() == node
    lab.guest.run(
        "set -e; mkfs.ext4 -q /dev/disk/by-nbd/backup; mkdir -p /mnt/t; mount /dev/disk/by-nbd/backup /mnt/t;"
        "head -c 100M /dev/urandom > /mnt/t/data; sha256sum /mnt/t/data > /root/sum; umount /mnt/t;"
        "e2fsck -fn /dev/disk/by-nbd/backup;"
        "mount /dev/disk/by-nbd/backup /mnt/t; sha256sum -c /root/sum; umount /mnt/t",
        timeout=300,
    )
    lab.detach("backup")
    assert lab.bound() == []
    assert lab.guest.run("ls /dev/disk/by-nbd 2>/dev/null || :").stdout == ""
