# SPDX-License-Identifier: MIT
"""Connections that die: I/O waits and goes on; how long it waits, for whom, and what ends the waiting."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Show
from tests.scale import times
from tests.system.lab import Lab, Server
from tests.system.load import Load, strike

MIB = 1 << 20

ROUNDS = times(1, 10)
"""Of up to ten strikes each at servers under load."""

AWAY = times(8, 20)
"""Seconds that a network is cut, and a server stands still, after that is noticed or could have been."""


def file_server(lab: Lab, image: str = "/root/disk.img", arguments: str = "") -> Server:
    """nbdkit on a file, to be killed and started again."""
    return lab.nbdkit(f"{arguments} file {image}")


def again(server: Server, image: str = "/root/disk.img") -> str:
    """The shell command that starts such a server again, on the same port."""
    port = server.uri.split(":")[2].strip("/")
    return (
        f"systemctl stop {server.unit} 2>/dev/null;"
        f"systemd-run -q --collect --unit={server.unit} nbdkit -f -i 127.0.0.1 -p {port} file {image}"
    )


def kill(server: Server) -> str:
    """The shell command that sends it the signal that is named behind it."""
    return f"systemctl kill {server.unit} --signal"


def waiting(lab: Lab, device: str, link: str, seconds: float, server: Server) -> dict[str, Any]:
    """See waiting.py."""
    lab.guest.put(Path(__file__).with_name("in_guest") / "waiting.py", "/run/waiting.py")
    done = lab.guest.run(
        f"python3 /run/waiting.py {device} '{link}' {seconds} '{kill(server)}' '{again(server)}'", timeout=200
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_requests_in_flight_are_done_soon_after_the_connection_is_back(lab: Lab, show: Callable[[str], None]) -> None:
    lab.guest.run("rm -f /root/disk.img; truncate -s 16M /root/disk.img")
    server = file_server(lab)
    lab.define(f"devices:\n  soon:\n    uri: {server.uri}\n")
    lab.attach("soon")
    node = lab.device("soon")["Node"].removeprefix("/dev/")
    assert lab.guest.run(f"cat /sys/block/{node}/queue/io_timeout").stdout == "1000\n"
    told = waiting(lab, f"/dev/{node}", f"{node}: reconnected socket", 1, server)
    assert [told[which]["error"] for which in ("early", "late")] == ["", ""], told
    # Later ones wait for a connection; the early one for the kernel's look, once a second.
    assert told["early"]["after the connection was back"] <= 1.5, told
    after = told["early"]["after the connection was back"]
    show(f"a request under way at a kill, done after the connection was back: {after} s")
    lab.wait_for("soon", "State", 's "attached"')
    assert lab.device("soon")["Reconnects"] == 1
    lab.call("SetTimeout", "'soon'", "uint32 7")
    assert lab.guest.run(f"cat /sys/block/{node}/queue/io_timeout").stdout == "7000\n"
    lab.call("SetTimeout", "'soon'", "uint32 0")
    assert lab.guest.run(f"cat /sys/block/{node}/queue/io_timeout").stdout == "1000\n"
    lab.detach("soon")
    assert lab.guest.run(f"cat /sys/block/{node}/queue/io_timeout").stdout == "30000\n", "as it was found"
    # The field: nbd-client as it mends best, without netlink, since with it it does not.
    port = server.uri.split(":")[2].strip("/")
    lab.guest.run(f"nbd-client -nonetlink -persist 127.0.0.1 {port} /dev/nbd9 -N ''; sleep 1")
    try:
        theirs = waiting(lab, "/dev/nbd9", "", 1, server)
    finally:
        lab.guest.run("nbd-client -d /dev/nbd9; sleep 1", check=False)
    for whose, found in (("nbdd", told), ("nbd-client -persist", theirs)):
        early = found["early"]
        outcome = early["error"] or (
            f"done {early['after the server was back']} s after the server was back"
            if early["after the kill"] is not None
            else "not done in two minutes"
        )
        show(f"{whose}: a read under way when its server is killed: {outcome}")


@pytest.mark.quick_on("debian13")
def test_requests_in_flight_on_several_connections_or_with_a_timeout_wait_for_the_kernels_timer(
    lab: Lab, show: Show, release: str
) -> None:
    lab.guest.run("rm -f /root/disk.img; truncate -s 16M /root/disk.img")
    server = file_server(lab)
    # The kernel's own 30 s, where nothing else is said, are for the full run.
    cases = {"timeout: 5": 5, "connections: 3, timeout: 5": 5, "connections: 3": 30}
    for keys, timer in list(cases.items())[: times(2, 3)]:
        lab.define(f"devices:\n  timed: {{uri: '{server.uri}', {keys}}}\n")
        lab.attach("timed")
        node = lab.device("timed")["Node"].removeprefix("/dev/")
        told = waiting(lab, f"/dev/{node}", f"{node}: reconnected socket", 1, server)
        early = told["early"]["after the kill"]
        show(
            f"{release}: with {keys}, of two reads at a kill the one under way is done {early} s after it,"
            f" the later one after {told['late']['after the kill']} s"
        )
        assert [told[which]["error"] for which in ("early", "late")] == ["", ""], told
        # Where processors are emulated and wanted by many, 3 s more were seen.
        assert early <= timer + 8, told
        lab.wait_for("timed", "State", 's "attached"')
        lab.detach("timed")


@pytest.mark.quick_on("debian12")
@pytest.mark.timeout(600 + 120 * ROUNDS, func_only=True)
def test_servers_killed_and_restarted_under_load_cost_no_io(lab: Lab, show: Show, release: str) -> None:
    unit = "-p Restart=always -p RestartSec=100ms -p StartLimitIntervalSec=0 -p LimitNOFILE=1024"
    config = "[generic]\nlistenaddr=127.0.0.1\nport=PORT\n[disk]\nexportname=/root/nbdserver.img\n"
    lab.guest.write("/run/nbd-server.conf.in", config)
    lab.guest.run("cd /root; for s in nbdkit qemunbd nbdserver; do rm -f $s.img; truncate -s 64M $s.img; done")
    configured = (
        "sed s/PORT/{port}/ /run/nbd-server.conf.in >/run/nbd-server.conf; exec nbd-server -C /run/nbd-server.conf"
    )
    commands = {
        "nbdkit": f"{unit} nbdkit -f -i 127.0.0.1 -p {{port}} file /root/nbdkit.img",
        "qemunbd": f"{unit} qemu-nbd -t -f raw -b 127.0.0.1 -p {{port}} -x disk /root/qemunbd.img",
        "nbdserver": f"{unit} -p Type=forking sh -c '{configured}'",
    }
    servers = {
        name: lab.serve(command, f"nbd://127.0.0.1:{{port}}/{'' if name == 'nbdkit' else 'disk'}")
        for name, command in commands.items()
    }
    # nbd-server computes for a while before it greets anybody, where processors are emulated for minutes at times.
    lab.until(f"nbdinfo --size {servers['nbdserver'].uri} >/dev/null", 400, unit=servers["nbdserver"].unit)
    lines = "".join(f"  {name}: {{uri: '{server.uri}', dead-timeout: 3600}}\n" for name, server in servers.items())
    lab.define(f"devices:\n{lines}")
    for name in servers:
        lab.attach(name)
    loads = [Load(lab, name) for name in servers]
    try:
        # Not the restart of nbdkit: what it says on SIGTERM is an error of its own; see docs/reliability.md.
        rounds = {
            "nbdkit": ["kill"] * times(2, 40),
            "qemunbd": ["restart", "kill"] * times(1, 20),
            "nbdserver": ["restart", "kill"] * times(1, 10),
        }
        words = {"kill": "systemctl kill --kill-whom=all --signal=KILL", "restart": "systemctl restart"}
        strikes = {
            name: [("connection", f"{words[word]} {servers[name].unit}") for word in in_turn]
            for name, in_turn in rounds.items()
        }
        recovered = strike(loads, strikes, 500 + 90 * ROUNDS)
        for load in loads:
            load.another_pass()
            load.end()
    finally:
        for load in loads:
            load.kill()
    for name, recovery in recovered.items():
        show(f"{release}: {name} killed and restarted under load, attached again: {recovery}")
    for name, server in servers.items():
        assert lab.device(name)["Reconnects"] >= len(strikes[name]), server
        lab.detach(name)


def test_server_that_takes_five_seconds_for_each_request_keeps_its_connection(lab: Lab) -> None:
    slow = "if [ -e /run/slow ]; then sleep 5; fi; head -c $3 /dev/zero"
    server = lab.nbdkit(f"eval get_size='echo 1M' pread='{slow}'")
    lab.attach_uri(server.uri, "slow")
    lab.guest.run("touch /run/slow")
    try:
        started = time.monotonic()
        lab.guest.run("dd if=/dev/disk/by-nbd/slow of=/dev/null bs=4k count=2 iflag=direct status=none", timeout=60)
        assert time.monotonic() - started > 10
    finally:
        lab.guest.run("rm -f /run/slow")
    told = lab.device("slow")
    assert (told["State"], told["Reconnects"], told["LastError"]) == ("attached", 0, ["", ""])
    assert any("Possible stuck request" in line for line in lab.kernel_log()), "the kernel looked, and left it in peace"
    lab.detach("slow")


def test_dead_timeout_fails_all_io_at_the_promised_second_and_the_device_can_be_brought_back(
    lab: Lab,
) -> None:
    lab.guest.run("rm -f /root/disk.img; truncate -s 16M /root/disk.img")
    server = file_server(lab)
    lab.define(f"devices:\n  dead:\n    uri: {server.uri}\n    dead-timeout: 8\n")
    lab.attach("dead")
    told = waiting(lab, "/dev/disk/by-nbd/dead", "", 20, server)
    for which in ("early", "late"):
        assert told[which]["error"] == "Input/output error", told
        assert 6 <= told[which]["after the kill"] <= 10, told
    journal = lab.guest.journal("nbdd", 40)
    assert "dead: no server answers; reads and writes that wait fail in " in journal
    assert "dead: No server came back within 8 s: reads and writes fail until one does." in journal
    device = lab.device("dead")
    assert (device["State"], device["LiveConnections"]) == ("failed", 0)
    assert device["Node"]
    assert 0 < device["FailsAt"] / 1e6 < float(lab.guest.run("date +%s.%N").stdout) + 1
    # New requests fail at once, and nobody hangs.
    lab.guest.run("! timeout 5 dd if=/dev/disk/by-nbd/dead of=/dev/null bs=4k count=1 skip=64 iflag=direct 2>/dev/null")
    assert lab.guest.run("ps -eo stat,comm | grep '^D.*dd$' || :").stdout == ""
    lab.guest.run(again(server))
    lab.wait_for("dead", "State", 's "attached"')
    lab.guest.run("dd if=/dev/disk/by-nbd/dead of=/dev/null bs=1M iflag=direct status=none", timeout=60)
    assert lab.device("dead")["FailsAt"] == 0
    lab.detach("dead")


@pytest.mark.quick_on("debian13")
def test_server_with_other_data_is_refused_by_its_size_and_by_its_filesystem_and_the_right_one_is_taken_back(
    lab: Lab,
) -> None:
    lab.guest.run(
        "cd /root; rm -f disk.img other.img larger.img; truncate -s 32M disk.img other.img; truncate -s 33M larger.img;"
        "mkfs.ext4 -q other.img; mkfs.ext4 -q larger.img"
    )
    server = file_server(lab)
    second = file_server(lab, "/root/other.img")
    lab.define(f"devices:\n  same:\n    uri: [{server.uri}, {second.uri}]\n")
    lab.attach("same")
    lab.guest.run(
        "mkfs.ext4 -q /dev/disk/by-nbd/same && udevadm settle && mkdir -p /mnt/t && mount /dev/disk/by-nbd/same /mnt/t"
        "&& head -c 8M /dev/urandom >/mnt/t/data && sync && sha256sum </mnt/t/data >/root/data.sum"
    )
    for image, difference in (("larger.img", "the size was 33554432"), ("other.img", "the UUID of its filesystem was")):
        before = lab.guest.run(f"sha256sum /root/{image} /root/other.img").stdout
        lab.guest.run(f"{kill(server)} KILL; {again(server, f'/root/{image}')}")
        get = "busctl get-property org.nbdd1 /org/nbdd1/device/same org.nbdd1.Device LastError"
        # Before it is up, the second one is tried, and refused.
        lab.until(f'{get} | grep -q "{server.uri}/* came back as something else, and is not used: {difference}"')
        told = lab.device("same")
        assert (told["State"], told["LastError"][0]) == ("failed", "org.nbdd1.Error.NegotiationFailed")
        assert told["FailsAt"] > 0
        assert lab.guest.run(f"sha256sum /root/{image} /root/other.img").stdout == before, "not a byte was written"
        lab.guest.run(f"{kill(server)} KILL; {again(server)}")
        lab.wait_for("same", "State", 's "attached"')
        lab.guest.run("echo 3 >/proc/sys/vm/drop_caches; sha256sum --check --status /root/data.sum </mnt/t/data")
    # The next one of the list is taken where it has the same data.
    lab.guest.run("sync; umount /mnt/t")
    lab.guest.run(f"{kill(second)} KILL; cp /root/disk.img /root/other.img; {again(second, '/root/other.img')}")
    lab.guest.run(f"{kill(server)} KILL")
    lab.wait_for("same", "URI", f's "{second.uri}"')
    lab.wait_for("same", "State", 's "attached"')
    lab.guest.run(
        "mount /dev/disk/by-nbd/same /mnt/t && sha256sum --check --status /root/data.sum </mnt/t/data; umount /mnt/t"
    )
    lab.detach("same")


@pytest.mark.quick_on("debian12")
def test_network_that_drops_everything_and_a_server_that_stands_still_cost_no_io(lab: Lab) -> None:
    lab.guest.run("rm -f /root/disk.img; truncate -s 16M /root/disk.img")
    cut, still = file_server(lab), lab.nbdkit("memory 16M")
    port = cut.uri.split(":")[2].strip("/")
    lab.define(f"devices:\n  cut:\n    uri: {cut.uri}\n    network-timeout: 5\n  still:\n    uri: {still.uri}\n")
    lab.attach("cut")
    lab.attach("still")
    fio = (
        "fio --name={0} --filename=/dev/disk/by-nbd/{0} --rw=randwrite --bs=4k --size=2M --iodepth=8 --ioengine=libaio"
    )
    fio += " --direct=1 --verify=crc32c --verify_fatal=1 --time_based --runtime={1} --output=/run/{0}.log"
    lab.guest.run(
        "".join(f"systemd-run -q --unit=fio-{name} {fio.format(name, 15 + AWAY)};" for name in ("cut", "still"))
    )
    lab.guest.run("sleep 3")
    drop = "".join(f"nft add rule inet cut in tcp {side} {port} drop;" for side in ("dport", "sport"))
    lab.guest.run(
        f"nft add table inet cut; nft add chain inet cut in '{{ type filter hook input priority 0; }}'; {drop}"
        f"{kill(still)} STOP"
    )
    lab.wait_for("cut", "State", 's "reconnecting"', 30)
    assert "was silent for 5 s" in lab.device("cut")["LastError"][1]
    lab.guest.run(f"sleep {AWAY}; nft delete table inet cut; {kill(still)} CONT", timeout=60)
    lab.wait_for("cut", "State", 's "attached"')
    lab.until("! systemctl -q is-active fio-cut && ! systemctl -q is-active fio-still", 120)
    assert lab.guest.run("systemctl is-failed fio-cut fio-still || :").stdout == "inactive\ninactive\n"
    assert [line for line in lab.kernel_log() if "I/O error" in line] == []
    assert lab.device("still")["Reconnects"] == 0
    for name in ("cut", "still"):
        lab.detach(name)


@pytest.mark.quick_on("debian13")
def test_connections_are_exchanged_and_a_device_grows_as_asked_for_under_io(
    lab: Lab, show: Callable[[str], None]
) -> None:
    lab.guest.run("cd /root; rm -f disk.img other.img; truncate -s 32M disk.img other.img")
    server = file_server(lab)
    # What is heavy always has something under way; what is light leaves a moment for the exchange.
    lab.define(
        f"devices:\n  heavy:\n    uri: {server.uri}\n  light:\n    uri: {file_server(lab, '/root/other.img').uri}\n"
        "    connections: 3\n"
    )
    for name, load in (("heavy", "--iodepth=8"), ("light", "--thinktime=20ms")):
        lab.attach(name)
        lab.guest.write(
            f"/run/{name}.sh",
            "#!/bin/sh\nwhile [ ! -e /run/renewed ]; do n=$((n + 1));"
            f" fio --name={name} --filename=/dev/disk/by-nbd/{name} --rw=randwrite --bs=4k --size=2M --ioengine=libaio"
            f" --direct=1 --verify=crc32c --verify_fatal=1 {load} --output-format=json --output=/run/{name}.$n.json"
            " || exit 1; done\n",
            0o755,
        )
    lab.guest.run(
        "rm -f /run/renewed /run/*.json; for n in heavy light; do systemd-run -q --unit=fio-$n /run/$n.sh; done"
    )
    # An attach for which the kernel is short of threads, at first, leaves errors of its own.
    lab.mark()
    for _ in range(3):
        for name in ("heavy", "light"):
            lab.guest.run(f"nbdctl reconnect {name}")
    assert [lab.device(name)["Reconnects"] for name in ("heavy", "light")] == [3, 9]
    assert [lab.device(name)["State"] for name in ("heavy", "light")] == ["attached", "attached"]
    lab.guest.run("truncate -s 48M /root/disk.img")
    assert lab.guest.run("nbdctl resize heavy").stdout == "heavy has 48 MiB (50331648 bytes)\n"
    lab.guest.run("touch /run/renewed")
    lab.until("! systemctl -q is-active fio-heavy && ! systemctl -q is-active fio-light", 120)
    assert lab.guest.run("systemctl is-failed fio-heavy fio-light || :").stdout == "inactive\ninactive\n"
    for name in ("heavy", "light"):
        told = lab.guest.run(f"cat /run/{name}.*.json").stdout
        longest = max(map(int, re.findall(r'"clat_ns" : \{\s*"min" : \d+,\s*"max" : (\d+)', told))) / 1e9
        show(f"connections exchanged three times under I/O, {name}: the longest request took {longest:.2f} s")
    assert lab.device("heavy")["Size"] == 48 * MIB
    lab.guest.run("dd if=/dev/disk/by-nbd/heavy of=/dev/null bs=1M skip=47 iflag=direct status=none")
    # The size is what mending goes by, and shrinking is refused, with every byte in its place.
    lab.guest.run(f"{kill(server)} KILL; {again(server)}")
    lab.wait_for("heavy", "State", 's "attached"')
    lab.guest.run("truncate -s 32M /root/disk.img")
    done = lab.guest.run("nbdctl resize heavy", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "33554432 bytes now, less than the 50331648 of the device" in done.stderr
    lab.guest.run("truncate -s 48M /root/disk.img")
    assert [line for line in lab.kernel_log() if "I/O error" in line] == []
    for name in ("heavy", "light"):
        lab.detach(name)


def test_timeout_changed_while_the_server_is_away_does_not_keep_the_device_from_being_mended(
    lab: Lab,
) -> None:
    lab.guest.run("rm -f /root/disk.img; truncate -s 16M /root/disk.img")
    server = file_server(lab)
    lab.define(f"devices:\n  away:\n    uri: {server.uri}\n")
    lab.attach("away")
    node = lab.device("away")["Node"].removeprefix("/dev/")
    lab.guest.run(f"{kill(server)} STOP")
    # Under way when the server dies: from Linux 6.12 on, a write below queue/ waits for it, and every reader for that.
    read = "dd if=/dev/disk/by-nbd/away of=/dev/null bs=4k count=8 iflag=direct status=none"
    lab.guest.run(f"systemd-run -q --unit=reader {read}; until grep -q ' [1-9]' /sys/block/{node}/inflight; do :; done")
    lab.guest.run(f"{kill(server)} KILL")
    lab.wait_for("away", "State", 's "reconnecting"')
    for seconds in (60, 0):
        lab.call("SetTimeout", "'away'", f"uint32 {seconds}")
    lab.guest.run(again(server))
    lab.wait_for("away", "State", 's "attached"', 60)
    lab.until("! systemctl -q is-active reader", 90)
    assert lab.guest.run("systemctl is-failed reader || :").stdout == "inactive\n"
    lab.until(f'[ "$(cat /sys/block/{node}/queue/io_timeout)" = 1000 ]', what="the pace is what it was")
    lab.detach("away")
