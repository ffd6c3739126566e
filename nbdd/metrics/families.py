# SPDX-License-Identifier: MIT
"""A snapshot as metric families, and their text. Names and units follow Prometheus; docs/metrics.md explains each.

Families and texts are the Prometheus client library's own, which knows the rules of escaping and of suffixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.exposition import generate_latest as plain
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.registry import Collector

from nbdd.bus.caller.device import DeviceView
from nbdd.bus.wire.names import STATES
from nbdd.metrics.gather import Snapshot

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of the older text, which every Prometheus and the textfile collector read."""

OPENMETRICS = CONTENT_TYPE_LATEST
"""The content type of OpenMetrics."""

_COUNTERS = (
    ("read_bytes", "Bytes read since the device was attached.", "read-bytes", 1),
    ("written_bytes", "Bytes written since the device was attached.", "written-bytes", 1),
    ("discarded_bytes", "Bytes discarded since the device was attached.", "discarded-bytes", 1),
    ("io_time_seconds", "Time with requests under way since the device was attached.", "io-time", 1000),
)
"""Metric, help, key of GetStatistics, and how many of that make one of the unit."""

_KINDS = {"read": "reads", "write": "writes", "discard": "discards", "flush": "flushes"}
"""Label to key of GetStatistics."""


def _without_connection(device: DeviceView, at: float) -> float | None:
    if not device.node:
        return None
    # FailsAt is when the last connection died, plus the dead timeout.
    return max(at - (device.fails_at / 1e6 - device.dead_timeout), 0) if device.fails_at else 0


_GAUGES: tuple[tuple[str, str, Callable[[DeviceView, float], float | None]], ...] = (
    ("size_bytes", "Size of the device; 0 while it is not attached.", lambda device, _: device.size),
    ("configured_connections", "Connections there should be.", lambda device, _: device.connections),
    ("live_connections", "Connections there are.", lambda device, _: device.live_connections),
    (
        "dead_timeout_seconds",
        "How long I/O waits without any connection before it fails.",
        lambda device, _: device.dead_timeout,
    ),
    (
        "attached_timestamp_seconds",
        "When the device was attached; not there while it is not.",
        lambda device, _: device.attached_since / 1e6 if device.attached_since else None,
    ),
    (
        "without_link_seconds",
        "How long an attached device has had no connection; 0 while it has one.",
        _without_connection,
    ),
    (
        "io_fails_timestamp_seconds",
        "When I/O that waits for a connection fails, or began to; not there while there is a connection.",
        lambda device, _: device.fails_at / 1e6 if device.fails_at else None,
    ),
)
"""Metric, help, and its value at a time in seconds since 1970; None leaves it out."""


def text(snapshot: Snapshot) -> bytes:
    """The snapshot in Prometheus' older text format (`PLAIN`)."""
    return plain(_registry(snapshot))


def open_text(snapshot: Snapshot) -> bytes:
    """The snapshot in OpenMetrics (`OPENMETRICS`)."""
    written: bytes = openmetrics(_registry(snapshot))  # untyped
    return written


def _registry(snapshot: Snapshot) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(snapshot))
    return registry


class _Families(Collector):
    """One snapshot, as a registry collects it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        yield GaugeMetricFamily("nbdd_up", "Whether nbdd runs and answered.", int(snapshot.up))
        if not snapshot.up:
            return
        yield InfoMetricFamily("nbdd_build", "The running nbdd.", {"version": snapshot.version})
        yield from self._properties()
        yield from self._counters()

    def _properties(self) -> Iterator[Metric]:
        """What the properties of the devices say."""
        devices, at = self._snapshot.devices, self._snapshot.at
        info = InfoMetricFamily("nbdd_device", "What the device is.", labels=["device"])
        states = StateSetMetricFamily("nbdd_device_state", "The state of the device.", labels=["device"])
        reconnects = CounterMetricFamily(
            "nbdd_device_reconnects", "Dead connections replaced since the device was attached.", labels=["device"]
        )
        for device in devices:
            info.add_metric([device.name], _labels(device))
            # A newer nbdd may have a state that this program does not know.
            states.add_metric([device.name], {state: state == device.state for state in [*STATES, device.state]})
            reconnects.add_metric([device.name], device.reconnects)
        yield from (info, states, reconnects)
        for name, explained, value in _GAUGES:
            gauge = GaugeMetricFamily(f"nbdd_device_{name}", explained, labels=["device"])
            for device in devices:
                found = value(device, at)
                if found is not None:
                    gauge.add_metric([device.name], found)
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        """What the kernel counted."""
        counts = self._snapshot.counts
        answered = GaugeMetricFamily(
            "nbdd_device_statistics_up", "Whether an attached device returned its counters in time.", labels=["device"]
        )
        for device in self._snapshot.devices:
            if device.node:
                answered.add_metric([device.name], int(device.name in counts))
        yield answered
        for metric, explained, key, scale in _COUNTERS:
            counter = CounterMetricFamily(f"nbdd_device_{metric}", explained, labels=["device"])
            for name, found in counts.items():
                if key in found:
                    counter.add_metric([name], found[key] / scale)
            yield counter
        requests = CounterMetricFamily(
            "nbdd_device_requests", "Requests done since the device was attached.", labels=["device", "kind"]
        )
        waiting = GaugeMetricFamily("nbdd_device_requests_in_flight", "Requests under way.", labels=["device"])
        for name, found in counts.items():
            for kind, key in _KINDS.items():
                if key in found:
                    requests.add_metric([name, kind], found[key])
            if "in-flight" in found:
                waiting.add_metric([name], found["in-flight"])
        yield from (requests, waiting)


def _labels(device: DeviceView) -> dict[str, str]:
    return {
        "uri": device.uri,
        "node": device.node,
        "read_only": str(device.read_only).lower(),
        "encryption": device.encryption,
        "configured": str(device.configured).lower(),
    }
