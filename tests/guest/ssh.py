# SPDX-License-Identifier: MIT
"""The ssh command line that reaches a guest, whatever the machine's own configuration of ssh says."""

from __future__ import annotations

from pathlib import Path

from tests.guest.image import Image


def argv(image: Image, port: int, control: Path) -> list[str]:
    """Return the command line for root; one connection, whose socket is `control`, carries all commands."""
    options = {
        "UserKnownHostsFile": str(image.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": "guest",
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "LogLevel": "ERROR",
        "ConnectTimeout": "30",
        "ControlPath": str(control),
    }
    words = ["ssh", "-F", "none", "-i", str(image.key), "-p", str(port)]
    for name, value in options.items():
        words += ["-o", f"{name}={value}"]
    return [*words, "root@127.0.0.1"]
