# SPDX-License-Identifier: MIT
"""The proving ground keeps its own promises, on both Debians and without nbdd."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest import Guest, GuestError, ensure, snapshot
from tests.scale import times

CleanGuest = Callable[..., Guest]

# Prints QEMU's pid as soon as there is one, and is killed while it waits for the guest, or for that.
_DRIVER = """
import sys, threading, time
from tests.guest import Guest, GuestError, ensure, snapshot
guest = Guest(sys.argv[1])
def tell():
    while True:
        try:
            print(guest.pid, flush=True)
            return
        except GuestError:
            time.sleep(0.05)
threading.Thread(target=tell, daemon=True).start()
guest.boot()
time.sleep(600)
"""


@pytest.mark.quick_on("debian12")
def test_a_guest_is_booted_used_rebooted_and_crashed(clean_guest: CleanGuest, release: str, tmp_path: Path) -> None:
    guest = clean_guest(bare=True)
    assert guest.read("/etc/debian_version").startswith(release.removeprefix("debian"))
    assert guest.run("systemctl is-system-running --wait", check=False).stdout == "running\n"
    assert "nbd" not in {line.split()[0] for line in guest.read("/proc/modules").splitlines()}
    _use_nbd(guest)

    guest.write("/root/a b/c'd", "text\n", 0o600)
    assert guest.run('stat -c %a "/root/a b/c\'d"').stdout == "600\n"
    guest.get("/root/a b/c'd", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "text\n"
    assert guest.run("cat", input=b"through").stdout == "through"
    assert guest.run("id -un", user="visitor").stdout == "visitor\n"

    with pytest.raises(GuestError, match=r"`echo out; exit 3` failed with exit code 3\nout"):
        guest.run("echo out; exit 3")
    with pytest.raises(GuestError, match="did not end within 1 s"):
        guest.run("sleep 60", timeout=1)

    boots = [guest.read("/proc/sys/kernel/random/boot_id")]
    # The first is what others do as well.
    for again in (guest.reboot, guest.reset)[-times(1, 2) :]:
        guest.run("sync")
        again()
        boots.append(guest.read("/proc/sys/kernel/random/boot_id"))
    assert len(set(boots)) == 1 + times(1, 2)
    assert guest.read("/root/a b/c'd") == "text\n"
    guest.power_off()
    assert not guest.alive


@pytest.mark.quick_on("debian13")
def test_a_restored_guest_is_as_a_booted_one_and_its_snapshot_stays_as_it_is(
    clean_guest: CleanGuest, nbdd_deb: Path
) -> None:
    first = clean_guest()
    assert first.costs[-1][0] == "restoring", "it was booted"
    assert first.run("systemctl is-system-running; systemctl is-active nbdd").stdout == "running\nactive\n"
    assert abs(float(first.run("date +%s.%N").stdout) - time.time()) < 5
    assert first.run("nbdctl list").returncode == 0
    _use_nbd(first)
    first.write("/root/mark", "first\n")
    first.run("sync")

    # Another one beside it, with other options of the host's side: it has nothing of the first.
    with contextlib.closing(Guest(first.release, sees_host=True)) as second:
        second.come_up(nbdd_deb)
        assert [what for what, _ in second.costs] == ["restoring"]
        assert second.run("test -e /root/mark", check=False).returncode == 1
        second.run("dmesg --level=err,crit,alert,emerg | grep . && exit 1 || :")
    # It has no boot of its own to go back to, but a disk.
    first.reboot()
    assert first.read("/root/mark") == "first\n"
    # A boot is over when sshd answers; nbdd may be starting still.
    assert first.run("systemctl start nbdd; systemctl is-active nbdd").stdout == "active\n"


@pytest.mark.quick_on("debian12")
def test_a_snapshot_that_can_not_be_restored_is_thrown_away(
    clean_guest: CleanGuest, nbdd_deb: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    clean_guest().kill()
    image = ensure(release)
    whole = snapshot.ensure(image, nbdd_deb, _never, memory=2048, cpus=2)
    broken = snapshot.Snapshot(whole.directory.with_name(f"{release}-broken-{os.getpid()}"))
    shutil.copytree(whole.directory, broken.directory)
    os.truncate(broken.saved.devices, broken.saved.devices.stat().st_size // 2)
    monkeypatch.setattr(snapshot, "key", lambda *_, **__: broken.directory.name.removeprefix(f"{release}-"))
    with contextlib.closing(Guest(release)) as guest:
        guest._image = guest._take_image()
        with pytest.raises(GuestError, match=r"QEMU (ended|failed)"):
            guest._restore(guest._image, nbdd_deb)
        assert not broken.directory.exists()
    assert whole.directory.is_dir()


def _never(_: snapshot.Snapshot) -> None:
    raise AssertionError("it is there already")


def test_no_qemu_outlives_a_killed_driver(release: str) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", _DRIVER, release], cwd=root, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        pidfd = os.pidfd_open(int(driver.stdout.readline()))
        try:
            driver.send_signal(signal.SIGKILL)
            ended, _, _ = select.select([pidfd], [], [], 10)
        finally:
            os.close(pidfd)
        assert ended, "QEMU still runs 10 s after its driver was killed"


def _use_nbd(guest: Guest) -> None:
    guest.run("modprobe nbd && mkdir -p /run/t && systemd-run -q --unit=tcp nbdkit -f -p 10809 memory 64M")
    guest.run("systemd-run -q --unit=unix nbdkit -f -U /run/t/nbd.sock memory 32M")
    for uri, size in (("nbd://localhost", 64 << 20), ("nbd+unix:///?socket=/run/t/nbd.sock", 32 << 20)):
        found = guest.run(f"timeout 60 sh -c 'until nbdinfo --size \"{uri}\" 2>/dev/null; do sleep 0.2; done'")
        assert int(found.stdout) == size
    written = guest.run(
        "set -e; nbd-client localhost /dev/nbd0 >/dev/null; mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /mnt;"
        "head -c 20M /dev/urandom >/mnt/file; sha256sum /mnt/file; umount /mnt; e2fsck -fn /dev/nbd0 >/dev/null"
    ).stdout
    assert written == guest.run("mount /dev/nbd0 /mnt && sha256sum /mnt/file && umount /mnt").stdout
    guest.run("nbd-client -d /dev/nbd0 && systemctl stop tcp unix")
