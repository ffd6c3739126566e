# SPDX-License-Identifier: MIT
"""The names of NBD nodes: nbdX, its partitions nbdXpY, and where /dev has them. Imports next to nothing."""

from __future__ import annotations

import re

DEV = "/dev"
_DISK = re.compile(rf"{DEV}/nbd(0|[1-9][0-9]{{0,6}})")
_ANY = re.compile(rf"(?:{DEV}/)?nbd(0|[1-9][0-9]{{0,4}})(?:p[0-9]+)?")


def node_path(index: int, *, dev: str = DEV) -> str:
    """/dev/nbdX."""
    return f"{dev}/nbd{index}"


def node_index(path: str) -> int | None:
    """X of the disk /dev/nbdX, or None if the path is anything else; follows no link."""
    found = _DISK.fullmatch(path)
    return int(found[1]) if found else None


def named_index(text: str) -> int | None:
    """X of "nbdX", "nbdXpY", "/dev/nbdX" or "/dev/nbdXpY", or None if the text is anything else."""
    found = _ANY.fullmatch(text)
    return int(found[1]) if found else None
