# SPDX-License-Identifier: MIT
"""A device on the bench: with a fake worker, and without pauses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import nbdd.manager.attachment
import nbdd.manager.lifecycle
from tests.fakes.worker import Bench, MakeBench


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.lifecycle, "backoff", lambda *_: itertools.repeat(0.0))
    monkeypatch.setattr(nbdd.manager.attachment, "WAIT_INTERVAL", 0.01)


@pytest.fixture
def bench(tmp_path: Path) -> MakeBench:
    """Makes a Bench; to be called in a loop."""

    def make(**fields: Any) -> Bench:
        return Bench(tmp_path, **fields)

    return make
