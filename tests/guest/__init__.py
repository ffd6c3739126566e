# SPDX-License-Identifier: MIT
"""The proving ground: builds, boots and drives QEMU guests of Debian 12 and 13, with the standard library alone."""

from __future__ import annotations

from tests.guest.errors import GuestError
from tests.guest.guest import HOST, Guest, Result
from tests.guest.image import ensure
from tests.guest.recipe import RELEASES

__all__ = ["HOST", "RELEASES", "Guest", "GuestError", "Result", "ensure"]
