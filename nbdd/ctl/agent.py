# SPDX-License-Identifier: MIT
"""Polkit's agent for a terminal, pkttyagent(1): it asks for a password if no desktop does, as for systemctl."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Let polkit ask on this terminal for a password for this process; a desktop's agent goes first.

    Without any agent polkit asks nothing, and nbdd's error says so.
    """
    reader, writer = os.pipe()
    agent = None
    try:
        with contextlib.suppress(OSError):
            agent = subprocess.Popen(
                ["pkttyagent", "--notify-fd", str(writer), "--fallback"],  # for its parent, which is this process
                pass_fds=[writer], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        os.close(writer)
        os.read(reader, 1)  # It ends when the agent is known to polkit, or when there is none.
        yield
    finally:
        os.close(reader)
        if agent is not None:
            agent.terminate()  # It gives the terminal its echo back.
            agent.wait()
