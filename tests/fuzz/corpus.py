# SPDX-License-Identifier: MIT
"""The inputs that are kept: one a line in corpus.txt, in base64, as the fuzzer prints them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

FILE = Path(__file__).parent / "corpus.txt"


def load() -> list[bytes]:
    """All inputs that are kept."""
    return [base64.b64decode(line, validate=True) for line in FILE.read_text("ascii").split()]


def save(inputs: Iterable[bytes]) -> None:
    """Keep these, in an order that depends on nothing else."""
    lines = sorted(base64.b64encode(octets).decode() for octets in set(inputs))
    FILE.write_text("".join(f"{line}\n" for line in lines), "ascii")


def unpack(directory: Path) -> None:
    """Put each into a file of its own, as libFuzzer wants them."""
    for octets in load():
        (directory / hashlib.sha1(octets, usedforsecurity=False).hexdigest()).write_bytes(octets)


def pack(directory: Path) -> None:
    """The inverse of `unpack`."""
    save(path.read_bytes() for path in directory.iterdir())
