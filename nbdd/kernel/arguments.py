# SPDX-License-Identifier: MIT
"""Checks of the numbers and identifiers that a caller wants to give to the kernel's NBD driver."""

from __future__ import annotations

import os
import re

from nbdd.errors import InvalidArgs
from nbdd.limits import BLK_MAX_BLOCK_SIZE, MAX_BACKEND, MAX_TIMEOUT, MIN_BLOCK_SIZE


def check_integer(what: str, number: int, least: int, most: int, unit: str) -> int:
    """Return the number; raise InvalidArgs if it is no whole number or not in the range."""
    given: object = number
    if not isinstance(given, int) or isinstance(given, bool):
        raise InvalidArgs(f"{what} is a whole number of {unit}, not {number!r}.")
    if not least <= number <= most:
        raise InvalidArgs(f"{what} of {number} {unit} can't be set; it goes from {least} to {most}.")
    return number


def check_seconds(what: str, seconds: float) -> float:
    """Return the number; raise InvalidArgs if it is not a time that one can wait."""
    given: object = seconds
    if not isinstance(given, (int, float)) or not 0 <= given <= MAX_TIMEOUT:
        raise InvalidArgs(f"{what} is a number of seconds from 0 to {MAX_TIMEOUT}, not {seconds!r}.")
    return seconds


def check_block_size(size: int) -> int:
    """Return the size in bytes; raise InvalidArgs unless it is a power of two that this kernel takes."""
    size = check_integer("A block size", size, MIN_BLOCK_SIZE, largest_block_size(), "bytes")
    if size & (size - 1):
        raise InvalidArgs(f"A block size of {size} bytes can't be set: it must be a power of two.")
    return size


def check_backend(backend: object) -> None:
    """Raise InvalidArgs for an identifier that the kernel can't keep and show.

    The kernel shows it in a page of sysfs. Linux 6.1 writes a longer one beyond the page's end, and one with control
    characters is not found again.
    """
    if not isinstance(backend, str) or not backend.isprintable() or not 0 < len(backend.encode()) <= MAX_BACKEND:
        shown = repr(backend)[:80]
        raise InvalidArgs(
            f"{shown} is no identifier: it is a text of 1 to {MAX_BACKEND} bytes without control characters. "
            "Leave it out, and one is made up."
        )


def largest_block_size() -> int:
    """Bytes: the page size, and 64 KiB from Linux 6.15 on (BLK_MAX_BLOCK_SIZE)."""
    major, minor = (int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    return max(os.sysconf("SC_PAGE_SIZE"), BLK_MAX_BLOCK_SIZE if (major, minor) >= (6, 15) else 0)
