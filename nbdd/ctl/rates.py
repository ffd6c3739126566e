# SPDX-License-Identifier: MIT
"""From two samples of a device's counters to rates per second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters of GetStatistics at one moment."""

    at: float
    """Seconds of a clock that never goes back."""
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two samples; a rate is for one second."""

    read_bytes: float
    written_bytes: float
    reads: float
    writes: float
    read_latency: float | None
    """Seconds that a read took on average; None if there was none, or nbdd does not report times."""
    write_latency: float | None
    in_flight: int
    """Requests under way at the later sample."""
    busy: float
    """The part of the time, from 0 to 1, in which there were requests under way."""


def between(before: Sample | None, now: Sample) -> Rates | None:
    """The rates; None without an earlier sample, or after a new attach, when the counters begin at 0."""
    if before is None or now.at <= before.at:
        return None
    done = {key: count - before.counts.get(key, 0) for key, count in now.counts.items()}
    if any(done.get(key, 0) < 0 for key in ("reads", "writes", "read-bytes", "written-bytes", "io-time")):
        return None
    seconds = now.at - before.at
    return Rates(
        read_bytes=done.get("read-bytes", 0) / seconds,
        written_bytes=done.get("written-bytes", 0) / seconds,
        reads=done.get("reads", 0) / seconds,
        writes=done.get("writes", 0) / seconds,
        read_latency=_latency(done.get("read-time"), done.get("reads", 0)),
        write_latency=_latency(done.get("write-time"), done.get("writes", 0)),
        in_flight=now.counts.get("in-flight", 0),
        busy=min(max(done.get("io-time", 0) / 1000 / seconds, 0.0), 1.0),
    )


def _latency(milliseconds: int | None, requests: int) -> float | None:
    return milliseconds / 1000 / requests if milliseconds is not None and requests > 0 else None
