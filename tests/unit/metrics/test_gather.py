# SPDX-License-Identifier: MIT
"""What is asked of nbdd for a scrape, which must neither start it nor wait for ever."""

from __future__ import annotations

import asyncio
import gc
import socket
from pathlib import Path

import pytest

from nbdd.metrics.gather import gather
from tests.fakes.asserts import run
from tests.fakes.manager import ABSENT, DEADLINE, PRESENT, FakeManager
from tests.fakes.metrics import LABELS, samples

NO_AUTOSTART = 2


def test_metrics_have_every_property_of_a_device(fake: FakeManager) -> None:
    fake.change("backup", Connections=4, LiveConnections=3, Reconnects=7, State="degraded", Size=(1 << 63) + 1)
    found = samples(run(gather()))
    assert found["nbdd_up"] == [({}, 1)]
    assert found["nbdd_build_info"] == [({"version": "0.1.0"}, 1)]
    wanted = {
        "configured_connections": 4, "live_connections": 3, "reconnects_total": 7, "size_bytes": float(1 << 63),
        "dead_timeout_seconds": 300, "attached_timestamp_seconds": 1_700_000_000, "without_link_seconds": 0,
        "read_bytes_total": 512, "written_bytes_total": 1024, "discarded_bytes_total": 4096, "requests_in_flight": 5,
        "io_time_seconds_total": 1.5, "statistics_up": 1,
    }  # fmt: skip
    assert {name: found[f"nbdd_device_{name}"] for name in wanted} == {n: [(LABELS, v)] for n, v in wanted.items()}
    requests = {labels["kind"]: value for labels, value in found["nbdd_device_requests_total"]}
    assert requests == {"read": 1, "write": 2, "discard": 3, "flush": 4}
    assert found["nbdd_device_info"] == [
        (
            LABELS | {"uri": "nbd://storage.example/backup", "node": "/dev/nbd0", "read_only": "false",
                      "encryption": "none", "configured": "true"},
            1,
        )
    ]  # fmt: skip
    states = {labels["nbdd_device_state"]: value for labels, value in found["nbdd_device_state"]}
    assert [state for state, value in states.items() if value] == ["degraded"]
    assert len(states) == 7


def test_gather_never_starts_nbdd(fake: FakeManager) -> None:
    run(gather())
    assert {call.member for call in fake.calls} == {"Get", "GetManagedObjects", "GetStatistics"}
    assert all(call.flags.value & NO_AUTOSTART for call in fake.calls)


@pytest.mark.usefixtures("no_service")
def test_gather_without_nbdd_gives_down_and_nothing_else() -> None:
    snapshot = run(gather())
    assert snapshot.problem == "nbdd is not running. See `systemctl status nbdd`."
    assert samples(snapshot) == {"nbdd_up": [({}, 0)]}


def test_gather_without_a_bus_gives_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    assert not run(gather()).up


@pytest.mark.parametrize("member", ["Get", "GetManagedObjects"])
def test_gather_from_nbdd_that_hangs_gives_down(fake: FakeManager, member: str) -> None:
    fake.held.add(member)
    assert run(gather(list_seconds=0.2)).problem == "nbdd did not answer within 0.2 seconds."


def test_gather_gives_up_a_bus_that_hangs_and_closes_its_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as bus:
        bus.bind(str(tmp_path / "bus"))
        bus.listen()
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
        assert not run(gather(list_seconds=0.2)).up
        end, _ = bus.accept()
        with end:
            end.settimeout(DEADLINE)
            while end.recv(1000):  # the end of it, and a ResourceWarning is an error
                pass
    gc.collect()


def test_gather_lacks_only_the_counters_of_a_device_that_hangs(fake: FakeManager) -> None:
    # More hang than dbus-daemon lets one connection wait for.
    hung = {f"hung{number}" for number in range(150)}
    for name in hung | {"well", "zzz"}:
        fake.devices[name] = PRESENT | {"Name": name}
    fake.held |= {f"/org/nbdd1/device/{name}" for name in hung}
    found = samples(run(gather(counts_seconds=1)))
    told = {labels["device"]: value for labels, value in found["nbdd_device_statistics_up"]}
    assert {name for name, value in told.items() if not value} == hung
    assert {labels["device"] for labels, _ in found["nbdd_device_read_bytes_total"]} == {"backup", "well", "zzz"}
    assert len(found["nbdd_device_size_bytes"]) == len(fake.devices)


def test_gather_lacks_the_counters_of_a_device_detached_meanwhile(fake: FakeManager) -> None:
    fake.errors["GetStatistics"] = ("org.nbdd1.Error.NotAttached", "gone")
    found = samples(run(gather()))
    assert found["nbdd_device_statistics_up"] == [(LABELS, 0)]
    assert "nbdd_device_read_bytes_total" not in found


def test_gather_does_not_ask_a_detached_device_for_counters(fake: FakeManager) -> None:
    fake.devices["backup"] = ABSENT | {"Name": "backup"}
    found = samples(run(gather()))
    assert all(call.member != "GetStatistics" for call in fake.calls)
    absent = ("statistics_up", "without_link_seconds", "attached_timestamp_seconds", "io_fails_timestamp_seconds")
    assert not {f"nbdd_device_{name}" for name in absent} & found.keys()
    assert found["nbdd_device_size_bytes"] == [(LABELS, 0)]


async def test_gather_asks_two_hundred_devices_at_the_same_time(fake: FakeManager) -> None:
    for number in range(200):
        fake.devices[f"disk{number}"] = PRESENT | {"Name": f"disk{number}"}
    # All are asked before any answers: one after the other, none would ever.
    fake.held.add("GetStatistics")

    def answer_all() -> None:
        with fake.called:
            assert fake.called.wait_for(
                lambda: sum(call.member == "GetStatistics" for call in fake.calls) == 201, DEADLINE
            )
        fake.held.clear()
        for call in fake.calls:
            if call.member == "GetStatistics":
                fake._loop.call_soon_threadsafe(fake.bus.send, fake._answer(call))

    found, _ = await asyncio.gather(gather(DEADLINE, DEADLINE), asyncio.to_thread(answer_all))
    assert len(found.counts) == 201
