# SPDX-License-Identifier: MIT
"""Counters and devices for the tests of nbdd-metrics, and its metrics as a reader sees them."""

from __future__ import annotations

from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from nbdd.bus.caller.device import DeviceView
from nbdd.metrics.families import open_text
from nbdd.metrics.gather import Snapshot
from tests.fakes.manager import PRESENT

COUNTS = {
    "reads": 1, "writes": 2, "discards": 3, "flushes": 4, "read-bytes": 512, "written-bytes": 1024,
    "discarded-bytes": 4096, "in-flight": 5, "io-time": 1500,
}  # fmt: skip
LABELS = {"device": "backup"}


def families(snapshot: Snapshot) -> dict[str, Metric]:
    """What a reader of OpenMetrics, which is strict, makes of it."""
    return {family.name: family for family in read_openmetrics(open_text(snapshot).decode())}  # type: ignore[no-untyped-call]


def samples(snapshot: Snapshot) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in families(snapshot).values():
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def device(**told: Any) -> DeviceView:
    """A device that is attached, but for what is told."""
    return DeviceView.of(PRESENT | {"Name": "backup"} | told)
