# SPDX-License-Identifier: MIT
"""A desktop's side of a disk, with the real udev, UDisks, logind and polkit: how it shows up, and who may have it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.lab import Lab, Server
from tests.system.seat import RULES_FILE, Seat

pytestmark = pytest.mark.quick_on("debian12")

TREE = Path(__file__).resolve().parents[2]
LINKS_RULE = """
polkit.addRule(function(action, subject) {
    if (subject.user == "visitor" && subject.active && action.id == "org.nbdd1.attach-uri" &&
        /^127\\.0\\.0\\.1:\\d+$/.test(action.lookup("server"))) return polkit.Result.YES;
});
"""


def hints(lab: Lab, node: str) -> dict[str, Any]:
    """What UDisks tells desktops of a device, once it has its size and so has followed udev."""
    path = f"/org/freedesktop/UDisks2/block_devices/{node.rpartition('/')[2]}"
    get = f"busctl --json=short get-property org.freedesktop.UDisks2 {path} org.freedesktop.UDisks2.Block"
    lab.until(f"{get} Size 2>/dev/null | grep -qv '\"data\":0'", 30, what=f"UDisks to know {node}")
    names = ("HintSystem", "HintAuto", "HintIgnore", "HintName", "HintIconName", "HintSymbolicIconName")
    told = lab.guest.run(f"{get} {' '.join(names)}").stdout.splitlines()
    return {name: json.loads(line)["data"] for name, line in zip(names, told, strict=True)}


SYSTEMS = {
    "HintSystem": True, "HintAuto": False, "HintIgnore": False, "HintName": "", "HintIconName": "",
    "HintSymbolicIconName": "",
}  # fmt: skip


def test_udisks_shows_a_disk_with_the_key_desktop_as_it_says_and_one_without_as_before(lab: Lab) -> None:
    lab.guest.run(
        "systemctl start udisks2; truncate -s 64M /root/parted.img;"
        "printf 'label: gpt\\nstart=1MiB, size=24MiB\\nsize=24MiB\\n' | sfdisk -q --no-reread /root/parted.img"
    )
    server = lab.nbdkit("file /root/parted.img")
    lab.define(
        "devices:\n"
        f"  photos:\n    uri: {server.uri}\n    read-only: true\n"
        '    desktop: {name: "Eve\'s photos = $env{ID} %k (ä)", icon: folder-pictures}\n'
        f"  guarded:\n    uri: {server.uri}\n    read-only: true\n    desktop: {{user-mountable: false}}\n"
        f"  plain:\n    uri: {server.uri}\n    read-only: true\n"
    )
    name = "Eve's photos = $env{ID} %k (ä)"
    try:
        for device in ("photos", "guarded", "plain"):
            lab.attach(device)
        node = lab.device("photos")["Node"]
        icons = {"HintIconName": "folder-pictures", "HintSymbolicIconName": "folder-pictures-symbolic"}
        shown = SYSTEMS | icons | {"HintSystem": False}
        assert hints(lab, node) == shown | {"HintName": name}
        assert [hints(lab, f"{node}p{part}")["HintName"] for part in (1, 2)] == [f"{name} 1", f"{name} 2"]
        assert hints(lab, f"{node}p2") == shown | {"HintName": f"{name} 2"}
        assert hints(lab, lab.device("guarded")["Node"]) == SYSTEMS
        assert hints(lab, lab.device("plain")["Node"]) == SYSTEMS
        files = lab.guest.run("stat -c '%n %U %a' /run/nbdd/udev/*").stdout.split("\n")
        assert files == ["/run/nbdd/udev/guarded.env root 600", "/run/nbdd/udev/photos.env root 600", ""]
        # A restart of the service takes them over, and a detach takes them away.
        lab.guest.run("systemctl restart nbdd")
        lab.wait_for("photos", "State", 's "attached"')
        assert lab.device("photos")["DisplayName"] == name
        lab.detach("photos", "{'wait': <uint32 10>}")
        assert "photos" not in lab.guest.run("ls /run/nbdd/udev").stdout
        assert lab.guest.run(f"udevadm info {node} | grep -c UDISKS_ || :").stdout == "0\n"
    finally:
        lab.guest.run("systemctl stop udisks2")


@pytest.fixture
def filesystem(lab: Lab) -> Server:
    """A server of an export with a filesystem on it, and one file in that."""
    lab.guest.run(
        "truncate -s 64M /root/photos.img; mkfs.ext4 -qF -L PHOTOS /root/photos.img; mkdir -p /mnt/t;"
        "mount -o loop /root/photos.img /mnt/t; echo hello >/mnt/t/greeting; umount /mnt/t"
    )
    return lab.nbdkit("file /root/photos.img")


@pytest.fixture
def noting_opener(lab: Lab) -> Iterator[None]:
    """No file manager is on a bus: xdg-open is asked, and notes what for in /tmp/opened."""
    lab.guest.write("/usr/local/bin/xdg-open", '#!/bin/sh\necho "$1" >/tmp/opened\n', 0o755)
    yield
    lab.guest.run("rm /usr/local/bin/xdg-open")


@pytest.mark.usefixtures("noting_opener")
def test_uri_clicked_opens_a_folder_without_root_and_can_be_detached(lab: Lab, seat: Seat, filesystem: Server) -> None:
    refused = seat.run(f"nbdd-open {filesystem.uri}", check=False)
    assert refused.returncode == 1
    assert re.search(r"^nbdd-open: .*org\.nbdd1\.attach-uri.*\.$", refused.stderr, re.MULTILINE), refused.stderr
    assert lab.bound() == []
    lab.guest.write(RULES_FILE, LINKS_RULE)
    lab.guest.run("systemctl restart polkit")  # which takes a new rule when it sees it, and tells nobody
    folder = seat.run(f"nbdd-open {filesystem.uri}").stdout.strip()
    assert folder.endswith("visitor/PHOTOS")
    assert lab.guest.run("cat /tmp/opened").stdout.strip() == folder
    assert seat.run(f"cat {folder}/greeting").stdout == "hello\n"
    assert "nosuid" in lab.guest.run(f"findmnt -no OPTIONS {folder}").stdout
    (device,) = lab.devices().values()
    assert (device["Desktop"], device["Configured"], device["State"]) == (True, False, "attached")
    # A second click opens what is there.
    assert seat.run(f"nbdd-open {filesystem.uri}").stdout.strip() == folder
    assert len(lab.devices()) == 1
    # A disk in use stays, and one that somebody else attached.
    lab.guest.run(f"systemd-run -q --collect --unit=opener sh -c 'cd {folder} && exec sleep 1000'")
    busy = seat.run(f"nbdd-open --detach {folder}", check=False)
    assert (busy.returncode, "It is still in use" in busy.stderr) == (1, True), busy.stderr
    lab.guest.run("systemctl stop opener")
    other = lab.nbdkit("memory 8M")
    lab.attach_uri(other.uri, "theirs", "'desktop': <@a{sv} {}>")
    busy = seat.run("nbdd-open --detach theirs", check=False)
    assert (busy.returncode, "org.nbdd1.detach" in busy.stderr) == (1, True), busy.stderr
    lab.detach("theirs")
    assert seat.run(f"nbdd-open --detach {folder}").stdout == f"{device['Name']} is detached\n"
    assert (lab.devices(), lab.bound()) == ({}, [])
    assert lab.guest.run(f"[ -e {folder} ]", check=False).returncode == 1


@pytest.mark.prove_only
@pytest.mark.usefixtures("noting_opener")
def test_polkit_example_lets_only_the_group_attach_what_is_configured(lab: Lab, seat: Seat, filesystem: Server) -> None:
    lab.define(f"devices:\n  photos:\n    uri: {filesystem.uri}\n    desktop: {{name: Photos}}\n")
    lab.guest.put(TREE / "desktop" / "60-nbdd-group.rules", RULES_FILE)
    lab.guest.run("groupadd disks; systemctl restart polkit")
    attach = "busctl call --timeout=60 org.nbdd1 /org/nbdd1 org.nbdd1.Manager Attach 'sa{sv}' photos 0"
    detach = attach.replace("Attach", "Detach")
    assert seat.run(attach, check=False).returncode == 1, "visitor is not in the group yet"
    lab.guest.run("gpasswd -a visitor disks; systemctl restart polkit")
    assert lab.guest.run(attach, user="visitor", check=False).returncode == 1, "not at the machine"
    seat.run(attach)
    uri = f"busctl call --timeout=60 org.nbdd1 /org/nbdd1 org.nbdd1.Manager AttachURI 'sa{{sv}}' {filesystem.uri} 0"
    for command in (
        uri,
        detach.replace("photos 0", "photos 1 force b true"),
        "busctl call org.nbdd1 /org/nbdd1 org.nbdd1.Manager Reload",
    ):
        assert seat.run(command, check=False).returncode == 1, command
    seat.run(f"nbdd-open {filesystem.uri}")
    assert "/PHOTOS" in lab.guest.run("findmnt -rno TARGET -S /dev/nbd0 || findmnt -rno TARGET | grep PHOTOS").stdout
    seat.run("nbdd-open --detach photos")
    assert lab.device("photos")["State"] == "detached"


def test_polkit_asks_with_the_name_of_the_disk(lab: Lab, seat: Seat) -> None:
    """... as its own tool shows the message to a person."""
    told = lab.guest.run("pkaction --verbose --action-id org.nbdd1.attach").stdout
    assert "Authentication is required to attach the network disk $(device)." in told
    assert re.search(r"implicit active:\s+auth_admin_keep", told)
    ask = "pkcheck --action-id org.nbdd1.{} --process $$ --detail device photos; echo $?"
    for action in ("attach", "detach", "force-detach", "set-timeout"):
        # 2: a password would be asked for; details are told by root alone.
        done = seat.run(ask.format(action).replace(" --detail device photos", ""), check=False)
        assert done.stdout.splitlines()[-1] == "2", (action, done.stdout, done.stderr)


def test_notifier_is_started_by_a_graphical_session(lab: Lab) -> None:
    unit = "/usr/lib/systemd/user/nbdd-notify.service"
    told = lab.guest.run(
        "systemctl --global is-enabled nbdd-notify.service; ls /etc/systemd/user/graphical-session.target.wants;"
        f"XDG_RUNTIME_DIR=/run systemd-analyze verify --user --man=no {unit} 2>&1; nbdd-notify --version",
        check=False,
    ).stdout.splitlines()
    assert told[:2] == ["enabled", "nbdd-notify.service"]
    assert [line for line in told[2:] if "nbdd" in line] == [told[-1]]
    assert told[-1].startswith("nbdd-notify 0.")
