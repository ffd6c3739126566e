# SPDX-License-Identifier: MIT
"""dunst(1), which shows notifications on a real desktop, and tells on its output what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.desktop.screen import DEADLINE

_CONFIG = """[global]
font = DejaVu Sans 11
width = 440
height = 180
origin = top-right
offset = 10x10
padding = 14
horizontal_padding = 16
frame_width = 1
frame_color = "#9a9996"
corner_radius = 0
format = "<b>%s</b>\\n%b"
markup = full
icon_position = left
icon_theme = Adwaita
enable_recursive_icon_lookup = true
icon_path = {icons}
min_icon_size = 48
max_icon_size = 48
show_indicators = false
[urgency_low]
background = "#fafafa"
foreground = "#241f31"
[urgency_normal]
background = "#fafafa"
foreground = "#241f31"
[urgency_critical]
background = "#fafafa"
foreground = "#241f31"
frame_color = "#c01c28"
"""


@dataclass(frozen=True)
class Printed:
    """A notification as dunst understood it."""

    summary: str
    body: str
    urgency: str
    icon: str


class Dunst:
    """A dunst on a screen and a session's bus; use it in ``with``."""

    def __init__(self, folder: Path, display: str, address: str, icons: str = "") -> None:
        config = folder / "dunstrc"
        config.write_text(_CONFIG.format(icons=icons))
        self._environment = os.environ | {
            "DISPLAY": display, "DBUS_SESSION_BUS_ADDRESS": address, "HOME": str(folder), "LC_ALL": "C.UTF-8",
            "XDG_CACHE_HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "NO_AT_BRIDGE": "1",
        }  # fmt: skip
        self._environment.pop("WAYLAND_DISPLAY", None)
        self.shown: list[Printed] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            ["dunst", "-config", str(config), "-print"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self._environment,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        # notification.c, notification_print: "{", lines of "\tkey: 'value'" or "\tkey: value", "}".
        assert self._process.stdout is not None
        fields: dict[str, str] = {}
        for line in self._process.stdout:
            if line.startswith("}"):
                with self._changed:
                    self.shown.append(
                        Printed(*(fields.get(key, "") for key in ("summary", "body", "urgency", "icon_id")))
                    )
                    self._changed.notify_all()
                fields = {}
            elif found := re.match(r"\t(\w+): '?(.*?)'?$", line):
                fields[found[1]] = found[2]

    def wait_for(self, summary: str) -> Printed:
        """The newest notification of that summary."""

        def newest(shown: list[Printed]) -> Printed | None:
            return next((one for one in reversed(shown) if one.summary == summary), None)

        return self.wait_until(newest)

    def wait_until(self, found: Callable[[list[Printed]], Printed | None]) -> Printed:
        """What `found` finds, as soon as it does."""
        with self._changed:
            assert self._changed.wait_for(lambda: found(self.shown) is not None, DEADLINE), self.shown
            result = found(self.shown)
        assert result is not None
        return result

    def press(self) -> None:
        """Press the button of the newest notification, which has one only."""
        subprocess.run(["dunstctl", "action", "0"], check=True, timeout=DEADLINE, env=self._environment)
