# SPDX-License-Identifier: MIT
"""What nbdd itself suffers costs no I/O: under fio with verify, it is killed, stopped, restarted and upgraded."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from tests.conftest import Show
from tests.scale import times
from tests.system.lab import ATTACH_SECONDS, Lab, Server
from tests.system.load import Load, Recovery, emulation, strike, told

NAME = "load"

WORKER_KILLS = times(3, 50)
MANAGER_KILLS = times(2, 50)
UPGRADES = times(1, 10)

KILL_MAIN = "systemctl kill --signal=KILL --kill-whom=main nbdd"
KILL_ALL = "systemctl kill --signal=KILL --kill-whom=all nbdd"
UPGRADE = "dpkg --force-confold -i /var/tmp/nbdd_*_all.deb >/dev/null"

PROMISED = 2.0
"""Seconds until a device is managed again."""

PAUSE = 0.5
"""Seconds of these that systemd waits before a restart. Most of the rest is the start of Python, twice."""


@pytest.fixture
def load(lab: Lab) -> Iterator[Load]:
    server = lab.nbdkit("memory 64M")
    lab.define(f"devices:\n  {NAME}:\n    uri: {server.uri}\n")
    lab.attach(NAME)
    load = Load(lab, NAME)
    yield load
    load.kill()


def _strike(load: Load, *commands: str, seconds: float = 60) -> Recovery:
    """Strike at nbdd, and see a new worker look after the device each time; `seconds` is for each."""
    return strike([load], {NAME: [("worker", command) for command in commands]}, 120 + seconds * len(commands))[NAME]


def _check_time(load: Load, seconds: list[float], show: Show) -> None:
    """While the load still runs: an emulated processor is measured under what it was under at the strikes."""
    if load.lab.guest.accelerator == "kvm":
        assert max(seconds) <= PROMISED
        return
    slower = emulation(load.lab)
    real = PAUSE + statistics.median(seconds) / slower
    show(f"{load.lab.guest.release}: Python starts {slower:.0f} times slower here, so that these are {real:.2f} s")
    assert real <= PROMISED


@pytest.mark.quick_on("debian12")
@pytest.mark.timeout(300 + 30 * WORKER_KILLS, func_only=True)
def test_worker_killed_costs_no_io_and_a_new_one_adopts_the_device(
    lab: Lab, load: Load, show: Show, release: str
) -> None:
    manager = lab.manager_pid()
    recovery = _strike(load, *["kill -KILL {worker}"] * WORKER_KILLS)
    show(f"{release}: SIGKILL of the worker, managed again: {recovery}")
    _check_time(load, recovery.seconds, show)
    load.another_pass()
    load.end()
    assert lab.manager_pid() == manager
    assert "was killed by SIGKILL" in lab.guest.journal("nbdd")


@pytest.mark.quick_on("debian13")
@pytest.mark.timeout(300 + 30 * MANAGER_KILLS, func_only=True)
def test_manager_killed_costs_no_io_and_its_successor_adopts_the_device(load: Load, show: Show, release: str) -> None:
    recovery = _strike(load, *[KILL_MAIN, KILL_ALL] * (MANAGER_KILLS // 2))
    show(f"{release}: SIGKILL of the manager, managed again: {recovery}; from its start: {told(recovery.since_start)}")
    _check_time(load, recovery.seconds, show)
    load.another_pass()
    load.end()


def test_fork_server_killed_costs_no_io_and_a_new_one_starts(lab: Lab, load: Load) -> None:
    manager = lab.manager_pid()
    _strike(load, *["kill -KILL $(ps -o ppid= -p {worker})"] * 2)
    load.end()
    assert lab.manager_pid() == manager


@pytest.mark.quick_on("debian12")
def test_worker_that_hangs_is_replaced_without_io_errors(lab: Lab, load: Load) -> None:
    _strike(load, "kill -STOP {worker}")
    load.end()
    assert "did not answer and was killed" in lab.guest.journal("nbdd")


@pytest.mark.quick_on("debian13")
@pytest.mark.timeout(300 + 90 * UPGRADES, func_only=True)
def test_restart_and_package_upgrade_keep_the_device_and_its_io(load: Load, show: Show, release: str) -> None:
    recovery = _strike(load, "systemctl restart nbdd", *[UPGRADE] * UPGRADES, seconds=90)
    show(
        f"{release}: restart and {UPGRADES} installations of the package, managed again: {recovery};"
        f" from the start of the new service: {told(recovery.since_start)}"
    )
    _check_time(load, recovery.since_start, show)
    load.another_pass()
    load.end()


def test_stop_leaves_a_mounted_device_attached_and_the_next_start_adopts_it(lab: Lab) -> None:
    lab.guest.run("rm -f /root/disk.img; truncate -s 64M /root/disk.img")
    server = lab.nbdkit("file /root/disk.img")
    lab.define(f"devices:\n  used:\n    uri: {server.uri}\n  idle:\n    uri: {server.uri}\n")
    lab.attach("used")
    lab.attach("idle")
    before = lab.device("used")
    lab.guest.run(
        "mkfs.ext4 -q /dev/disk/by-nbd/used && mkdir -p /mnt/t"
        " && mount /dev/disk/by-nbd/used /mnt/t && echo x >/mnt/t/x"
    )
    lab.guest.run("systemctl stop nbdd", timeout=120)
    assert lab.bound() == [before["Node"].removeprefix("/dev/")]
    assert "used stays attached" in lab.guest.journal("nbdd", 20)
    assert lab.guest.run("echo 3 >/proc/sys/vm/drop_caches; cat /mnt/t/x").stdout == "x\n"
    lab.guest.run("systemctl start nbdd", timeout=ATTACH_SECONDS)
    lab.wait_for("used", "State", 's "attached"')
    assert lab.device("used")["AttachedSince"] == before["AttachedSince"]
    assert lab.device("idle")["State"] == "detached"
    # The connections were the kernel's alone since the stop, and their death is seen all the same.
    again = _restart(lab, server, "/root/disk.img", "used")
    assert lab.guest.run("echo 3 >/proc/sys/vm/drop_caches; cat /mnt/t/x").stdout == "x\n"
    lab.guest.run("umount /mnt/t")
    lab.detach("used")
    lab.guest.run(f"systemctl stop {again}")


def test_foreign_device_is_never_touched(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M")
    port = server.uri.split(":")[2].strip("/")
    lab.guest.run(f"nbd-client 127.0.0.1 {port} /dev/nbd7 -N ''")
    try:
        lab.define(f"devices:\n  mine:\n    uri: {server.uri}\n")
        lab.attach("mine")
        lab.guest.run("systemctl kill --signal=KILL --kill-whom=all nbdd")
        lab.wait_for("mine", "State", 's "attached"')
        lab.detach("mine")
        lab.guest.run("systemctl restart nbdd", timeout=ATTACH_SECONDS)
        assert lab.bound() == ["nbd7"]
        lab.guest.run("dd if=/dev/nbd7 of=/dev/null bs=1M count=16 iflag=direct status=none")
    finally:
        lab.guest.run("nbd-client -d /dev/nbd7", check=False)


def test_server_that_restarts_is_connected_again_and_io_goes_on(lab: Lab) -> None:
    lab.guest.run("truncate -s 64M /root/disk.img")
    server = lab.nbdkit("file /root/disk.img")
    lab.define(f"devices:\n  again:\n    uri: {server.uri}\n")
    lab.attach("again")
    lab.guest.run("dd if=/dev/urandom of=/dev/disk/by-nbd/again bs=1M count=8 oflag=direct status=none")
    again = _restart(lab, server, "/root/disk.img", "again")
    assert lab.device("again")["Reconnects"] == 1
    lab.guest.run("cmp -n 8388608 /dev/disk/by-nbd/again /root/disk.img")
    lab.detach("again")
    lab.guest.run(f"systemctl stop {again}")


def _restart(lab: Lab, server: Server, image: str, name: str) -> str:
    """Kill a server, see the device wait for it, start it again, see the device mended; returns the new unit."""
    port = server.uri.split(":")[2].strip("/")
    lab.guest.run(f"systemctl kill --signal=KILL {server.unit}")
    lab.wait_for(name, "State", 's "reconnecting"')
    assert lab.device(name)["LastError"][0].startswith("org.nbdd1.Error.")
    unit = f"{server.unit}b"
    lab.guest.run(f"systemd-run -q --collect --unit={unit} nbdkit -f -i 127.0.0.1 -p {port} file {image}")
    lab.wait_for(name, "State", 's "attached"')
    return unit
