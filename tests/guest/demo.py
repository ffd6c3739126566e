# SPDX-License-Identifier: MIT
"""`make demo`: the main job of nbdd in a guest, each step as the command that a person types, and what it prints."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass

from tests.guest import deb
from tests.guest.errors import GuestError
from tests.guest.guest import Guest
from tests.guest.recipe import RELEASES


@dataclass(frozen=True)
class Step:
    """One command, why it is given, and what its output must hold for the demo to have shown something."""

    why: str
    command: str
    holds: str = ""


_YAML = """\
devices:
  backup:
    uri: nbd://127.0.0.1/backup
    timeout: 30
"""

_ATTACH = "busctl call org.nbdd1 /org/nbdd1 org.nbdd1.Manager"

STEPS = (
    Step("A server with 512 MiB to give away. Yours is elsewhere; this one is in the same machine.",
         "systemd-run --quiet --unit=nbdkit nbdkit --foreground --ipaddr 127.0.0.1 memory 512M"),
    Step("Say what the device is.", f"cat > /etc/nbdd/devices.d/backup.yaml <<'END'\n{_YAML}END"),
    Step("Look before it counts, and have nbdd read it.", "nbdd --check && systemctl reload nbdd", "all well"),
    Step("Attach it.", "nbdctl attach backup", "/dev/nbd"),
    Step("It is a disk like any other.", "mkfs.ext4 -q /dev/disk/by-nbd/backup && mount /dev/disk/by-nbd/backup /mnt"
         " && lsblk /dev/disk/by-nbd/backup", "/mnt"),
    Step("Write 200 MiB and remember their checksum.",
         "head -c 200M /dev/urandom > /mnt/data && sha256sum /mnt/data | tee /root/sum"),
    Step("Change the request timeout live, while it is mounted.",
         "nbdctl set-timeout backup 60 && cat /sys/block/nbd0/queue/io_timeout", "60000"),
    Step("nbdd does not take a mounted disk away.", "nbdctl detach backup", "/mnt"),
    Step("Kill the whole of nbdd. The disk does not notice, and nbdd takes it up again.",
         "systemctl kill --signal=KILL --kill-whom=all nbdd; sha256sum -c /root/sum;"
         " until nbdctl list | tee /dev/stderr | grep -q attached; do :; done", "OK"),
    Step("Unmount, detach.", "umount /mnt && nbdctl detach backup", "detached"),
    Step("The same without a word of configuration, and by D-Bus alone, as a program would.",
         f"{_ATTACH} AttachURI 'sa{{sv}}' nbd://127.0.0.1/ 1 name s again", "/org/nbdd1/device/again"),
    Step("What was written is there.",
         "fsck.ext4 -fn /dev/disk/by-nbd/again && mount /dev/disk/by-nbd/again /mnt && sha256sum -c /root/sum"
         " && umount /mnt", "OK"),
    Step("And off. The kernel's device is free, the link is gone.",
         f"{_ATTACH} Detach 'sa{{sv}}' again 0 && nbdctl list && ls -d /dev/disk/by-nbd/again /sys/block/nbd*/pid",
         "No such file"),
)  # fmt: skip

# What must not succeed, by its command: the demo shows the refusal.
_REFUSED = ("nbdctl detach backup",)
_ENDS_WITH_NOTHING_LEFT = STEPS[-1].command


def main() -> int:
    """Run every step; 0 if each did what it says."""
    start = time.monotonic()
    release = os.environ.get("GUEST", "debian13")
    if release not in RELEASES:
        print(f"demo: there is no guest {release!r}; GUEST is one of {', '.join(RELEASES)}", file=sys.stderr)
        return 2
    try:
        with contextlib.closing(Guest(release)) as guest:
            guest.come_up(deb.required())
            print(f"\nA machine with Debian {release.removeprefix('debian')}, "
                  f"Linux {guest.run('uname -r').stdout.strip()}, and nbdd installed. As root:")  # fmt: skip
            for step in STEPS:
                _show(guest, step)
    except GuestError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.monotonic() - start:.0f} s: a remote disk through nbdd on a real kernel.")
    return 0


def _show(guest: Guest, step: Step) -> None:
    print(f"\n-- {step.why}")
    for number, line in enumerate(step.command.splitlines()):
        print(f"{'#' if number == 0 else '>'} {line}", flush=True)
    # Both streams in the order a terminal would show them.
    done = guest.run(f"{{ {step.command}\n}} 2>&1", check=False, timeout=300)
    for line in done.stdout.splitlines():
        print(f"   {line}", flush=True)
    print(f"   ({done.seconds:.1f} s)")
    expected_failure = step.command in _REFUSED or step.command == _ENDS_WITH_NOTHING_LEFT
    if (done.returncode != 0) != expected_failure or step.holds not in done.stdout:
        raise GuestError(f"this step did not do what it says (exit code {done.returncode})")


if __name__ == "__main__":
    sys.exit(main())
