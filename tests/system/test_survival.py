# SPDX-License-Identifier: MIT
"""What nbdd itself suffers costs no I/O: under fio with verify, it is killed, stopped, restarted and upgraded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.lab import ATTACH_SECONDS, Lab, Server

NAME = "load"

# Writes and verifies over and over until it is told to stop; its exit code is the verdict.
_LOAD = f"""\
#!/bin/sh
passes=0
while [ ! -e /run/load.stop ]; do
    fio --name=load --filename=/dev/disk/by-nbd/{NAME} --rw=randwrite --bs=4k --size=4M --iodepth=8 --ioengine=libaio \\
        --direct=1 --verify=crc32c --verify_fatal=1 --output=/run/load.log || exit 1
    passes=$((passes + 1))
    echo $passes > /run/load.passes
done
"""


class Load:
    """A device under fio; `end` waits for the verdict."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.before = lab.device(NAME)
        self.binding = self._binding()
        lab.guest.write("/run/load.sh", _LOAD, 0o755)
        # BindsTo and the like must not touch it: it is somebody else's program.
        lab.guest.run("rm -f /run/load.stop /run/load.passes; systemd-run -q --unit=load /run/load.sh")
        self.another_pass()

    def another_pass(self) -> None:
        """Wait until fio has written and verified everything once more, begun after this call."""
        self.lab.until(
            "[ $(cat /run/load.passes 2>/dev/null || echo 0) -ge "
            f"{self._passes() + 2} ] || ! systemctl -q is-active load",
            300,
            what="fio goes on",
        )
        assert self.lab.guest.run("systemctl is-active load", check=False).stdout.strip() == "active", self._log()

    def end(self) -> None:
        """Stop fio; it must have met no error, on a device that was never bound anew."""
        self.lab.guest.run("touch /run/load.stop")
        self.lab.until("! systemctl -q is-active load", 300)
        failed = self.lab.guest.run("systemctl is-failed load", check=False).stdout.strip()
        assert failed != "failed", self._log()
        after = self.lab.device(NAME)
        assert after["State"] == "attached"
        assert after["Node"] == self.before["Node"]
        assert after["AttachedSince"] == self.before["AttachedSince"]
        assert self._binding() == self.binding, "the device was bound anew"
        # Since this test began: a device that was detached in an earlier one may have had a reader, udev's for one.
        assert [line for line in self.lab.kernel_log() if "I/O error" in line] == []

    def _passes(self) -> int:
        return int(self.lab.guest.run("cat /run/load.passes 2>/dev/null || echo 0").stdout)

    def _binding(self) -> str:
        # The thread that gave the kernel the device; the next binding has another. (diskseq stays over bindings.)
        return self.lab.guest.run(f"cat /sys/block/{self.before['Node'].removeprefix('/dev/')}/pid").stdout

    def _log(self) -> str:
        return self.lab.guest.run("cat /run/load.log; journalctl -u load -u nbdd -n 40 --no-pager").stdout


@pytest.fixture
def load(lab: Lab) -> Iterator[Load]:
    server = lab.nbdkit("memory 64M")
    lab.define(f"devices:\n  {NAME}:\n    uri: {server.uri}\n")
    lab.attach(NAME)
    yield Load(lab)
    lab.guest.run("systemctl stop load 2>/dev/null; systemctl reset-failed load 2>/dev/null", check=False)


def _managed_again(lab: Lab, old_worker: int) -> None:
    """Wait until another worker than `old_worker` looks after the device."""
    get = f"busctl get-property org.nbdd1 /org/nbdd1/device/{NAME} org.nbdd1.Device"
    lab.until(
        f"""[ "$({get} State 2>&1)" = 's "attached"' ] && """
        f"""! {get} WorkerPID | grep -qx -e 'u 0' -e 'u {old_worker}'""",
        what="managed again",
    )


def test_sigkill_of_a_worker_costs_no_io_and_a_new_one_adopts_the_device(lab: Lab, load: Load) -> None:
    manager = lab.manager_pid()
    for _ in range(5):
        worker = lab.device(NAME)["WorkerPID"]
        lab.guest.run(f"kill -KILL {worker}")
        _managed_again(lab, worker)
    load.another_pass()
    load.end()
    assert lab.manager_pid() == manager
    assert "was killed by SIGKILL" in lab.guest.journal("nbdd")


def test_sigkill_of_the_manager_costs_no_io_and_its_successor_adopts_the_device(lab: Lab, load: Load) -> None:
    for whom in ("main", "main", "all"):
        worker = lab.device(NAME)["WorkerPID"]
        lab.guest.run(f"systemctl kill --signal=KILL --kill-whom={whom} nbdd")
        _managed_again(lab, worker)
    load.another_pass()
    load.end()


def test_sigkill_of_the_fork_server_costs_no_io_and_a_new_one_starts(lab: Lab, load: Load) -> None:
    manager = lab.manager_pid()
    for _ in range(2):
        worker = lab.device(NAME)["WorkerPID"]
        lab.guest.run(f"kill -KILL $(ps -o ppid= -p {worker})")
        _managed_again(lab, worker)
    load.end()
    assert lab.manager_pid() == manager


def test_a_worker_that_hangs_is_found_and_replaced_without_io_errors(lab: Lab, load: Load) -> None:
    worker = lab.device(NAME)["WorkerPID"]
    lab.guest.run(f"kill -STOP {worker}")
    _managed_again(lab, worker)
    load.end()
    assert "did not answer and was killed" in lab.guest.journal("nbdd")


def test_restart_and_package_upgrade_keep_the_device_and_its_io(lab: Lab, load: Load) -> None:
    lab.guest.run("systemctl restart nbdd", timeout=ATTACH_SECONDS)
    _managed_again(lab, load.before["WorkerPID"])
    worker = lab.device(NAME)["WorkerPID"]
    lab.guest.run("dpkg --force-confold -i /var/tmp/nbdd_*_all.deb", timeout=300)
    _managed_again(lab, worker)
    load.another_pass()
    load.end()


def test_stop_leaves_a_mounted_device_attached_and_start_takes_it_up_and_mends_it_again(lab: Lab) -> None:
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
    # The links were the kernel's alone since the stop, and their death is seen all the same.
    again = _restart(lab, server, "/root/disk.img", "used")
    assert lab.guest.run("echo 3 >/proc/sys/vm/drop_caches; cat /mnt/t/x").stdout == "x\n"
    lab.guest.run("umount /mnt/t")
    lab.detach("used")
    lab.guest.run(f"systemctl stop {again}")


def test_a_device_of_somebody_else_is_never_touched(lab: Lab) -> None:
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


def test_a_server_that_restarts_is_connected_again_and_io_goes_on(lab: Lab) -> None:
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
