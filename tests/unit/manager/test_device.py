# SPDX-License-Identifier: MIT
"""What is asked of an attached device, what its worker reports, and definitions that change."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nbdd.manager.attachment
import nbdd.manager.device
import nbdd.manager.lifecycle
from nbdd.errors import (
    AlreadyAttached,
    Busy,
    ConnectFailed,
    ExportChanged,
    NegotiationFailed,
    NotAttached,
    TimedOut,
    WorkerFailed,
)
from nbdd.manager.status import State
from nbdd.uri import URI
from tests.fakes.asserts import refused
from tests.fakes.worker import CRASH, MakeBench, definition, record_of, task


async def test_set_timeout_is_live_recorded_and_ends_with_the_attachment(bench: MakeBench) -> None:
    async with bench() as it:
        assert isinstance(await refused(it.device.set_timeout(3)), NotAttached)
        await it.device.attach()
        await it.device.set_timeout(30)
        assert it.device.status.timeout == 30
        assert it.records.load()[0].definition.timeout == 30
        it.spawner.worker.end(CRASH)
        await it.until(lambda status: status.worker_pid == 1001)
        await it.managed()
        assert it.spawner.orders[1][1]["seconds"] == 30
        assert it.device.status.timeout == 30
        await it.device.detach()
        assert it.device.status.timeout == 0


async def test_reconnect_and_resize_go_to_the_worker_and_new_size_is_recorded(
    bench: MakeBench,
) -> None:
    async with bench() as it:
        for work in (it.device.reconnect(), it.device.resize()):
            assert isinstance(await refused(work), NotAttached)
        await it.device.attach()
        await it.device.reconnect()
        assert await it.device.resize() == 3 << 20
        assert it.device.status.size == 3 << 20
        binding = it.records.load()[0].binding
        assert binding is not None
        assert binding.size == binding.export.size == 3 << 20
        assert it.spawner.names() == ["attach", "reconnect", "resize"]


@pytest.mark.parametrize("moment", ["die", "die late"])
async def test_set_timeout_is_repeated_if_worker_dies(bench: MakeBench, moment: str) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["set-timeout"] = [moment]
        await it.device.set_timeout(8)
        assert it.device.status.timeout == 8
        assert it.spawner.names() == ["attach", "set-timeout", "adopt", "set-timeout"]


async def test_set_timeout_waits_for_next_worker(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.worker.end(CRASH)
        await it.device.set_timeout(8)
        assert it.device.status.timeout == 8


async def test_set_timeout_under_which_every_worker_dies_fails_and_device_stays(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["set-timeout"] = ["die"] * 3
        assert isinstance(await refused(it.device.set_timeout(8)), WorkerFailed)
        assert it.device.status.timeout == 0
        await it.managed()


async def test_statistics_without_worker_fail_after_deadline(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.device, "READY_DEADLINE", 0.01)
    async with bench() as it:
        await it.device.attach()
        it.spawner.before["adopt"] = asyncio.Event()
        it.spawner.worker.end(CRASH)
        assert "no worker at the moment" in str(await refused(it.device.statistics()))


async def test_connections_that_die_and_come_back_change_the_state(bench: MakeBench) -> None:
    async with bench(connections=2) as it:
        it.spawner.connections = 2
        await it.device.attach()
        state = {"reconnects": 0, "uri": "nbd://storage.example/disk", "lost": 0, "failing": False}
        wire = ConnectFailed("A connection ended.").to_wire()
        it.spawner.worker.say("connections", [os.dup(0)], live=1, **state, **wire)
        assert it.now() is State.DEGRADED
        it.spawner.worker.say("connections", [], live=0, **state, **wire)
        assert it.now() is State.RECONNECTING
        assert it.device.status.last_error == (ConnectFailed.dbus_name, "A connection ended.")
        assert it.kept["disk"] == []
        record = it.records.load()[0]
        assert record.binding is not None
        assert record.binding.live == 0, "the next worker must know that all connections are dead"
        state |= {"reconnects": 2, "uri": "nbd://second.example/disk"}
        it.spawner.worker.say("connections", [os.dup(0), os.dup(0)], live=2, **state)
        assert it.now() is State.ATTACHED
        assert it.device.status.reconnects == 2
        assert it.device.status.uri == "nbd://second.example/disk"
        assert len(it.kept["disk"]) == 2
        assert it.device.status.last_error[1] == "A connection ended."
        # Links that are exchanged because somebody asked for it end without an error, and not for the last one.
        it.spawner.worker.say("connections", [], live=0, **state)
        assert (it.now(), it.device.status.last_error) == (State.RECONNECTING, ("", ""))


async def test_fails_at_and_state_follow_a_dead_connection(bench: MakeBench) -> None:
    async with bench(dead_timeout=100) as it:
        await it.device.attach()
        state = {"live": 0, "reconnects": 0, "uri": "nbd://storage.example/disk", "lost": time.monotonic() - 40}
        it.spawner.worker.say("connections", [], **state, failing=False, **ConnectFailed("It ended.").to_wire())
        assert it.now() is State.RECONNECTING
        fails_at = it.device.status.fails_at
        assert abs(fails_at / 1e6 - (time.time() + 60)) < 5
        other = ExportChanged("It is another.").to_wire()
        it.spawner.worker.say("connections", [], **state, failing=False, **other)
        assert it.now() is State.FAILED
        assert it.device.status.last_error == (NegotiationFailed.dbus_name, "It is another.")
        assert it.device.status.fails_at == fails_at, "the same moment, and no signal to everybody"
        it.spawner.worker.say("connections", [], **state, failing=False, **ConnectFailed("It is away.").to_wire())
        assert it.now() is State.RECONNECTING
        it.spawner.worker.say("connections", [], **state, failing=True, **TimedOut("Too long.").to_wire())
        assert it.now() is State.FAILED
        assert it.device.status.bound
        with pytest.raises(AlreadyAttached):
            await it.device.attach()
        await it.device.set_timeout(7)
        record = it.records.load()[0]
        assert record.binding is not None
        assert record.binding.lost == state["lost"], "the next worker must know since when I/O waits"
        it.spawner.worker.say("connections", [os.dup(0)], live=1, reconnects=1, uri="nbd://x/y", lost=0, failing=False)
        assert (it.now(), it.device.status.fails_at) == (State.ATTACHED, 0)
        it.spawner.worker.say("connections", [], **state, failing=True, **TimedOut("Too long.").to_wire())
        await it.device.detach()
        assert (it.now(), it.device.status.fails_at) == (State.DETACHED, 0)


async def test_shorten_dead_timeout_changes_status_and_record(bench: MakeBench) -> None:
    async with bench(dead_timeout=300) as it:
        await it.device.shorten_dead_timeout(30)
        assert it.spawner.names() == [], "nothing is attached"
        await it.device.attach()
        await it.device.shorten_dead_timeout(30)
        assert (it.device.status.dead_timeout, it.device.status.fails_at) == (30, 0)
        assert it.records.load()[0].definition.dead_timeout == 30, "the next worker is in the same hurry"
        await it.device.shorten_dead_timeout(40)
        assert it.spawner.names() == ["attach", "shorten-dead-timeout"], "it never waits longer for that"
        await it.device.detach()
        assert it.device.status.dead_timeout == 300

        await it.device.attach()
        state = {"live": 0, "reconnects": 0, "uri": "nbd://storage.example/disk", "lost": time.monotonic() - 100}
        it.spawner.worker.say("connections", [], **state, failing=False, **ConnectFailed("It ended.").to_wire())
        it.spawner.waited = 100
        await it.device.shorten_dead_timeout(30)
        assert it.device.status.dead_timeout == 130
        assert abs(it.device.status.fails_at / 1e6 - (time.time() + 30)) < 5


async def test_shorten_dead_timeout_failed_is_logged(bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["shorten-dead-timeout"] = ["die"] * 3
        await it.device.shorten_dead_timeout(30)
        assert it.device.status.dead_timeout == 300
    assert "disk: the dead timeout can't be shortened: " in caplog.text


async def test_events_after_detach_change_nothing(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        worker = it.spawner.worker
        await it.device.detach()
        worker.say("connections", [os.dup(0)], live=1, reconnects=5, uri="nbd://x/y", lost=0, failing=False)
        worker.say("warning", [os.dup(0)], message="late")
        assert it.device.status.reconnects == 0
        assert it.kept["disk"] == []


async def test_record_that_can_not_be_updated_leaves_device_attached(bench: MakeBench, tmp_path: Path) -> None:
    async with bench() as it:
        it.spawner.after["attach"] = asyncio.Event()
        attach = task(it.device.attach())
        await it.spawner.acted["attach"].wait()
        (tmp_path / "run").rename(tmp_path / "away")
        (tmp_path / "run").write_text("in the way")
        it.spawner.after["attach"].set()
        await attach
        assert it.now() is State.ATTACHED
        await it.device.set_timeout(4)
        it.spawner.worker.say(
            "connections", [], live=0, reconnects=0, uri="nbd://storage.example/disk", lost=0, failing=False
        )
        it.device.disown()
        assert it.now() is State.RECONNECTING


async def test_redefine_holds_at_once_if_idle_and_after_detach_if_attached(bench: MakeBench) -> None:
    async with bench() as it:
        it.device.redefine(definition(timeout=1))
        assert it.device.status.timeout == 1
        await it.device.attach()
        it.device.redefine(definition(timeout=2))
        assert it.device.status.timeout == 1
        await it.device.detach()
        assert it.device.status.timeout == 2


async def test_record_says_whether_device_is_configured(bench: MakeBench) -> None:
    async with bench(configured=False) as it:
        await it.device.attach()
        assert not it.records.load()[0].configured
        it.device.redefine(definition())
        assert it.records.load()[0].configured
        it.device.disown()
        assert not it.records.load()[0].configured


async def test_statistics_for_many_callers_are_one_order(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        for rounds in (1, 2):
            asked = [asyncio.ensure_future(it.device.statistics()) for _ in range(100)]
            asked.pop().cancel()
            assert await asyncio.gather(*asked) == [{"reads": 7}] * 99
            assert it.spawner.names().count("statistics") == rounds


async def test_redefine_makes_device_attached_by_hand_configured(bench: MakeBench) -> None:
    async with bench(configured=False) as it:
        await it.device.attach(by=1000)
        assert it.device.status.attached_by == it.records.load()[0].attached_by == 1000
        it.device.redefine(it.device.definition)
        assert it.device.status.attached_by == it.records.load()[0].attached_by == 0
        with pytest.raises(AlreadyAttached):
            await it.device.attach()


async def test_attach_of_device_from_another_server_than_defined_is_refused(
    bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(configured=False) as it:
        await it.device.attach()
        it.device.redefine(replace(it.device.definition, uri=(URI.parse("nbd://other.example/disk"),)))
        with pytest.raises(Busy, match=r"from nbd://storage\.example/disk, which its definition does not name"):
            await it.device.attach()
        assert it.now() is State.ATTACHED
        await it.device.detach()
        await it.device.attach()
    assert "still attached from nbd://storage.example/disk, which its new definition does not name" in caplog.text


@pytest.mark.parametrize("ask", [lambda device: device.set_timeout(5), lambda device: device.statistics()])
async def test_orders_during_adoption_wait_until_it_ends(
    bench: MakeBench, ask: Callable[[Any], Coroutine[Any, Any, Any]]
) -> None:
    async with bench() as it:
        it.spawner.before["adopt"] = asyncio.Event()
        it.device.adopt(record_of(it), [])
        await it.spawner.arrived["adopt"].wait()
        asked = asyncio.ensure_future(ask(it.device))
        await asyncio.sleep(0)
        assert not asked.done()
        it.spawner.before["adopt"].set()
        await asked
        assert it.now() is State.ATTACHED


async def test_journal_has_a_line_for_each_event(bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nbdd.manager.device")
    async with bench() as it:
        it.device.adopt(record_of(it), [])
        await it.reach(State.ATTACHED)
        await it.device.set_timeout(5)
        await it.device.set_timeout(0)
        state = {"reconnects": 0, "uri": "nbd://x/y", "lost": 1, "failing": False}
        it.spawner.worker.say("connections", [], live=0, **state, **ConnectFailed("It ended.").to_wire())
        it.spawner.worker.say("connections", [], live=0, **state, **ConnectFailed("It is away.").to_wire())
        it.spawner.worker.say("connections", [], live=0, **state, **ConnectFailed("It is away.").to_wire())
        it.spawner.worker.say("warning", message="reads and writes that wait fail in 60 s")
        it.spawner.worker.say("connections", [], live=1, reconnects=1, uri="nbd://x/y", lost=0, failing=False)
        it.spawner.outcomes["detach"] = [Busy("in use")]
        with pytest.raises(Busy):
            await it.device.detach()
    told = [record.getMessage() for record in caplog.records if "->" not in record.getMessage()]
    assert told == [
        "disk: adopting /dev/nbd0, left by the previous instance",
        "disk: the request timeout is now 5 s",
        "disk: the request timeout is now off",
        "disk: It ended.",
        "disk: It is away.",
        "disk: reads and writes that wait fail in 60 s",
        "disk: connected to nbd://x/y again, 1 of 1 connections",
        "disk: not detached: in use",
    ]
