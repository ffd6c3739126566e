# SPDX-License-Identifier: MIT
"""Metrics made of a snapshot, as a reader of OpenMetrics sees them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as read_plain

from nbdd.metrics.families import text
from nbdd.metrics.gather import Snapshot
from tests.fakes.metrics import COUNTS, LABELS, device, families, samples


def test_metrics_of_a_lost_connection_last_until_it_is_back() -> None:
    lost = device(State="reconnecting", LiveConnections=0, FailsAt=1_000_000_000, DeadTimeout=300)
    found = samples(Snapshot(at=760.5, devices=(lost,)))
    assert found["nbdd_device_without_link_seconds"] == [(LABELS, 60.5)]
    assert found["nbdd_device_io_fails_timestamp_seconds"] == [(LABELS, 1000)]
    found = samples(Snapshot(at=2000, devices=(replace(lost, fails_at=0),)))
    assert found["nbdd_device_without_link_seconds"] == [(LABELS, 0)]
    assert "nbdd_device_io_fails_timestamp_seconds" not in found


def test_metrics_with_a_clock_that_was_put_back_have_no_negative_time() -> None:
    lost = device(FailsAt=1_000_000_000, DeadTimeout=300)
    assert samples(Snapshot(at=1, devices=(lost,)))["nbdd_device_without_link_seconds"] == [(LABELS, 0)]


def test_metrics_have_the_state_of_a_newer_nbdd_too() -> None:
    found = samples(Snapshot(at=1, devices=(device(State="dreaming"), device(Name="other"))))
    dreaming = [labels for labels, value in found["nbdd_device_state"] if labels["device"] == "backup" and value]
    assert [labels["nbdd_device_state"] for labels in dreaming] == ["dreaming"]


def test_metrics_have_the_types_and_units_of_openmetrics() -> None:
    types = {name: family.type for name, family in families(Snapshot(at=1, devices=(device(),))).items()}
    assert types["nbdd_device_state"] == "stateset"
    assert types["nbdd_device"] == types["nbdd_build"] == "info"
    assert types["nbdd_device_read_bytes"] == types["nbdd_device_requests"] == "counter"
    assert types["nbdd_device_size_bytes"] == types["nbdd_up"] == "gauge"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_metrics_with_any_text_of_a_server_keep_the_format(uri: str, name: str) -> None:
    snapshot = Snapshot(at=1, devices=(device(URI=uri, Name=name),), counts={name: COUNTS})
    (labels, _) = samples(snapshot)["nbdd_device_info"][0]
    assert (labels["uri"], labels["device"]) == (uri, name)
    # The older text cuts at every character that Python takes for the end of a line; Prometheus does so at \n alone.
    if not set(uri + name) & set("\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
        assert {family.name for family in read_plain(text(snapshot).decode())} >= {"nbdd_device_info", "nbdd_up"}
