# SPDX-License-Identifier: MIT
"""A desktop of small parts that people use, in a guest: Xvfb, openbox, dunst, lxpolkit and Thunar.

It is one session of the person at the machine, so that polkit, logind and the user's systemd see what they would see.
"""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Self

from tests.desktop.screen import Picture
from tests.system.lab import Lab
from tests.system.seat import at_the_machine

DISPLAY = ":9"
SLOW = 120
"""Seconds after which a test gives up on a window; a processor is emulated, and a toolkit is large."""

_SESSION = f"""#!/bin/sh
export DISPLAY={DISPLAY} NO_AT_BRIDGE=1
rm -rf /tmp/desk && mkdir /tmp/desk && exec >/tmp/desk/log 2>&1
Xvfb $DISPLAY -screen 0 900x640x24 -fbdir /tmp/desk -nolisten tcp -nocursor &
until [ -S /tmp/.X11-unix/X9 ]; do sleep 0.1; done
dbus-update-activation-environment --systemd DISPLAY NO_AT_BRIDGE XDG_SESSION_ID
openbox &
lxpolkit &
dunst -print >/tmp/desk/told &
thunar --daemon &
# Of the target that a desktop reaches, only what is ours is started.
systemctl --user start nbdd-notify && touch /tmp/desk/up
wait
"""


class Desk:
    """The desktop of "visitor"; use it in ``with``."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def __enter__(self) -> Self:
        guest = self._lab.guest
        guest.write("/usr/local/bin/desk", _SESSION, 0o755)
        guest.run(f"{at_the_machine('x11', '--unit=desk')} /usr/local/bin/desk")
        agent = "Registered Authentication Agent for unix-session"
        self._lab.until(
            f"[ -e /tmp/desk/up ] && journalctl -q -b -u polkit --since -{SLOW} -g '{agent}'", SLOW,
            what="the desktop to be there",
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._lab.guest.run(
            "systemctl stop desk; systemctl stop user@$(id -u visitor); rm -f /usr/local/bin/desk", check=False
        )

    def start(self, *command: str) -> None:
        """Start a program as a panel or a browser does: a unit of the user's systemd."""
        words = " ".join(map(shlex.quote, command))
        uid = "$(id -u visitor)"
        start = f"runuser -u visitor -- env XDG_RUNTIME_DIR=/run/user/{uid} systemd-run --user --quiet --collect"
        self._lab.guest.run(f"{start} {words}")

    def do(self, actions: str) -> None:
        """What hands do; see xdotool(1)."""
        self._lab.guest.run(f"runuser -u visitor -- env DISPLAY={DISPLAY} xdotool {actions}")

    def wait_for_window(self, title: str, *, gone: bool = False) -> None:
        """Return when the window with that title has the keyboard, or no longer is to be seen."""
        ask = f"DISPLAY={DISPLAY} runuser -u visitor -- xdotool"
        if gone:
            condition = f"! {ask} search --onlyvisible --name {shlex.quote(f'^{title}$')} >/dev/null 2>&1"
        else:
            condition = f"{ask} getactivewindow getwindowname 2>/dev/null | grep -qxF {shlex.quote(title)}"
        self._lab.until(condition, SLOW, what=f"the window {title}")

    def wait_until_told(self, summary: str) -> str:
        """Return the text of the newest notification with that summary, as soon as there is one."""
        line = f"summary: '{summary}'"
        told = f"grep -A1 -F {shlex.quote(line)} /tmp/desk/told"
        self._lab.until(f"{told} >/dev/null", SLOW, what=f"the notification {summary}")
        return self._lab.guest.run(f"{told} | tail -1").stdout

    def picture(self) -> Picture:
        """What is on the screen."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "screen")
            self._lab.guest.get("/tmp/desk/Xvfb_screen0", local)
            return Picture.of_xwd(local.read_bytes())
