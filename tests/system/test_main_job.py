# SPDX-License-Identifier: MIT
"""The main job: a definition becomes a block device, the device carries a filesystem, and goes again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.lab import BusError, Call, Lab, Server, object_path

ROOT = Path(__file__).parents[2]
BUSY = "org.nbdd1.Error.Busy"


def put_scripts(lab: Lab) -> None:
    """Put what runs inside the guest there."""
    for script in ("bench/memory.py", "tests/system/in_guest/rounds.py"):
        lab.guest.write(f"/root/lab/{script}", (ROOT / script).read_text())


@contextmanager
def refused(lab: Lab, name: str, options: str = "@a{sv} {}", *, needle: str) -> Iterator[None]:
    """Hold a detach to Busy with `needle` in its text, and the device to being attached afterwards."""
    with pytest.raises(BusError) as caught:
        lab.detach(name, options)
    assert caught.value.name == BUSY
    assert needle in caught.value.text
    yield
    assert lab.device(name)["State"] == "attached"


def wait_for_status(lab: Lab, line: str) -> None:
    """Wait until `systemctl status nbdd` sums up so; systemd hears of it a moment after the bus does."""
    lab.until(f'[ "$(systemctl show -P StatusText nbdd)" = {shlex.quote(line)} ]', 5, what=line)


def test_attach_by_busctl_gives_a_device_on_which_ext4_is_made_filled_checked_and_compared(lab: Lab) -> None:
    server = lab.nbdkit("memory 128M")
    lab.define(f"devices:\n  backup:\n    uri: {server.uri}\n")
    lab.guest.run("busctl call --timeout=60 org.nbdd1 /org/nbdd1 org.nbdd1.Manager Attach 'sa{sv}' backup 0")
    node = lab.device("backup")["Node"]
    assert lab.guest.run("readlink -f /dev/disk/by-nbd/backup").stdout.strip() == node
    lab.guest.run(
        "set -e; mkfs.ext4 -q /dev/disk/by-nbd/backup; mkdir -p /mnt/t; mount /dev/disk/by-nbd/backup /mnt/t;"
        "head -c 32M /dev/urandom > /mnt/t/data; sha256sum /mnt/t/data > /root/sum; umount /mnt/t;"
        "e2fsck -fn /dev/disk/by-nbd/backup;"
        "mount /dev/disk/by-nbd/backup /mnt/t; sha256sum -c /root/sum; umount /mnt/t",
        timeout=300,
    )
    lab.detach("backup")
    assert lab.bound() == []
    assert lab.guest.run("ls /dev/disk/by-nbd 2>/dev/null || :").stdout == ""


@pytest.fixture
def parted(lab: Lab) -> Server:
    """A server of a partitioned export: part1 from 1 MiB on, 24 MiB long, and part2 behind it."""
    lab.guest.run(
        "truncate -s 64M /root/parted.img;"
        "printf 'label: gpt\\nstart=1MiB, size=24MiB\\nsize=24MiB\\n' | sfdisk -q --no-reread /root/parted.img"
    )
    return lab.nbdkit("file /root/parted.img")


def test_partition_symlinks_are_there_when_attach_replies_and_gone_when_detach_does(lab: Lab, parted: Server) -> None:
    lab.define(f"devices:\n  parted:\n    uri: {parted.uri}\n")
    put_scripts(lab)
    # UDisks opens whatever appears, when it likes.
    lab.guest.run(
        "systemctl start udisks2; cd /root/lab && python3 -m tests.system.in_guest.rounds parted --rounds 5 "
        "--warm-up 5 --link= --link=-part2 --link=-part1; code=$?; systemctl stop udisks2; exit $code",
        timeout=300,
    )


def test_partition_takes_ext4_that_is_made_filled_checked_and_compared(lab: Lab, parted: Server) -> None:
    lab.define(f"devices:\n  parted:\n    uri: {parted.uri}\n")
    lab.guest.run("busctl call --timeout=60 org.nbdd1 /org/nbdd1 org.nbdd1.Manager Attach 'sa{sv}' parted 0")
    part = "/dev/disk/by-nbd/parted-part1"
    lab.guest.run(
        f"set -e; mkfs.ext4 -q {part}; mkdir -p /mnt/t; mount {part} /mnt/t;"
        "head -c 8M /dev/urandom >/mnt/t/data; sha256sum /mnt/t/data >/root/sum; umount /mnt/t; e2fsck -fn {part};"
        f"mount {part} /mnt/t; sha256sum -c /root/sum".replace("{part}", part)
    )
    with refused(lab, "parted", needle="/dev/nbd0p1 is mounted on /mnt/t"):
        pass
    lab.guest.run("umount /mnt/t")
    lab.detach("parted")
    # What is on the server is the filesystem, at the place where the partition begins.
    lab.guest.run("set -e; mount -o ro,offset=1048576 /root/parted.img /mnt/t; sha256sum -c /root/sum; umount /mnt/t")


def test_detach_refuses_a_device_in_use_and_names_who_uses_it(lab: Lab) -> None:
    server = lab.nbdkit("memory 64M")
    lab.attach_uri(server.uri, "used")
    node = lab.device("used")["Node"]
    apart = f"systemd-run -q --unit=apart -p PrivateMounts=yes sh -c 'mount {node} /mnt && exec sleep 1000'"
    uses = {
        f"{node} is mounted on /mnt/a place": (
            f"mkdir -p '/mnt/a place'; mkfs.ext4 -q {node}; mount {node} '/mnt/a place'",
            "umount '/mnt/a place'; rmdir '/mnt/a place'",
        ),
        # In a namespace of its own, where the rest of the system does not see it.
        f"{node} is mounted on /mnt": (
            f"{apart}; until nsenter -m -t $(systemctl show -P MainPID apart) mountpoint -q /mnt; do sleep 0.1; done",
            "systemctl stop apart",
        ),
        f"{node} is open in process": (open_it(node), "systemctl stop opener"),
        f"{node} is used as swap": (f"mkswap {node} >/dev/null; swapon {node}", f"swapoff {node}"),
        f"{node} is held by dm-": (
            f"dmsetup create held --table '0 8192 linear {node} 0'",
            "dmsetup remove --retry held",
        ),
        f"{node} is behind /dev/loop": (f"losetup -f {node}", f"losetup -d $(losetup -nO NAME -j {node})"),
    }
    for named, (begin, end) in uses.items():
        lab.guest.run(f"set -e; {begin}")
        with refused(lab, "used", needle=named):
            lab.guest.run(end)
    lab.detach("used")


def open_it(node: str) -> str:
    """A shell command that starts the unit `opener`, a sleep(1) that has the node open."""
    return (
        f"systemd-run -q --unit=opener sh -c 'exec sleep 1000 <{node}';"
        f'until [ "$(readlink /proc/$(systemctl show -P MainPID opener)/fd/0)" = {node} ]; do sleep 0.1; done'
    )


def test_detach_with_wait_waits_for_users_to_leave(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M")
    lab.attach_uri(server.uri, "waited")
    node = lab.device("waited")["Node"]
    lab.guest.run(open_it(node))
    with refused(lab, "waited", "{'wait': <uint32 1>}", needle="(sleep)"):
        pass
    lab.guest.run(
        "gdbus call --system --timeout=90 --dest=org.nbdd1 --object-path=/org/nbdd1 "
        "--method=org.nbdd1.Manager.Detach waited \"{'wait': <uint32 60>}\" & call=$!;"
        f"get='busctl get-property org.nbdd1 {object_path('waited')} org.nbdd1.Device State';"
        'until [ "$($get)" = \'s "detaching"\' ]; do sleep 0.1; done; systemctl stop opener; wait $call',
        timeout=100,
    )
    assert lab.bound() == []


def test_detach_by_force_takes_open_and_mounted_devices_and_names_who_is_left(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M")
    nodes = []
    for name in ("opened", "mounted"):
        lab.attach_uri(server.uri, name)
        nodes.append(lab.device(name)["Node"])
    lab.guest.run(f"{open_it(nodes[0])}; mkdir -p /mnt/t; mkfs.ext4 -q {nodes[1]}; mount {nodes[1]} /mnt/t")
    force = {"force": ("b", True)}
    done = lab.calls({name: Call("Detach", "sa{sv}", (name, force)) for name in ("opened", "mounted")}, together=True)
    assert [outcome.error for outcome in done.values()] == [None, None]
    assert lab.devices() == {}
    told = lab.guest.journal("nbdd", 20)
    assert f"{nodes[0]} is open in process" in told
    assert f"{nodes[1]} is mounted on /mnt/t" in told
    # The kernel gives the nodes free when the last one has left.
    lab.guest.run("systemctl stop opener; umount /mnt/t")
    for node in nodes:
        lab.until(f"[ ! -e /sys/block/{Path(node).name}/pid ]", 10)


def test_boot_device_is_attached_when_its_server_comes_and_no_start_waits_for_it(lab: Lab) -> None:
    lab.guest.run("systemctl stop nbdd")
    lab.guest.write(
        "/etc/nbdd/devices.d/test.yaml",
        "devices:\n  early: {uri: 'nbd://127.0.0.1:10899', attach: boot}\n  later: {uri: 'nbd://127.0.0.1:10898'}\n",
    )
    lab.guest.run("systemctl start nbdd", timeout=60)
    wait_for_status(lab, "0/2 attached (1 connecting)")
    get = f"busctl get-property org.nbdd1 {object_path('early')} org.nbdd1.Device State LastError"
    lab.until(f"{get} | tr '\\n' ' ' | grep -q 'connecting.*Error.ConnectFailed.*127.0.0.1:10899'", 15)
    lab.serve("nbdkit -f -i 127.0.0.1 -p 10899 memory 16M", "", ready="ss -ltnH sport = :10899 | grep -q .")
    lab.wait_for("early", "State", 's "attached"', 15)
    wait_for_status(lab, "1/2 attached")
    lab.guest.run("test -b /dev/disk/by-nbd/early")
    # The end of the service is the end of a device that nobody uses.
    lab.guest.run("systemctl stop nbdd")
    assert lab.bound() == []


def test_definition_has_the_defaults_of_its_file_and_its_own_keys_above_them(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M")
    lab.guest.run("cp /etc/nbdd/nbdd.yaml /root/nbdd.yaml")
    lab.guest.write("/etc/nbdd/nbdd.yaml", "defaults: {timeout: 7, dead-timeout: 70, read-only: true}\n")
    try:
        lab.define(
            f"devices:\n  plain: {{uri: '{server.uri}'}}\n"
            f"  own: {{uri: '{server.uri}', timeout: 9, read-only: false, device: /dev/nbd5, block-size: 4096}}\n"
        )
        lab.attach("plain")
        assert lab.attach("own") == "/org/nbdd1/device/own"
        plain, own = lab.device("plain"), lab.device("own")
        assert (plain["Timeout"], plain["DeadTimeout"], plain["ReadOnly"], plain["Configured"]) == (7, 70, True, True)
        assert (own["Timeout"], own["DeadTimeout"], own["ReadOnly"], own["BlockSize"]) == (9, 70, False, 4096)
        assert own["Node"] == "/dev/nbd5"
        # The kernel is of the same mind.
        told = lab.guest.run(
            f"blockdev --getro --getss --getsize64 {plain['Node']} /dev/nbd5;"
            f"cat /sys/block/{Path(plain['Node']).name}/queue/io_timeout /sys/block/nbd5/queue/io_timeout"
        )
        assert told.stdout.split() == ["1", "512", str(16 << 20), "0", "4096", str(16 << 20), "7000", "9000"]
        refused = lab.guest.run(f"dd if=/dev/zero of={plain['Node']} count=1 oflag=direct", check=False)
        assert refused.returncode != 0
        # /dev/nbd5 is taken now, and no other one is given in its place.
        lab.detach("plain")
        with pytest.raises(BusError) as taken:
            lab.attach("plain", "{'device': <'/dev/nbd5'>}")
        assert (taken.value.name, "/dev/nbd5" in taken.value.text) == (BUSY, True), taken.value
        lab.detach("own")
    finally:
        lab.guest.run("mv /root/nbdd.yaml /etc/nbdd/nbdd.yaml")


def test_export_attached_without_a_name_gets_one_and_keeps_it_until_it_is_detached(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M", export="disks/second%20one")
    more = "{'read-only': <true>, 'timeout': <uint32 30>}"
    assert f"'{object_path('disks-second-one')}'" in lab.call("AttachURI", f"'{server.uri}'", more)
    assert f"'{object_path('disks-second-one-2')}'" in lab.call("AttachURI", f"'{server.uri}'", "@a{sv} {}")
    found = lab.devices()
    assert set(found) == {"disks-second-one", "disks-second-one-2"}
    first = found["disks-second-one"]
    assert (first["ReadOnly"], first["Timeout"], first["Configured"]) == (True, 30, False)
    lab.detach("disks-second-one")
    lab.detach("disks-second-one-2")
    assert lab.devices() == {}


def test_nbdctl_does_each_of_its_commands(lab: Lab) -> None:
    server = lab.nbdkit("memory 16M")
    lab.guest.write("/etc/nbdd/devices.d/test.yaml", f"devices:\n  tool: {{uri: '{server.uri}'}}\n")
    # An attach that fails at once is an event too: when it is seen, the monitor listens.
    probe = "busctl call org.nbdd1 /org/nbdd1 org.nbdd1.Manager AttachURI 'sa{sv}' nbd://127.0.0.1:9 1 name s probe"
    probed = f"until grep -q probe /run/monitor; do {probe} || :; done"
    done = commands(
        lab,
        {
            "reload": "nbdctl reload --json",
            "monitor": f"nbdctl monitor --json >/run/monitor & monitor=$!; {probed}",
            "attach": "nbdctl attach tool --json",
            "again": "nbdctl attach tool",
            "needed": "nbdctl attach tool --if-needed",
            "list": "nbdctl list",
            "list json": "nbdctl list --json",
            "timeout": "nbdctl set-timeout tool 20 --json",
            "read": "dd if=/dev/disk/by-nbd/tool of=/dev/null bs=1M count=2 iflag=direct status=none",
            "status": "nbdctl status tool --json",
            "exports": f"nbdctl exports {server.uri} --json",
            "detach": "nbdctl detach tool --json",
            "usage": "nbdctl detach",
            "nobody": "nbdctl status nobody",
            "events": "until grep -q '\"detached\"' /run/monitor; do sleep 0.1; done; cat /run/monitor",
        },
    )
    codes = {name: code for name, (code, _, _) in done.items() if code}
    assert codes == {"again": 1, "usage": 2, "nobody": 1}, done
    for name in ("again", "nobody"):
        _, out, err = done[name]
        assert (out, err.count("\n"), err.startswith("nbdctl: ")) == ("", 1, True), done[name]

    def parsed(name: str) -> Any:
        return json.loads(done[name][1])

    assert parsed("reload") == {"added": ["tool"], "changed": [], "removed": []}
    node = parsed("attach")["node"]
    assert parsed("attach") == {"name": "tool", "node": node, "size": 16 << 20}
    assert node in done["needed"][1]
    assert [line.split()[:3] for line in done["list"][1].splitlines()][1] == ["tool", node, "attached"]
    (listed,) = parsed("list json")["devices"]
    assert (listed["name"], listed["node"], listed["state"], listed["timeout"]) == ("tool", node, "attached", 0)
    assert parsed("timeout") == {"name": "tool", "timeout": 20}
    status = parsed("status")
    assert (status["timeout"], status["size"], status["last-error"]) == (20, 16 << 20, None)
    assert status["statistics"]["read-bytes"] >= 2 << 20
    (export,) = parsed("exports")["exports"]
    assert export["size"] == 16 << 20
    assert parsed("detach") == {"name": "tool", "detached": True}
    events = [event for event in map(json.loads, done["events"][1].splitlines()) if event["name"] == "tool"]
    states = [event["changes"]["state"] for event in events if "state" in event.get("changes", {})]
    assert states == ["connecting", "attached", "detaching", "detached"]


def commands(lab: Lab, wanted: dict[str, str]) -> dict[str, tuple[int, str, str]]:
    """Run shell commands one after the other with one ssh; exit code, stdout and stderr of each."""
    script = "".join(f"{{ {command}; }} >$d/out 2>$d/err; code=$?; told\n" for command in wanted.values())
    done = lab.guest.run(
        "d=$(mktemp -d); told() { echo $code; for f in out err; do printf '\\036'; cat $d/$f; done; printf '\\036'; }\n"
        f"{script}rm -r $d; kill $monitor",
        timeout=300,
        check=False,
    )
    parts = done.stdout.split("\x1e")
    return {
        name: (int(parts[number * 3]), parts[number * 3 + 1], parts[number * 3 + 2])
        for number, name in enumerate(wanted)
    }
