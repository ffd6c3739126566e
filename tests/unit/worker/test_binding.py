# SPDX-License-Identifier: MIT
"""The binding as JSON: its keys are those of every nbdd whose records may still be in /run."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from nbdd.protocol import Export, Flags
from nbdd.worker.binding import Binding, ConnectionState

FULL = Binding(
    index=3,
    uri="nbd://h/x",
    export=Export("x", 1 << 20, Flags.NBD_FLAG_HAS_FLAGS, 1, 4096, 1 << 25),
    connections=2,
    live=1,
    reconnects=4,
    lost=12.5,
    node="/dev/nbd3",
    size=1 << 20,
    block_size=512,
    read_only=True,
    diskseq=7,
    pid=11,
    baseline={"read-requests": 5},
)
KEYS = {
    "index", "uri", "export", "connections", "live", "reconnects", "lost", "node", "size", "block-size", "read-only",
    "diskseq", "pid", "baseline",
}  # fmt: skip


def test_binding_goes_through_json() -> None:
    wire = json.loads(json.dumps(FULL.to_wire()))
    assert Binding.from_wire(wire) == FULL
    assert wire.keys() == KEYS, "a record of another version has these"
    assert len(KEYS) == len(fields(Binding))


def test_binding_of_another_version_is_loaded() -> None:
    wire = FULL.to_wire()
    for key in ("lost", "size", "block-size", "read-only", "diskseq", "pid", "baseline"):
        del wire[key]
    loaded = Binding.from_wire({**wire, "from-the-future": 1})
    assert (loaded.lost, loaded.size, loaded.diskseq, loaded.baseline) == (0, 0, 0, None)
    assert "baseline" not in loaded.to_wire()


@pytest.mark.parametrize(
    "change", [{"index": "3"}, {"export": None}, {"uri": 5}, {"live": None}, {"connections": 1.5}, {"export": {}}]
)
def test_binding_of_wrong_types_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, LookupError)):
        Binding.from_wire({**FULL.to_wire(), **change})


def test_binding_takes_reported_state() -> None:
    state = ConnectionState(live=0, reconnects=9, uri="nbd://g/x", size=5, export=FULL.export, lost=2.0, failing=True)
    report = ConnectionState.from_wire(json.loads(json.dumps(state.to_wire())))
    assert report == state
    assert FULL.with_state(report).connection_state(failing=True) == state
