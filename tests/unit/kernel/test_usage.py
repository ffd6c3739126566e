# SPDX-License-Identifier: MIT
from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from nbdd.errors import Busy, NotAttached, TimedOut
from nbdd.kernel.sysfs import Node
from nbdd.kernel.usage import Usage


class Machine:
    """A made-up /proc, /sys and /dev with one partitioned device in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc"
        self.sysfs = root / "sys"
        self.dev = root / "dev"
        for directory in (self.proc, self.dev, self.sysfs / "block" / "nbd0" / "nbd0p1" / "holders"):
            directory.mkdir(parents=True)
        disk = self.sysfs / "block" / "nbd0"
        (disk / "dev").write_text("43:0\n")
        (disk / "nbd0p1" / "dev").write_text("43:1\n")
        (disk / "nbd0p1" / "partition").write_text("1\n")
        (self.dev / "nbd0").touch()
        self.node = Node(0, sysfs=str(self.sysfs), dev=str(self.dev))
        self.usage = Usage(proc=str(self.proc), sysfs_root=str(self.sysfs))

    def process(self, pid: str, *, comm: str = "cat", mountinfo: str = "", namespace: str = "mnt:[1]") -> Path:
        directory = self.proc / pid
        (directory / "ns").mkdir(parents=True)
        (directory / "fd").mkdir()
        (directory / "ns" / "mnt").symlink_to(namespace)
        (directory / "comm").write_text(comm + "\n")
        (directory / "mountinfo").write_text(mountinfo)
        return directory

    def mount(self, number: str, where: str, source: str = "/dev/x") -> str:
        return f"36 35 {number} / {where} rw,noatime shared:1 - ext4 {source} rw\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_usage_of_an_unused_device_is_empty(machine: Machine) -> None:
    machine.process("1", mountinfo=machine.mount("8:1", "/"))
    assert machine.usage.users(machine.node) == []


def test_usage_names_the_mount_point_of_a_partition(machine: Machine) -> None:
    machine.process("self", mountinfo=machine.mount("43:1", r"/mnt/my\040disk"))
    assert machine.usage.users(machine.node) == [f"{machine.dev}/nbd0p1 is mounted on /mnt/my disk"]


def test_usage_finds_a_mount_of_another_namespace_once(machine: Machine) -> None:
    line = machine.mount("43:0", "/data")
    machine.process("self")
    machine.process("1")
    machine.process("500", mountinfo=line, namespace="mnt:[2]")
    machine.process("501", mountinfo=line, namespace="mnt:[2]")
    assert machine.usage.users(machine.node) == [f"{machine.dev}/nbd0 is mounted on /data"]


def test_usage_finds_a_btrfs_mount_by_its_source(machine: Machine) -> None:
    machine.process("self", mountinfo=machine.mount("0:42", "/data", f"{machine.dev}/nbd0p1"))
    assert machine.usage.users(machine.node) == [f"{machine.dev}/nbd0p1 is mounted on /data"]


def test_usage_finds_a_member_of_a_mounted_btrfs(machine: Machine) -> None:
    (machine.sysfs / "fs" / "btrfs" / "1234" / "devices" / "nbd0p1").mkdir(parents=True)
    assert machine.usage.users(machine.node) == [f"{machine.dev}/nbd0p1 is part of the mounted btrfs 1234"]


def test_usage_finds_swap(machine: Machine) -> None:
    (machine.proc / "swaps").write_text(
        f"Filename\t\t\t\tType\t\tSize\nother file 1\n{machine.dev}/nbd0p1 partition\t10236\t0\t-2\n"
    )
    assert machine.usage.users(machine.node) == [f"{machine.dev}/nbd0p1 is used as swap"]


def test_usage_names_a_stacked_device(machine: Machine) -> None:
    (machine.sysfs / "block" / "nbd0" / "nbd0p1" / "holders" / "dm-0").touch()
    (machine.sysfs / "block" / "nbd0" / "nbd0p1" / "holders" / "md127").touch()
    (machine.sysfs / "block" / "dm-0" / "dm").mkdir(parents=True)
    (machine.sysfs / "block" / "dm-0" / "dm" / "name").write_text("vg-data\n")
    assert machine.usage.users(machine.node) == [
        f"{machine.dev}/nbd0p1 is held by dm-0 (vg-data)",
        f"{machine.dev}/nbd0p1 is held by md127",
    ]


def test_usage_finds_a_loop_device(machine: Machine) -> None:
    (machine.sysfs / "block" / "loop3" / "loop").mkdir(parents=True)
    (machine.sysfs / "block" / "loop3" / "loop" / "backing_file").write_text(f"{machine.dev}/nbd0\n")
    assert machine.usage.users(machine.node) == [f"{machine.dev}/nbd0 is behind /dev/loop3"]


def test_usage_finds_the_claims_of_all_devices_at_once(machine: Machine) -> None:
    (machine.proc / "partitions").write_text(
        "major minor  #blocks  name\n\n 43 0 100 nbd0\n 43 1 50 nbd0p1\n 43 32 9 nbd1\n 8 0 9 sda\n"
    )
    machine.process("self", mountinfo=machine.mount("43:1", "/data") + machine.mount("8:0", "/"))
    (machine.proc / "swaps").write_text(f"Filename Type Size Used Priority\n{machine.dev}/nbd1 partition 9 0 -2\n")
    (machine.sysfs / "block" / "dm-3" / "slaves" / "nbd0").mkdir(parents=True)
    assert machine.usage.all_claims(str(machine.dev)) == {
        f"{machine.dev}/nbd0": [
            f"{machine.dev}/nbd0p1 is mounted on /data",
            f"{machine.dev}/nbd0 is held by dm-3",
        ],
        f"{machine.dev}/nbd1": [f"{machine.dev}/nbd1 is used as swap"],
    }


def test_usage_claims_and_all_claims_agree(machine: Machine) -> None:
    (machine.proc / "partitions").write_text("43 0 100 nbd0\n43 1 50 nbd0p1\n")
    machine.process("self", mountinfo=machine.mount("0:42", "/data", f"{machine.dev}/nbd0"))
    for member in ("nbd0", "nbd0p1"):
        (machine.sysfs / "fs" / "btrfs" / "1234" / "devices" / member).mkdir(parents=True)
    (machine.sysfs / "block" / "nbd0" / "nbd0p1" / "holders" / "md1").touch()
    (machine.sysfs / "block" / "md1" / "slaves" / "nbd0p1").mkdir(parents=True)
    found = machine.usage.claims(machine.node)
    assert len(found) == 3
    assert machine.usage.all_claims(str(machine.dev)) == {machine.node.path: found}


def test_usage_says_if_it_may_not_look_into_other_processes(machine: Machine) -> None:
    assert not machine.usage.sees_all()
    machine.process("1")
    assert machine.usage.sees_all()


def test_usage_names_processes_but_not_udev(machine: Machine) -> None:
    for pid, comm in (("77", "qemu"), ("78", "(udev-worker)")):
        (machine.process(pid, comm=comm) / "fd" / "5").symlink_to(machine.dev / "nbd0p1")
    assert machine.usage.users(machine.node) == [f"{machine.dev}/nbd0p1 is open in process 77 (qemu)"]


def test_usage_counts_descriptors_of_this_process_except_the_claim(machine: Machine) -> None:
    fds = machine.process(str(os.getpid()), comm="python3") / "fd"
    with machine.usage.claim(machine.node) as fd:
        (fds / str(fd)).symlink_to(machine.dev / "nbd0")
        assert machine.usage.users(machine.node) == []
    (fds / "5000").symlink_to(machine.dev / "nbd0")
    with pytest.raises(Busy, match=rf"open in process {os.getpid()} \(python3\)"), machine.usage.claim(machine.node):
        pytest.fail("claimed")


@pytest.mark.parametrize(("flags", "written"), [("0100000", False), ("0100002", True), ("0100001", True)])
def test_usage_knows_who_has_the_device_open_for_writing(machine: Machine, flags: str, written: bool) -> None:
    process = machine.process("77", comm="mkfs")
    (process / "fd" / "5").symlink_to(machine.dev / "nbd0")
    (process / "fdinfo").mkdir()
    (process / "fdinfo" / "5").write_text(f"pos:\t0\nflags:\t{flags}\nmnt_id:\t29\n")
    assert machine.usage.written(machine.node) is written


def test_usage_probed_sees_udev_which_is_no_user(machine: Machine) -> None:
    assert not machine.usage.probed(machine.node)
    (machine.process("78", comm="(udev-worker)") / "fd" / "5").symlink_to(machine.dev / "nbd0")
    assert machine.usage.probed(machine.node)
    assert machine.usage.users(machine.node) == []


def test_claim_refused_names_the_users(machine: Machine) -> None:
    machine.process("self", mountinfo=machine.mount("43:0", "/data"))
    with pytest.raises(Busy, match="nbd0 is mounted on /data"), machine.usage.claim(machine.node):
        pytest.fail("claimed")


def test_claim_refused_by_the_kernel_is_busy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(Busy, match="another program has claimed it"), machine.usage.claim(machine.node):
        pytest.fail("claimed")


def test_claim_waits_for_the_last_user_to_leave(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["somebody"], ["somebody"], []]
    monkeypatch.setattr(machine.usage, "users", lambda _node: answers.pop(0))
    with machine.usage.claim(machine.node, patience=60) as fd:
        assert os.fstat(fd)
    assert not answers
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_claim_of_a_device_that_hangs_times_out_and_closes_a_late_descriptor(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, closed = threading.Event(), threading.Event()
    real = os.close

    def hang(*_: object) -> int:
        assert go.wait(10)
        return -5

    def close(fd: int) -> None:
        if fd == -5:
            closed.set()
        else:
            real(fd)

    monkeypatch.setattr(os, "open", hang)
    monkeypatch.setattr(os, "close", close)
    with pytest.raises(TimedOut, match="hangs"), machine.usage.claim(machine.node, seconds=0.05):
        pytest.fail("claimed")
    go.set()
    assert closed.wait(10)


def test_claim_of_a_gone_device_is_not_attached(machine: Machine) -> None:
    (machine.dev / "nbd0").unlink()
    with pytest.raises(NotAttached, match="is gone"), machine.usage.claim(machine.node):
        pytest.fail("claimed")
