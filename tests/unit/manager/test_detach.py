# SPDX-License-Identifier: MIT
"""Detach: of devices in use, during an attach or an adoption, and with callers and workers that go away."""

from __future__ import annotations

import asyncio
import itertools
import os

import pytest

import nbdd.manager.attachment
import nbdd.manager.device
import nbdd.manager.lifecycle
from nbdd.config.definition import Attach
from nbdd.errors import (
    Busy,
    KernelError,
    NotAttached,
    WorkerFailed,
)
from nbdd.manager.status import State
from tests.fakes.asserts import refused
from tests.fakes.worker import CRASH, DOWN, MakeBench, record_of, task


async def test_detach_of_failed_device_clears_last_error(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.outcomes["attach"] = [DOWN]
        await refused(it.device.attach())
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert it.device.status.last_error == ("", "")


async def test_detach_twice_or_of_detached_device_is_refused(bench: MakeBench) -> None:
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


async def test_detach_of_device_in_use_is_refused_and_it_stays_managed(bench: MakeBench) -> None:
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


async def test_detach_waits_for_users_to_leave(bench: MakeBench) -> None:
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


async def test_detach_by_force_ignores_users(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        await it.device.detach(force=True)
        assert not it.spawner.bound


async def test_detach_whose_caller_goes_away_leaves_managed_device(bench: MakeBench) -> None:
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


async def test_detach_whose_caller_goes_away_at_once_gives_no_order(bench: MakeBench) -> None:
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


async def test_detach_done_as_its_caller_goes_away_is_noticed(bench: MakeBench) -> None:
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


async def test_detach_with_kernel_error_leaves_device_attached(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["detach"] = [KernelError("no")]
        assert isinstance(await refused(it.device.detach()), KernelError)
        assert it.now() is State.ATTACHED
        await it.device.detach()


@pytest.mark.parametrize("moment", ["die", "die late"])
async def test_detach_survives_death_of_two_workers(bench: MakeBench, moment: str) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["detach"] = [moment, moment]
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert not it.spawner.bound
        assert it.records.load() == []


async def test_detach_under_which_every_worker_dies_leaves_managed_device(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["detach"] = ["die"] * 3
        assert isinstance(await refused(it.device.detach()), WorkerFailed)
        await it.managed()
        assert it.now() is State.ATTACHED


async def test_detach_refused_replaces_worker_that_has_not_adopted(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.used.add("disk")
        it.spawner.outcomes["detach"] = ["die"]
        assert isinstance(await refused(it.device.detach()), Busy)
        await it.managed()
        assert it.spawner.worker.client
        await it.device.set_timeout(3)


@pytest.mark.parametrize("stage", ["at once", "spawning", "before binding", "bound, not told"])
async def test_detach_ends_attach_at_every_stage_and_leaves_nothing(bench: MakeBench, stage: str) -> None:
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


async def test_detach_of_device_mounted_before_its_attach_ends_is_refused(bench: MakeBench) -> None:
    async with bench() as it:
        it.spawner.after["attach"] = asyncio.Event()
        task(it.device.attach()).add_done_callback(lambda done: done.exception())
        await it.spawner.acted["attach"].wait()
        it.spawner.mounted.add("disk")
        assert isinstance(await refused(it.device.detach()), Busy)
        del it.spawner.after["attach"]
        await it.managed()
        assert it.spawner.bound == {"disk": 0}


async def test_detach_ends_attempts_of_boot_device(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.lifecycle, "backoff", lambda *_: itertools.repeat(3600.0))
    async with bench(attach=Attach.BOOT) as it:
        it.spawner.outcomes["attach"] = [DOWN]
        it.device.start()
        await it.until(lambda status: status.last_error[0] != "")
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert not it.device.active


async def test_detach_refused_restores_state_of_connections_of_now(bench: MakeBench) -> None:
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


async def test_detach_during_adoption_of_device_in_use_is_refused(bench: MakeBench) -> None:
    async with bench() as it:
        record = record_of(it)
        it.spawner.used.add("disk")
        it.spawner.before["adopt"] = asyncio.Event()
        it.device.adopt(record, [])
        await it.spawner.arrived["adopt"].wait()
        assert isinstance(await refused(it.device.detach()), Busy)
        assert it.spawner.bound
        assert it.now() is State.CONNECTING
        it.spawner.before["adopt"].set()
        await it.reach(State.ATTACHED)


async def test_detach_during_adoption_of_idle_device_frees_it(bench: MakeBench) -> None:
    async with bench() as it:
        it.device.adopt(record_of(it), [os.dup(0)])
        await it.device.detach()
        assert it.now() is State.DETACHED
        assert not it.spawner.bound
        assert it.records.load() == []


@pytest.mark.parametrize(("live", "interval"), [(0, "MEND_INTERVAL"), (1, "WAIT_INTERVAL")])
async def test_detach_that_waits_leaves_time_to_mend_between_attempts(
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
