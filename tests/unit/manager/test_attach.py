# SPDX-License-Identifier: MIT
"""Attach: its states, its options, boot devices that keep trying, and workers that die meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from pathlib import Path

import pytest

import nbdd.manager.attachment
import nbdd.manager.device
import nbdd.manager.lifecycle
from nbdd.config.definition import Attach, Desktop
from nbdd.errors import (
    AlreadyAttached,
    Busy,
    ConnectFailed,
    WorkerFailed,
)
from nbdd.manager.records import Record
from nbdd.manager.status import State
from tests.fakes.asserts import refused
from tests.fakes.worker import DOWN, MakeBench, definition, open_fds, task


async def test_attach_and_detach_pass_through_every_state(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        assert it.states == [State.DETACHED, State.CONNECTING, State.ATTACHED]
        status = it.device.status
        assert (status.node, status.size, status.block_size) == ("/dev/nbd0", 1 << 20, 512)
        assert status.live_connections == 1
        assert status.worker_pid == it.spawner.worker.pid
        assert status.attached_since > 0
        await it.device.detach()
        assert it.states[3:] == [State.DETACHING, State.DETACHED]
        idle = it.device.status
        assert (idle.node, idle.size, idle.worker_pid, idle.attached_since) == ("", 0, 0, 0)
        assert not it.spawner.bound
        assert it.device.idle


async def test_attached_by_is_shown_until_detach(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach(by=1000)
        await it.device.detach()
        assert [status.attached_by for status in it.told] == [1000, 1000, 1000, 1000, 0]
        await it.device.attach()
        assert it.device.status.attached_by == 0


async def test_attached_by_is_not_the_caller_that_joins(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        it.device.start()
        await it.device.attach(by=1000)
        assert it.device.status.attached_by == 0


async def test_status_has_desktop_fields_attached_or_not(bench: MakeBench) -> None:
    async with bench(desktop=Desktop("Photos", "folder-pictures")) as it:
        for step in (it.device.attach, it.device.detach):
            await step()
            told = it.device.status
            assert (told.desktop, told.display_name, told.icon_name) == (True, "Photos", "folder-pictures")
        it.device.redefine(definition(desktop=None))
        assert (it.device.status.desktop, it.device.status.display_name) == (False, "")


async def test_attach_failed_raises_and_sets_last_error(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [DOWN]
        assert await refused(it.device.attach()) is DOWN
        assert it.states == [State.DETACHED, State.CONNECTING, State.FAILED]
        assert it.device.status.last_error == ("org.nbdd1.Error.ConnectFailed", str(DOWN))
        assert it.device.status.worker_pid == 0
        assert it.records.load() == []
        assert it.device.idle


async def test_attach_of_failed_device_clears_last_error(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [DOWN]
        await refused(it.device.attach())
        await it.device.attach()
        assert it.now() is State.ATTACHED
        assert it.device.status.last_error == ("", "")


async def test_attach_by_two_callers_is_one_attempt(bench: MakeBench) -> None:
    async with bench() as it:
        await asyncio.gather(it.device.attach(), it.device.attach())
        assert it.spawner.names() == ["attach"]
        it.spawner.outcomes["attach"] = [DOWN]
        await it.device.detach()
        both = (task(it.device.attach()), task(it.device.attach()))
        assert [await refused(one) for one in both] == [DOWN, DOWN]


async def test_attach_of_attached_device_is_refused_with_its_node(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        error = await refused(it.device.attach())
        assert isinstance(error, AlreadyAttached)
        assert "/dev/nbd0" in str(error)
        assert it.now() is State.ATTACHED


async def test_attach_with_options_does_not_join_attempt_without_them(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.before["attach"] = asyncio.Event()
        plain = task(it.device.attach())
        await it.spawner.arrived["attach"].wait()
        assert isinstance(await refused(it.device.attach(definition(read_only=True))), Busy)
        same = task(it.device.attach(definition()))
        it.spawner.before["attach"].set()
        await asyncio.gather(plain, same)


async def test_attach_options_hold_until_detach(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach(definition(timeout=9))
        assert it.device.status.timeout == 9
        await it.device.detach()
        assert it.device.status.timeout == 0


async def test_attach_goes_on_if_its_caller_goes_away(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.before["attach"] = asyncio.Event()
        caller = task(it.device.attach())
        await it.spawner.arrived["attach"].wait()
        caller.cancel()
        await asyncio.wait({caller})
        it.spawner.before["attach"].set()
        await it.reach(State.ATTACHED)


async def test_attach_with_fewer_connections_allowed_is_not_degraded(bench: MakeBench) -> None:
    async with bench(connections=4) as it:
        it.spawner.connections = 1
        await it.device.attach()
        assert it.now() is State.ATTACHED
        assert it.device.status.connections == 1


@pytest.mark.parametrize("moment", ["die", "die late"])
async def test_attach_survives_death_of_two_workers(bench: MakeBench, moment: str) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [moment, moment]
        await it.device.attach()
        assert it.now() is State.ATTACHED
        assert [arguments["resume"] for _, arguments in it.spawner.orders] == [False, True, True]


async def test_attach_under_which_every_worker_dies_fails_and_leaves_nothing_bound(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = ["die late"] * 3
        error = await refused(it.device.attach())
        assert isinstance(error, WorkerFailed)
        assert "SIGKILL" in str(error)
        assert it.now() is State.FAILED
        assert not it.spawner.bound
        assert it.records.load() == []


async def test_attach_failed_keeps_record_of_device_that_can_not_be_freed(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = ["die late", DOWN]
        it.spawner.mounted.add("disk")
        assert await refused(it.device.attach()) is DOWN
        assert it.now() is State.FAILED
        assert it.spawner.bound
        assert it.records.load()
        assert not it.device.idle
        await it.device.attach()
        assert it.now() is State.ATTACHED


async def test_attach_without_worker_fails_and_can_be_repeated(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.spawn_outcomes = [WorkerFailed("No worker.")] * 9
        assert str(await refused(it.device.attach())) == "No worker."
        it.spawner.spawn_outcomes = []
        await it.device.attach()
        assert it.now() is State.ATTACHED


async def test_attach_with_bad_reply_fails_and_keeps_record(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as it:
        monkeypatch.setattr(it.spawner, "_attach", lambda *_: {"live": 0})
        error = await refused(it.device.attach())
        assert "Internal error" in str(error)
        assert it.now() is State.FAILED
        assert it.records.load(), "it may be bound"


async def test_boot_device_tries_until_the_server_answers(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [*[DOWN] * 20]
        it.device.start()
        await it.reach(State.ATTACHED)
        assert it.spawner.names() == ["attach"] * 21
        assert it.states == [State.DETACHED, State.CONNECTING, State.ATTACHED]
        assert len(it.spawner.living) == 1


async def test_boot_device_that_waits_shows_last_error(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.lifecycle, "backoff", lambda *_: itertools.repeat(3600.0))
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [DOWN]
        it.device.start()
        await it.until(lambda status: status.last_error[0] != "")
        assert it.now() is State.CONNECTING
        assert it.records.load() == []


async def test_boot_device_logs_one_line_for_each_new_error(bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [*[DOWN] * 50, *[ConnectFailed("No route.")] * 50]
        it.device.start()
        await it.reach(State.ATTACHED)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [f"disk: {DOWN} Trying again.", "disk: No route. Trying again."]


async def test_boot_device_that_waits_is_tried_at_once_by_attach(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdd.manager.lifecycle, "backoff", lambda *_: itertools.repeat(3600.0))
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [DOWN, DOWN]
        it.device.start()
        await it.until(lambda status: status.last_error[0] != "" and status.worker_pid == 0)
        told = await refused(it.device.attach())
        assert isinstance(told, ConnectFailed)
        assert str(told) == f"{DOWN} nbdd keeps trying, as the device has 'attach: boot'."
        assert it.now() is State.CONNECTING
        await it.device.attach()
        assert it.now() is State.ATTACHED


async def test_boot_device_that_waits_is_tried_at_once_with_new_definition(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdd.manager.lifecycle, "backoff", lambda *_: itertools.repeat(3600.0))
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [DOWN]
        it.device.start()
        await it.until(lambda status: status.last_error[0] != "")
        better = definition(uri="nbd://other.example/disk", attach=Attach.BOOT)
        it.device.redefine(better)
        await it.reach(State.ATTACHED)
        assert it.spawner.orders[-1][1]["definition"]["uri"] == ["nbd://other.example/disk"]
        assert it.records.load()[0].definition == better


async def test_boot_device_that_left_the_configuration_stops_trying(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.before["attach"] = asyncio.Event()
        it.spawner.outcomes["attach"] = [DOWN]
        it.device.start()
        await it.spawner.arrived["attach"].wait()
        it.device.disown()
        it.spawner.before["attach"].set()
        await it.reach(State.FAILED)


async def test_attach_of_name_bound_by_a_stranger_is_refused(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.foreign.add("disk")
        assert isinstance(await refused(it.device.attach()), Busy)
        assert it.records.load() == [], "with a record, a detach would take it for ours"
        assert "attach" not in it.spawner.names()


async def test_record_exists_from_before_binding_until_device_is_free(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.before["attach"] = asyncio.Event()
        attach = task(it.device.attach())
        await it.spawner.arrived["attach"].wait()
        (record,) = it.records.load()
        assert record == Record(definition(), configured=True)
        it.spawner.before["attach"].set()
        await attach
        (record,) = it.records.load()
        assert record.binding is not None
        assert record.binding.index == 0
        assert record.attached_since == it.device.status.attached_since
        it.spawner.before["detach"] = asyncio.Event()
        detach = task(it.device.detach())
        await it.spawner.arrived["detach"].wait()
        assert it.records.load() == [record]
        it.spawner.before["detach"].set()
        await detach
        assert it.records.load() == []


async def test_attach_without_writable_record_binds_nothing(bench: MakeBench, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    async with bench() as it:
        assert "record" in str(await refused(it.device.attach()))
        assert it.now() is State.FAILED
        assert it.spawner.orders == []
        (tmp_path / "run").unlink()
        await it.device.attach()


@pytest.mark.parametrize("late", [False, True], ids=["before the reply", "with the reply"])
async def test_connection_report_that_comes_with_the_reply_is_newer_than_the_reply(
    bench: MakeBench, *, late: bool
) -> None:
    async with bench(connections=2) as it:
        it.spawner.connections = 2
        it.spawner.after["attach"] = asyncio.Event()
        attaching = asyncio.create_task(it.device.attach())
        await it.spawner.acted["attach"].wait()
        if late:
            # The reply is read, and in the same moment what follows it on the channel.
            it.spawner.after["attach"].set()
            await asyncio.sleep(0)
        lost = {"live": 1, "reconnects": 0, "uri": "nbd://storage.example/disk", "lost": 0, "failing": False}
        it.spawner.worker.say("connections", [os.open("/dev/null", os.O_RDONLY)], **lost)
        it.spawner.after["attach"].set()
        await attaching
        assert (it.device.status.state, it.device.status.live_connections) == (State.DEGRADED, 1)


async def test_record_has_what_a_reload_changed_while_the_worker_was_forked(bench: MakeBench) -> None:
    async with bench(configured=False) as it:
        attaching = task(it.device.attach(by=1000))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not it.records.load()
        it.device.redefine(definition())
        await attaching
        [record] = it.records.load()
        assert (record.configured, record.attached_by) == (True, 0)


async def test_reply_that_makes_no_sense_leaves_no_descriptor(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench() as it:
        whole = it.spawner._binding
        monkeypatch.setattr(it.spawner, "_binding", lambda name: {**whole(name), "reconnects": "x"})
        before = open_fds()
        assert "Internal error" in str(await refused(it.device.attach()))
        assert open_fds() == before
