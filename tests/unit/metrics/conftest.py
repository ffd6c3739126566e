# SPDX-License-Identifier: MIT
"""`fake`: a fake nbdd whose device has counters."""

from __future__ import annotations

import pytest

from tests.fakes.manager import FakeManager
from tests.fakes.metrics import COUNTS


@pytest.fixture
def fake(fake: FakeManager) -> FakeManager:
    fake.replies["GetStatistics"] = ("a{st}", [COUNTS])
    return fake
