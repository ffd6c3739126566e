# SPDX-License-Identifier: MIT
"""nbdctl as a person has it: on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Self

from tests.fakes.manager import DEADLINE

NBDCTL = [sys.executable, "-m", "nbdd.ctl"]

Run = Callable[..., tuple[int, str, str]]
"""Arguments of nbdctl to its status, stdout and stderr; see the fixture `run`."""


class Terminal:
    """nbdctl on a terminal of 60 columns."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.fd, end = pty.openpty()
        termios.tcsetwinsize(end, (24, 60))
        self.process = subprocess.Popen(
            [*NBDCTL, *arguments], stdin=end, stdout=end, stderr=end, env=os.environ | {"TERM": "xterm"} | environment
        )
        os.close(end)
        self.text = ""

    def wait_for(self, wanted: str) -> None:
        end = time.monotonic() + DEADLINE
        while wanted not in self.text:
            assert select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0], self.text
            assert self.read(), self.text

    def read(self) -> bool:
        try:
            piece = os.read(self.fd, 4096)
        except OSError:  # EIO: nobody has the other end any more
            return False
        self.text += piece.decode()
        return bool(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def finish(self) -> tuple[int, str]:
        while self.read():
            pass
        return self.process.wait(DEADLINE), self.text.replace("\r\n", "\n")


class Watching:
    """`nbdctl monitor`, when it has begun to watch."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.terminal = Terminal("monitor", *arguments, **environment)

    def __enter__(self) -> Terminal:
        self.terminal.wait_for("Ctrl-C ends it.\r\n")
        return self.terminal

    def __exit__(self, *_: object) -> None:
        self.terminal.__exit__()
