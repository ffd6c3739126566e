# SPDX-License-Identifier: MIT
"""`lab`: the shared guest, clean before and checked after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guest import Guest
from tests.system.lab import Lab


@pytest.fixture
def lab(guest: Guest) -> Iterator[Lab]:
    """A guest with a running nbdd that has nothing to do; what the test leaves is undone, and checked for harm."""
    lab = Lab(guest)
    lab.mark()
    yield lab
    lab.cleanup()
