# SPDX-License-Identifier: MIT
"""Adopt: after the end of a worker and after that of the manager; and what a manager leaves when it ends."""

from __future__ import annotations

import asyncio
import os

import pytest

from nbdd.config.definition import Attach
from nbdd.errors import (
    KernelError,
    NotAttached,
    WorkerFailed,
)
from nbdd.manager.status import State
from tests.fakes.asserts import refused
from tests.fakes.worker import CRASH, MakeBench, definition, open_fds, record_of, task


async def test_worker_that_dies_is_replaced_and_device_stays(bench: MakeBench) -> None:
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


async def test_workers_that_die_are_replaced_until_one_lives(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.outcomes["adopt"] = ["die", KernelError("out of memory"), "die late"]
        it.spawner.worker.end(CRASH)
        await it.until(lambda status: status.worker_pid == 0)
        await it.managed()
        assert it.now() is State.ATTACHED
        assert it.spawner.bound


async def test_worker_finds_device_gone_and_it_fails(bench: MakeBench) -> None:
    async with bench() as it:
        await it.device.attach()
        it.spawner.bound.clear()
        it.spawner.worker.end(CRASH)
        await it.reach(State.FAILED)
        assert it.device.status.last_error[0] == NotAttached.dbus_name
        assert it.device.status.node == ""
        assert it.records.load() == []
        assert it.kept["disk"] == []


async def test_worker_finds_boot_device_gone_and_it_is_attached_again(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        await it.device.attach()
        it.spawner.bound.clear()
        it.spawner.worker.end(CRASH)
        await it.reach(State.CONNECTING)
        assert it.device.status.node == ""
        await it.reach(State.ATTACHED)


async def test_close_keeps_device_and_record_and_closes_descriptors(bench: MakeBench) -> None:
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


async def test_close_ends_attach_with_error(bench: MakeBench) -> None:
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


async def test_close_during_detach_starts_no_worker(bench: MakeBench) -> None:
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


async def test_adopt_takes_sockets_and_status_of_record(bench: MakeBench) -> None:
    async with bench() as it:
        record = record_of(it, definition=definition(timeout=77), attached_by=1000)
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


async def test_attach_during_adoption_joins_it(bench: MakeBench) -> None:
    async with bench() as it:
        it.device.adopt(record_of(it), [])
        await it.device.attach()
        assert it.spawner.names() == ["adopt"]


async def test_adopt_of_vanished_manual_device_fails(bench: MakeBench) -> None:
    async with bench() as it:
        record = record_of(it)
        it.spawner.bound.clear()
        it.device.adopt(record, [os.dup(0)])
        await it.reach(State.FAILED)
        assert it.records.load() == []
        assert it.spawner.names() == ["adopt"]


async def test_adopt_of_vanished_boot_device_attaches_with_current_definition(bench: MakeBench) -> None:
    async with bench(attach=Attach.BOOT) as it:
        record = record_of(it, definition=definition(uri="nbd://old.example/disk", attach=Attach.BOOT))
        it.spawner.bound.clear()
        it.device.adopt(record, [os.dup(0)])
        await it.reach(State.ATTACHED)
        assert it.spawner.names() == ["adopt", "attach"]
        assert it.spawner.orders[1][1]["definition"]["uri"] == ["nbd://storage.example/disk"]
        assert it.spawner.orders[1][1]["resume"] is False


@pytest.mark.parametrize("bound", [True, False])
async def test_adopt_of_unfinished_attach_resumes_it(bench: MakeBench, bound: bool) -> None:
    async with bench() as it:
        record = record_of(it, binding=None)
        if not bound:
            it.spawner.bound.clear()
        it.device.adopt(record, [])
        await it.reach(State.ATTACHED)
        assert [(order, arguments["resume"]) for order, arguments in it.spawner.orders] == [("attach", True)]


async def test_lifecycle_of_a_hundred_rounds_leaves_nothing_behind(bench: MakeBench) -> None:
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
