# SPDX-License-Identifier: MIT
"""The whole way of a click, on a desktop: the link, polkit's dialog, the file manager, its menu, and what is shown.

NBDD_SCREENSHOTS=docs/screenshots keeps what was to be seen.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.desktop.screen import Picture
from tests.system.desk import Desk
from tests.system.lab import Lab
from tests.system.seat import PASSWORD, Seat

pytestmark = pytest.mark.prove_only


def keep(name: str, picture: Picture) -> None:
    """Keep a picture where that is asked for; there is something on it in any case."""
    assert picture.colours > 50, f"{name}: only {picture.colours} colours are on the screen"
    if folder := os.environ.get("NBDD_SCREENSHOTS"):
        Path(folder, f"{name}.png").write_bytes(picture.png())


def test_desktop_click_password_folder_broken_server_and_right_click(lab: Lab, seat: Seat) -> None:
    seat.know_password()
    lab.guest.run(
        "truncate -s 64M /root/photos.img;"
        "mkfs.ext4 -qF -L PHOTOS -E root_owner=$(id -u visitor):$(id -g visitor) /root/photos.img"
    )
    server = lab.nbdkit("file /root/photos.img")
    lab.define(f"devices:\n  photos:\n    uri: {server.uri}\n    desktop: {{name: Photos}}\n")
    with Desk(lab) as desk:
        # Cancelled, of which lxpolkit tells polkit no more than of a wrong password: nothing is done, and that is said.
        desk.start("xdg-open", server.uri)
        desk.wait_for_window("Authentication")
        desk.do("key Escape")
        assert "(org.nbdd1.attach)" in desk.wait_until_told("The network disk can't be opened")
        desk.wait_for_window("Authentication", gone=True)
        assert lab.device("photos")["State"] == "detached"

        desk.start("xdg-open", server.uri)
        desk.wait_for_window("Authentication")
        keep("password", desk.picture())
        desk.do(f"type {PASSWORD}")
        desk.do("key Return")
        desk.wait_for_window("PHOTOS - Thunar")
        lab.guest.run("echo hello >/media/visitor/PHOTOS/greeting.txt", user="visitor")

        command = lab.guest.run(f"tr '\\0' ' ' </proc/$(systemctl show -P MainPID {server.unit})/cmdline").stdout
        lab.guest.run(f"systemctl kill --signal=KILL {server.unit}")
        desk.wait_until_told("Photos has lost its server")
        keep("trouble", desk.picture())
        lab.guest.run(f"systemd-run --quiet --collect --unit={server.unit} {command}")
        desk.wait_until_told("Photos is back")

        # The disk in the side pane: its menu, and "Unmount" in that.
        # A menu is no window that can be asked for: three seconds are several times what it takes.
        desk.do("search --onlyvisible --name '^PHOTOS - Thunar$' mousemove --window %1 87 237 click 3 sleep 3")
        keep("folder", desk.picture().part(125, 60, 570, 640))
        desk.do("key u")
        # Who attached it is not asked again: it goes with its last mount.
        desk.wait_until_told("Photos is detached")
        assert lab.guest.run("findmnt -n /media/visitor/PHOTOS", check=False).returncode == 1
    assert (lab.device("photos")["State"], lab.bound()) == ("detached", [])
    assert lab.guest.run("debugfs -R 'cat greeting.txt' /root/photos.img 2>/dev/null").stdout == "hello\n"
