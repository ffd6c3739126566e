# SPDX-License-Identifier: MIT
"""A person's session, with everything in it that nbdd meets there; and what may happen to a disk in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from tests.desktop.dunst import Dunst
from tests.desktop.screen import DEADLINE, Picture, Screen
from tests.fakes.manager import PRESENT, FakeManager, private_bus

TREE = Path(__file__).resolve().parents[2]
PHOTOS: dict[str, Any] = PRESENT | {
    "Name": "photos", "URI": "nbd://storage.example/photos", "Desktop": True, "DisplayName": "Photos",
}  # fmt: skip
BACK: dict[str, Any] = {"State": "attached", "LiveConnections": 1, "FailsAt": 0}
BUSY = ("org.nbdd1.Error.Busy", "'photos' is in use: /dev/nbd0 is mounted at /media/eve/Photos.")


def lost(left: float = 200.0) -> dict[str, Any]:
    """The properties of a device without links whose I/O fails in so many seconds."""
    fails = int((time.time() + left) * 1e6)
    return {"State": "reconnecting", "LiveConnections": 0, "FailsAt": fails, "DeadTimeout": 300}


class Session:
    """Two buses, a screen, dunst and nbdd-notify, with a disk "photos" that is attached; use it in ``with``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.system, self.own = (
                stack.enter_context(private_bus(self._made(name)))[0] for name in ("system", "session")
            )
            self.nbdd = stack.enter_context(FakeManager(self.system))
            self.nbdd.devices["photos"] = dict(PHOTOS)
            self.screen = stack.enter_context(Screen(self._made("screen")))
            self._showing = stack.enter_context(contextlib.ExitStack())
            self.renew()
            environment = os.environ | self.addresses
            notifier = subprocess.Popen([*program("notifier")], cwd=TREE, env=environment)
            stack.callback(notifier.wait)
            stack.callback(notifier.kill)
            self.nbdd.wait_for("GetManagedObjects")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _made(self, name: str) -> Path:
        path = self._folder / name
        path.mkdir(exist_ok=True)
        return path

    @property
    def addresses(self) -> dict[str, str]:
        return {"DBUS_SYSTEM_BUS_ADDRESS": self.system, "DBUS_SESSION_BUS_ADDRESS": self.own}

    def renew(self) -> None:
        """Kill dunst, if it runs, and start another one."""
        self._showing.close()
        icons = str(TREE / "desktop")
        self.dunst = self._showing.enter_context(Dunst(self._made("dunst"), self.screen.display, self.own, icons))

    def click(self, uri: str) -> int:
        """Click on a link; returns the status of nbdd-open."""
        return subprocess.run(
            [*program("opener"), uri], cwd=TREE, env=os.environ | self.addresses, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=DEADLINE,
        ).returncode  # fmt: skip

    def picture(self, summary: str) -> Picture:
        """The screen when the notification of that summary is on it."""
        self.dunst.wait_for(summary)
        return self.screen.wait_until(lambda picture: picture.colours > 10)


def program(module: str) -> list[str]:
    """A program of the desktop's, from the tree."""
    return [sys.executable, "-c", f"import sys; from nbdd.desktop.{module} import main; sys.exit(main())"]
