# SPDX-License-Identifier: MIT
"""A system bus of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.bus import BusDaemon, private_bus


@pytest.fixture
def bus() -> Iterator[BusDaemon]:
    with private_bus() as daemon:
        yield daemon


@pytest.fixture
def address(bus: BusDaemon, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    return bus.address
