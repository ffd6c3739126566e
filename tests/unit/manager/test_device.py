# SPDX-License-Identifier: MIT
"""The state machine of a device: every arrow, every pair of calls at once, and workers that die anywhere."""

from __future__ import annotations

import asyncio
import itertools
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
from nbdd.config.definition import Attach, Desktop
from nbdd.errors import (
    AlreadyAttached,
    Busy,
    ConnectFailed,
    ExportChanged,
    KernelError,
    NegotiationFailed,
    NotAttached,
    TimedOut,
    WorkerFailed,
)
from nbdd.manager.records import Record
from nbdd.manager.status import State
from nbdd.manager.supervisor import Ending, How
from nbdd.uri import URI
from nbdd.worker.binding import Binding
from tests.fakes.asserts import refused
from tests.fakes.worker import Bench, definition, open_fds

DOWN = ConnectFailed("storage.example refuses.")
CRASH = Ending(How.SIGNAL, 9)

MakeBench = Callable[..., Bench]


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


def task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(work)


# Attach


async def test_attach_goes_from_detached_over_connecting_to_attached_and_detach_back(bench: MakeBench) -> None:
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


async def test_who_attached_is_told_until_the_device_is_detached(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach(by=1000)
        await it.device.detach()
        assert [status.attached_by for status in it.told] == [1000, 1000, 1000, 1000, 0]
        await it.device.attach()
        assert it.device.status.attached_by == 0


async def test_whoever_joins_an_attach_has_not_begun_it(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        it.device.start()
        await it.device.attach(by=1000)
        assert it.device.status.attached_by == 0


async def test_a_device_of_the_desktop_is_told_as_that_attached_or_not(bench: MakeBench) -> None:
    async with bench(desktop=Desktop("Photos", "folder-pictures")) as it:
        for step in (it.device.attach, it.device.detach):
            await step()
            told = it.device.status
            assert (told.desktop, told.display_name, told.icon_name) == (True, "Photos", "folder-pictures")
        it.device.redefine(definition(desktop=None))
        assert (it.device.status.desktop, it.device.status.display_name) == (False, "")


async def test_an_attach_that_fails_is_told_to_the_caller_and_in_the_status(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [DOWN]
        assert await refused(it.device.attach()) is DOWN
        assert it.states == [State.DETACHED, State.CONNECTING, State.FAILED]
        assert it.device.status.last_error == ("org.nbdd1.Error.ConnectFailed", str(DOWN))
        assert it.device.status.worker_pid == 0
        assert it.records.load() == []
        assert it.device.idle


async def test_a_failed_device_is_attached_by_the_next_attempt_and_its_error_forgotten(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [DOWN]
        await refused(it.device.attach())
        await it.device.attach()
        assert it.now() is State.ATTACHED
        assert it.device.status.last_error == ("", "")


async def test_a_failed_device_can_be_detached(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [DOWN]
        await refused(it.device.attach())
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert it.device.status.last_error == ("", "")


async def test_two_callers_join_one_attempt(bench: MakeBench) -> None:
    async with bench() as it:
        await asyncio.gather(it.device.attach(), it.device.attach())
        assert it.spawner.names() == ["attach"]
        it.spawner.outcomes["attach"] = [DOWN]
        await it.device.detach()
        both = (task(it.device.attach()), task(it.device.attach()))
        assert [await refused(one) for one in both] == [DOWN, DOWN]


async def test_attach_twice_is_refused_with_the_node(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        error = await refused(it.device.attach())
        assert isinstance(error, AlreadyAttached)
        assert "/dev/nbd0" in str(error)
        assert it.now() is State.ATTACHED


async def test_an_attach_with_options_does_not_join_an_attempt_without_them(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.before["attach"] = asyncio.Event()
        plain = task(it.device.attach())
        await it.spawner.arrived["attach"].wait()
        assert isinstance(await refused(it.device.attach(definition(read_only=True))), Busy)
        same = task(it.device.attach(definition()))
        it.spawner.before["attach"].set()
        await asyncio.gather(plain, same)


async def test_options_hold_for_one_attachment(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach(definition(timeout=9))
        assert it.device.status.timeout == 9
        await it.device.detach()
        assert it.device.status.timeout == 0


async def test_a_caller_who_goes_away_does_not_end_the_attempt(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.before["attach"] = asyncio.Event()
        caller = task(it.device.attach())
        await it.spawner.arrived["attach"].wait()
        caller.cancel()
        await asyncio.wait({caller})
        it.spawner.before["attach"].set()
        await it.reach(State.ATTACHED)


async def test_a_server_that_allows_fewer_connections_leaves_no_degraded_device(bench: MakeBench) -> None:
    async with bench(connections=4) as it:
        it.spawner.connections = 1
        await it.device.attach()
        assert it.now() is State.ATTACHED
        assert it.device.status.connections == 1


@pytest.mark.parametrize("moment", ["die", "die late"])
async def test_an_attach_survives_the_death_of_two_workers(bench: MakeBench, moment: str) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [moment, moment]
        await it.device.attach()
        assert it.now() is State.ATTACHED
        assert [arguments["resume"] for _, arguments in it.spawner.orders] == [False, True, True]


async def test_an_attach_under_which_every_worker_dies_fails_and_leaves_nothing_bound(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = ["die late"] * 3
        error = await refused(it.device.attach())
        assert isinstance(error, WorkerFailed)
        assert "SIGKILL" in str(error)
        assert it.now() is State.FAILED
        assert not it.spawner.bound
        assert it.records.load() == []


async def test_what_a_dead_worker_bound_is_not_forgotten_while_it_can_not_be_freed(bench: MakeBench) -> None:
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


async def test_no_worker_to_be_had_is_an_error_like_others(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.spawn_outcomes = [WorkerFailed("No worker.")] * 9
        assert str(await refused(it.device.attach())) == "No worker."
        it.spawner.spawn_outcomes = []
        await it.device.attach()
        assert it.now() is State.ATTACHED


async def test_a_reply_that_makes_no_sense_fails_the_device_and_nothing_else(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench() as it:
        monkeypatch.setattr(it.spawner, "_attach", lambda *_: {"live": 0})
        error = await refused(it.device.attach())
        assert "Internal error" in str(error)
        assert it.now() is State.FAILED
        assert it.records.load(), "it may be bound"


# Boot


async def test_a_boot_device_tries_until_the_server_answers(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [*[DOWN] * 20]
        it.device.start()
        await it.reach(State.ATTACHED)
        assert it.spawner.names() == ["attach"] * 21
        assert it.states == [State.DETACHED, State.CONNECTING, State.ATTACHED]
        assert len(it.spawner.living) == 1


async def test_a_boot_device_that_waits_tells_why(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.lifecycle, "backoff", lambda *_: itertools.repeat(3600.0))
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [DOWN]
        it.device.start()
        await it.until(lambda status: status.last_error[0] != "")
        assert it.now() is State.CONNECTING
        assert it.records.load() == []


async def test_a_server_that_is_away_for_long_is_one_line_in_the_log(
    bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [*[DOWN] * 50, *[ConnectFailed("No route.")] * 50]
        it.device.start()
        await it.reach(State.ATTACHED)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [f"disk: {DOWN} Trying again.", "disk: No route. Trying again."]


async def test_an_attach_call_wakes_a_boot_device_that_waits_and_gets_the_outcome(
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


async def test_a_reload_that_mends_the_definition_reaches_a_boot_device_that_waits(
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


async def test_a_boot_device_that_left_the_configuration_stops_trying(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.before["attach"] = asyncio.Event()
        it.spawner.outcomes["attach"] = [DOWN]
        it.device.start()
        await it.spawner.arrived["attach"].wait()
        it.device.disown()
        it.spawner.before["attach"].set()
        await it.reach(State.FAILED)


# Detach


async def test_detach_twice_and_detach_of_what_is_not_attached_are_refused(bench: MakeBench) -> None:
    async with bench() as it:
        assert isinstance(await refused(it.device.detach()), NotAttached)
        await it.device.attach()
        it.spawner.before["detach"] = asyncio.Event()
        first = task(it.device.detach())
        await it.spawner.arrived["detach"].wait()
        assert isinstance(await refused(it.device.detach()), Busy)
        assert isinstance(await refused(it.device.attach()), Busy)
        assert isinstance(await refused(it.device.set_timeout(3)), Busy)
        it.spawner.before["detach"].set()
        await first
        assert isinstance(await refused(it.device.detach()), NotAttached)


async def test_detach_of_a_device_in_use_is_refused_and_it_stays_attached_and_managed(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        error = await refused(it.device.detach())
        assert isinstance(error, Busy)
        assert "/mnt" in str(error)
        assert it.now() is State.ATTACHED
        assert it.device.status.node == "/dev/nbd0"
        # It is no fault of the device's; who asked was told.
        assert it.device.status.last_error == ("", "")
        await it.device.set_timeout(5)
        assert len(it.spawner.workers) == 1
        it.spawner.worker.end(CRASH)
        await it.until(lambda status: status.worker_pid == 1001)
        await it.managed()


async def test_detach_waits_for_the_users_to_leave(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        it.spawner.outcomes["detach"] = [Busy("in use")] * 3
        detach = task(it.device.detach(wait=3600))
        while it.spawner.names().count("detach") < 4:
            it.spawner.arrived["detach"].clear()
            await it.spawner.arrived["detach"].wait()
        it.spawner.used.clear()
        await detach
        assert it.now() is State.DETACHED


async def test_detach_by_force_does_not_ask_who_uses_it(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        await it.device.detach(force=True)
        assert not it.spawner.bound


async def test_a_detach_whose_caller_goes_away_leaves_a_device_that_is_looked_after(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        detach = task(it.device.detach(wait=3600))
        await it.spawner.arrived["detach"].wait()
        detach.cancel()
        await asyncio.wait({detach})
        assert detach.cancelled()
        await it.managed()
        assert it.now() is State.ATTACHED
        assert len(it.spawner.living) == 1


async def test_a_detach_whose_caller_goes_away_at_once_is_none(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        detach = task(it.device.detach())
        await asyncio.sleep(0)
        assert it.now() is State.DETACHING
        detach.cancel()
        await asyncio.wait({detach})
        assert detach.cancelled()
        await it.managed()
        assert it.now() is State.ATTACHED
        assert "detach" not in it.spawner.names()


async def test_a_detach_that_was_done_when_its_caller_went_away_is_seen(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.after["detach"] = asyncio.Event()
        detach = task(it.device.detach())
        await it.spawner.acted["detach"].wait()
        detach.cancel()
        await asyncio.wait({detach})
        await it.reach(State.FAILED)
        assert it.device.status.node == ""
        assert it.device.idle


async def test_a_kernel_error_in_detach_leaves_the_device_attached(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["detach"] = [KernelError("no")]
        assert isinstance(await refused(it.device.detach()), KernelError)
        assert it.now() is State.ATTACHED
        await it.device.detach()


@pytest.mark.parametrize("moment", ["die", "die late"])
async def test_a_detach_survives_the_death_of_two_workers(bench: MakeBench, moment: str) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["detach"] = [moment, moment]
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert not it.spawner.bound
        assert it.records.load() == []


async def test_a_detach_under_which_every_worker_dies_leaves_the_device_attached_and_managed(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["detach"] = ["die"] * 3
        assert isinstance(await refused(it.device.detach()), WorkerFailed)
        await it.managed()
        assert it.now() is State.ATTACHED


async def test_a_worker_that_was_only_called_in_to_detach_is_not_taken_for_the_devices_own(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        it.spawner.outcomes["detach"] = ["die"]
        assert isinstance(await refused(it.device.detach()), Busy)
        await it.managed()
        assert it.spawner.worker.client
        await it.device.set_timeout(3)


# Detach during attach


@pytest.mark.parametrize("stage", ["at once", "spawning", "before binding", "bound, not told"])
async def test_detach_ends_an_attach_at_every_stage_and_leaves_nothing(bench: MakeBench, stage: str) -> None:
    async with bench() as it:
        gates = it.spawner.before if stage == "before binding" else it.spawner.after
        gates["attach"] = asyncio.Event()
        attach = task(it.device.attach())
        await asyncio.sleep(0)
        if stage == "spawning":
            await asyncio.sleep(0)
        elif stage == "before binding":
            await it.spawner.arrived["attach"].wait()
        elif stage == "bound, not told":
            await it.spawner.acted["attach"].wait()
        it.spawner.used.add("disk")  # udev has a look
        await it.device.detach()
        assert isinstance(await refused(attach), NotAttached)
        assert it.now() is State.DETACHED
        assert not it.spawner.bound
        assert it.records.load() == []
        it.spawner.used.clear()
        gates.clear()
        await it.device.attach()


async def test_detach_of_a_device_that_was_mounted_before_its_attach_was_over_is_refused(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.after["attach"] = asyncio.Event()
        task(it.device.attach()).add_done_callback(lambda done: done.exception())
        await it.spawner.acted["attach"].wait()
        it.spawner.mounted.add("disk")
        assert isinstance(await refused(it.device.detach()), Busy)
        del it.spawner.after["attach"]
        await it.managed()
        assert it.spawner.bound == {"disk": 0}


async def test_a_device_that_somebody_else_bound_under_the_name_is_never_ours(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.foreign.add("disk")
        assert isinstance(await refused(it.device.attach()), Busy)
        assert it.records.load() == [], "with a record, a detach would take it for ours"
        assert "attach" not in it.spawner.names()


async def test_detach_ends_a_boot_device_that_waits_for_its_server(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdd.manager.lifecycle, "backoff", lambda *_: itertools.repeat(3600.0))
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [DOWN]
        it.device.start()
        await it.until(lambda status: status.last_error[0] != "")
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert not it.device.active


# Workers that die


async def test_a_worker_that_dies_is_replaced_and_the_device_stays(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        since = it.device.status.attached_since
        for _ in range(20):
            it.spawner.worker.end(CRASH)
            await it.until(lambda status: status.worker_pid == 0)
            await it.managed()
        assert it.states == [State.DETACHED, State.CONNECTING, State.ATTACHED]
        assert it.device.status.attached_since == since
        assert it.spawner.names().count("adopt") == 20
        assert len(it.spawner.given["adopt"]) == 1, "the links come along"


async def test_successors_that_die_too_are_replaced_until_one_lives(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["adopt"] = ["die", KernelError("out of memory"), "die late"]
        it.spawner.worker.end(CRASH)
        await it.until(lambda status: status.worker_pid == 0)
        await it.managed()
        assert it.now() is State.ATTACHED
        assert it.spawner.bound


async def test_a_device_that_is_gone_when_the_successor_comes_fails(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.bound.clear()
        it.spawner.worker.end(CRASH)
        await it.reach(State.FAILED)
        assert it.device.status.last_error[0] == NotAttached.dbus_name
        assert it.device.status.node == ""
        assert it.records.load() == []
        assert it.kept["disk"] == []


async def test_a_boot_device_that_is_gone_when_the_successor_comes_is_attached_anew(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        await it.device.attach()
        it.spawner.bound.clear()
        it.spawner.worker.end(CRASH)
        await it.reach(State.CONNECTING)
        assert it.device.status.node == ""
        await it.reach(State.ATTACHED)


async def test_set_timeout_is_live_noted_and_forgotten_with_the_attachment(bench: MakeBench) -> None:
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


async def test_a_device_is_reconnected_and_resized_by_its_worker_and_the_new_size_is_told_and_noted(
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
async def test_set_timeout_goes_to_the_successor_of_a_worker_that_dies_under_it(bench: MakeBench, moment: str) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["set-timeout"] = [moment]
        await it.device.set_timeout(8)
        assert it.device.status.timeout == 8
        assert it.spawner.names() == ["attach", "set-timeout", "adopt", "set-timeout"]


async def test_set_timeout_of_a_worker_that_just_ended_goes_to_its_successor(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.worker.end(CRASH)
        await it.device.set_timeout(8)
        assert it.device.status.timeout == 8


async def test_an_order_under_which_every_worker_dies_fails_and_the_device_stays(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["set-timeout"] = ["die"] * 3
        assert isinstance(await refused(it.device.set_timeout(8)), WorkerFailed)
        assert it.device.status.timeout == 0
        await it.managed()


async def test_an_order_for_a_device_without_a_worker_waits_a_little_and_says_so(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdd.manager.device, "READY_DEADLINE", 0.01)
    async with bench() as it:
        await it.device.attach()
        it.spawner.before["adopt"] = asyncio.Event()
        it.spawner.worker.end(CRASH)
        assert "no worker at the moment" in str(await refused(it.device.statistics()))


# What workers tell


async def test_links_that_die_and_come_back_are_told(bench: MakeBench) -> None:
    async with bench(connections=2) as it:
        it.spawner.connections = 2
        await it.device.attach()
        links = {"reconnects": 0, "uri": "nbd://storage.example/disk", "lost": 0, "failing": False}
        wire = ConnectFailed("A connection ended.").to_wire()
        it.spawner.worker.say("connections", [os.dup(0)], live=1, **links, **wire)
        assert it.now() is State.DEGRADED
        it.spawner.worker.say("connections", [], live=0, **links, **wire)
        assert it.now() is State.RECONNECTING
        assert it.device.status.last_error == (ConnectFailed.dbus_name, "A connection ended.")
        assert it.kept["disk"] == []
        record = it.records.load()[0]
        assert record.binding is not None
        assert record.binding.live == 0, "the next worker must know that all links are dead"
        links |= {"reconnects": 2, "uri": "nbd://second.example/disk"}
        it.spawner.worker.say("connections", [os.dup(0), os.dup(0)], live=2, **links)
        assert it.now() is State.ATTACHED
        assert it.device.status.reconnects == 2
        assert it.device.status.uri == "nbd://second.example/disk"
        assert len(it.kept["disk"]) == 2
        assert it.device.status.last_error[1] == "A connection ended."
        # Links that are exchanged because somebody asked for it end without an error, and not for the last one.
        it.spawner.worker.say("connections", [], live=0, **links)
        assert (it.now(), it.device.status.last_error) == (State.RECONNECTING, ("", ""))


async def test_a_device_that_waits_says_until_when_and_what_became_of_it(bench: MakeBench) -> None:
    async with bench(dead_timeout=100) as it:
        await it.device.attach()
        links = {"live": 0, "reconnects": 0, "uri": "nbd://storage.example/disk", "lost": time.monotonic() - 40}
        it.spawner.worker.say("connections", [], **links, failing=False, **ConnectFailed("It ended.").to_wire())
        assert it.now() is State.RECONNECTING
        fails_at = it.device.status.fails_at
        assert abs(fails_at / 1e6 - (time.time() + 60)) < 5
        other = ExportChanged("It is another.").to_wire()
        it.spawner.worker.say("connections", [], **links, failing=False, **other)
        assert it.now() is State.FAILED
        assert it.device.status.last_error == (NegotiationFailed.dbus_name, "It is another.")
        assert it.device.status.fails_at == fails_at, "the same moment, and no signal to everybody"
        it.spawner.worker.say("connections", [], **links, failing=False, **ConnectFailed("It is away.").to_wire())
        assert it.now() is State.RECONNECTING
        it.spawner.worker.say("connections", [], **links, failing=True, **TimedOut("Too long.").to_wire())
        assert it.now() is State.FAILED
        assert it.device.status.bound
        with pytest.raises(AlreadyAttached):
            await it.device.attach()
        await it.device.set_timeout(7)
        record = it.records.load()[0]
        assert record.binding is not None
        assert record.binding.lost == links["lost"], "the next worker must know since when I/O waits"
        it.spawner.worker.say("connections", [os.dup(0)], live=1, reconnects=1, uri="nbd://x/y", lost=0, failing=False)
        assert (it.now(), it.device.status.fails_at) == (State.ATTACHED, 0)
        it.spawner.worker.say("connections", [], **links, failing=True, **TimedOut("Too long.").to_wire())
        await it.device.detach()
        assert (it.now(), it.device.status.fails_at) == (State.DETACHED, 0)


async def test_a_device_in_a_hurry_waits_no_longer_than_it_is_told_to_and_says_so(bench: MakeBench) -> None:
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
        links = {"live": 0, "reconnects": 0, "uri": "nbd://storage.example/disk", "lost": time.monotonic() - 100}
        it.spawner.worker.say("connections", [], **links, failing=False, **ConnectFailed("It ended.").to_wire())
        it.spawner.waited = 100
        await it.device.shorten_dead_timeout(30)
        assert it.device.status.dead_timeout == 130
        assert abs(it.device.status.fails_at / 1e6 - (time.time() + 30)) < 5


async def test_a_device_that_can_not_be_hurried_is_told_in_the_journal(
    bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["shorten-dead-timeout"] = ["die"] * 3
        await it.device.shorten_dead_timeout(30)
        assert it.device.status.dead_timeout == 300
    assert "disk: the dead timeout can't be shortened: " in caplog.text


async def test_links_that_change_while_a_detach_is_refused_are_in_the_state_afterwards(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        it.spawner.before["detach"] = asyncio.Event()
        detach = task(it.device.detach())
        await it.spawner.arrived["detach"].wait()
        it.spawner.worker.say(
            "connections", [], live=0, reconnects=0, uri="nbd://storage.example/disk", lost=0, failing=False
        )
        assert it.now() is State.DETACHING
        it.spawner.before["detach"].set()
        assert isinstance(await refused(detach), Busy)
        assert it.now() is State.RECONNECTING


async def test_news_of_a_worker_that_was_let_go_changes_nothing(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        worker = it.spawner.worker
        await it.device.detach()
        worker.say("connections", [os.dup(0)], live=1, reconnects=5, uri="nbd://x/y", lost=0, failing=False)
        worker.say("warning", [os.dup(0)], message="late")
        assert it.device.status.reconnects == 0
        assert it.kept["disk"] == []


# Records


async def test_the_record_is_there_before_the_kernel_is_asked_and_gone_after_it_is_free(bench: MakeBench) -> None:
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


async def test_nothing_is_bound_where_the_record_can_not_be_written(bench: MakeBench, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    async with bench() as it:
        assert "record" in str(await refused(it.device.attach()))
        assert it.now() is State.FAILED
        assert it.spawner.orders == []
        (tmp_path / "run").unlink()
        await it.device.attach()


async def test_a_device_that_is_bound_stays_so_when_its_record_can_not_be_written_any_more(
    bench: MakeBench, tmp_path: Path
) -> None:
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


async def test_close_keeps_the_device_and_its_record_and_closes_its_descriptors(bench: MakeBench) -> None:
    it = bench()
    await it.device.attach()
    await it.device.close()
    assert it.spawner.bound
    assert len(it.records.load()) == 1
    assert it.spawner.living == []
    assert len(it.kept["disk"]) == 1, "systemd keeps them for the successor"
    assert isinstance(await refused(it.device.detach()), WorkerFailed)
    assert it.spawner.bound
    await it.device.close()


async def test_close_ends_an_attempt_and_tells_those_who_wait(bench: MakeBench) -> None:
    it = bench()
    it.spawner.before["attach"] = asyncio.Event()
    attach = task(it.device.attach())
    await it.spawner.arrived["attach"].wait()
    await it.device.close()
    assert "stopping" in str(await refused(attach))
    assert "stopping" in str(await refused(it.device.attach()))
    it.device.start()
    assert it.spawner.living == []
    assert len(it.records.load()) == 1


async def test_close_during_a_detach_starts_nothing_anew(bench: MakeBench) -> None:
    it = bench()
    await it.device.attach()
    it.spawner.before["detach"] = asyncio.Event()
    detach = task(it.device.detach())
    await it.spawner.arrived["detach"].wait()
    await it.device.close()
    assert isinstance(await refused(detach), WorkerFailed)
    assert it.spawner.living == []
    assert len(it.spawner.workers) == 1
    assert len(it.records.load()) == 1


# Adoption


def _record(it: Bench, **changes: Any) -> Record:
    it.spawner.bound["disk"] = 0
    binding = Binding.from_wire(it.spawner._binding("disk"))
    return replace(Record(it.device.definition, configured=True, binding=binding, attached_since=5), **changes)


async def test_a_device_of_a_predecessor_is_adopted_with_its_links(bench: MakeBench) -> None:
    async with bench() as it:
        record = _record(it, definition=definition(timeout=77), attached_by=1000)
        it.device.adopt(record, [os.dup(0), os.dup(0)])
        assert it.now() is State.CONNECTING
        assert it.device.active
        told = it.device.status
        assert (told.node, told.attached_since) == ("/dev/nbd0", 5), "it is there, whoever looks after it"
        await it.reach(State.ATTACHED)
        assert len(it.spawner.given["adopt"]) == 2
        assert it.device.status.attached_since == 5
        assert (it.device.status.timeout, it.device.status.attached_by) == (77, 1000)
        assert record.binding is not None
        assert it.spawner.orders[0][1]["binding"] == record.binding.to_wire()


async def test_an_attach_during_an_adoption_joins_it(bench: MakeBench) -> None:
    async with bench() as it:
        it.device.adopt(_record(it), [])
        await it.device.attach()
        assert it.spawner.names() == ["adopt"]


async def test_a_manual_device_that_vanished_meanwhile_is_failed_and_forgotten(bench: MakeBench) -> None:
    async with bench() as it:
        record = _record(it)
        it.spawner.bound.clear()
        it.device.adopt(record, [os.dup(0)])
        await it.reach(State.FAILED)
        assert it.records.load() == []
        assert it.spawner.names() == ["adopt"]


async def test_a_boot_device_that_vanished_meanwhile_is_attached_by_its_definition_of_today(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        record = _record(it, definition=definition(uri="nbd://old.example/disk", attach=Attach.BOOT))
        it.spawner.bound.clear()
        it.device.adopt(record, [os.dup(0)])
        await it.reach(State.ATTACHED)
        assert it.spawner.names() == ["adopt", "attach"]
        assert it.spawner.orders[1][1]["definition"]["uri"] == ["nbd://storage.example/disk"]
        assert it.spawner.orders[1][1]["resume"] is False


@pytest.mark.parametrize("bound", [True, False])
async def test_an_attach_in_which_the_predecessor_was_killed_is_finished(bench: MakeBench, bound: bool) -> None:
    async with bench() as it:
        record = _record(it, binding=None)
        if not bound:
            it.spawner.bound.clear()
        it.device.adopt(record, [])
        await it.reach(State.ATTACHED)
        assert [(order, arguments["resume"]) for order, arguments in it.spawner.orders] == [("attach", True)]


async def test_detach_of_a_device_in_use_that_is_only_being_adopted_is_refused(bench: MakeBench) -> None:
    async with bench() as it:
        record = _record(it)
        it.spawner.used.add("disk")
        it.spawner.before["adopt"] = asyncio.Event()
        it.device.adopt(record, [])
        await it.spawner.arrived["adopt"].wait()
        assert isinstance(await refused(it.device.detach()), Busy)
        assert it.spawner.bound
        assert it.now() is State.CONNECTING
        it.spawner.before["adopt"].set()
        await it.reach(State.ATTACHED)


async def test_detach_of_an_idle_device_that_is_only_being_adopted_frees_it(bench: MakeBench) -> None:
    async with bench() as it:
        it.device.adopt(_record(it), [os.dup(0)])
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert not it.spawner.bound
        assert it.records.load() == []


# Definitions that change


async def test_a_new_definition_holds_at_once_when_idle_and_after_the_detach_when_attached(bench: MakeBench) -> None:
    async with bench() as it:
        it.device.redefine(definition(timeout=1))
        assert it.device.status.timeout == 1
        await it.device.attach()
        it.device.redefine(definition(timeout=2))
        assert it.device.status.timeout == 1
        await it.device.detach()
        assert it.device.status.timeout == 2


async def test_the_record_knows_whether_a_file_defines_the_device(bench: MakeBench) -> None:
    async with bench(configured=False) as it:
        await it.device.attach()
        assert not it.records.load()[0].configured
        it.device.redefine(definition())
        assert it.records.load()[0].configured
        it.device.disown()
        assert not it.records.load()[0].configured


async def test_a_hundred_rounds_leave_nothing_behind(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        await it.device.detach()
        tasks, descriptors = len(asyncio.all_tasks()), open_fds()
        for _ in range(100):
            await it.device.attach()
            it.spawner.worker.end(CRASH)
            await it.until(lambda status: status.worker_pid == 0)
            await it.managed()
            await it.device.detach()
        for worker in it.spawner.workers:
            await worker.ended
        assert open_fds() == descriptors
        assert len(asyncio.all_tasks()) <= tasks + 1


@pytest.mark.parametrize(("live", "interval"), [(0, "MEND_INTERVAL"), (1, "WAIT_INTERVAL")])
async def test_a_detach_that_waits_for_users_leaves_time_to_mend_between_its_looks(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, live: int, interval: str
) -> None:
    # Each look interrupts the mending: with a dead link only the longer of the two pauses may count.
    for name in ("WAIT_INTERVAL", "MEND_INTERVAL"):
        monkeypatch.setattr(nbdd.manager.attachment, name, 0.01 if name == interval else 3600)
    async with bench() as it:
        await it.device.attach()
        if not live:
            it.spawner.worker.say("connections", [], live=0, reconnects=0, uri="nbd://x/y", lost=1, failing=False)
        it.spawner.outcomes["detach"] = [Busy("in use")] * 3
        async with asyncio.timeout(30):
            await it.device.detach(wait=60)
        assert it.spawner.names().count("detach") == 4


async def test_however_many_ask_for_statistics_the_worker_is_asked_once_at_a_time(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        for rounds in (1, 2):
            asked = [asyncio.ensure_future(it.device.statistics()) for _ in range(100)]
            asked.pop().cancel()
            assert await asyncio.gather(*asked) == [{"reads": 7}] * 99
            assert it.spawner.names().count("statistics") == rounds


async def test_what_somebody_attached_is_the_configurations_once_that_defines_it(bench: MakeBench) -> None:
    async with bench(configured=False) as it:
        await it.device.attach(by=1000)
        assert it.device.status.attached_by == it.records.load()[0].attached_by == 1000
        it.device.redefine(it.device.definition)
        assert it.device.status.attached_by == it.records.load()[0].attached_by == 0
        with pytest.raises(AlreadyAttached):
            await it.device.attach()


async def test_a_device_of_another_server_than_its_new_definitions_does_not_pass_for_attached(
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
async def test_what_is_asked_of_a_device_that_is_being_taken_up_waits_until_it_is(
    bench: MakeBench, ask: Callable[[Any], Coroutine[Any, Any, Any]]
) -> None:
    async with bench() as it:
        it.spawner.before["adopt"] = asyncio.Event()
        it.device.adopt(_record(it), [])
        await it.spawner.arrived["adopt"].wait()
        asked = asyncio.ensure_future(ask(it.device))
        await asyncio.sleep(0)
        assert not asked.done()
        it.spawner.before["adopt"].set()
        await asked
        assert it.now() is State.ATTACHED


async def test_the_journal_tells_the_story_of_a_device(bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nbdd.manager.device")
    async with bench() as it:
        it.device.adopt(_record(it), [])
        await it.reach(State.ATTACHED)
        await it.device.set_timeout(5)
        await it.device.set_timeout(0)
        links = {"reconnects": 0, "uri": "nbd://x/y", "lost": 1, "failing": False}
        it.spawner.worker.say("connections", [], live=0, **links, **ConnectFailed("It ended.").to_wire())
        it.spawner.worker.say("connections", [], live=0, **links, **ConnectFailed("It is away.").to_wire())
        it.spawner.worker.say("connections", [], live=0, **links, **ConnectFailed("It is away.").to_wire())
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
