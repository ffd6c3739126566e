# SPDX-License-Identifier: MIT
"""What nbdd asks systemd over D-Bus: why it is stopped, and whether the machine shuts down. A fake answers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from nbdd.bus.daemon import systemd1
from nbdd.bus.daemon.systemd1 import is_going_down, job_type, shutdown
from tests.fakes.bus import PROPERTIES, BusDaemon, Caller, caller

# isort: split
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

# Why are we being stopped?


UNIT = "/org/freedesktop/systemd1/unit/nbdd_2eservice"
JOB = "/org/freedesktop/systemd1/job/77"
SYSTEMD = "org.freedesktop.systemd1"


async def fake_systemd(on: Caller, job: str, *, silent: bool = False) -> None:
    """A systemd with a job for our unit, none where `job` is "", and no unit of ours where it is "stranger"."""

    def answer(call: Message) -> Message | None:
        if silent:
            return None
        asked = (call.path, call.interface, call.member, *call.body)
        if asked == ("/org/freedesktop/systemd1", f"{SYSTEMD}.Manager", "GetUnitByPID", os.getpid()):
            if job == "stranger":
                return Message.new_error(call, f"{SYSTEMD}.NoUnitForPID", "PID does not belong to any loaded unit.")
            return Message.new_method_return(call, "o", [UNIT])
        if asked == (UNIT, PROPERTIES, "Get", f"{SYSTEMD}.Unit", "Job"):
            return Message.new_method_return(call, "v", [Variant("(uo)", [77, JOB] if job else [0, "/"])])
        if asked == (JOB, PROPERTIES, "Get", f"{SYSTEMD}.Job", "JobType"):
            return Message.new_method_return(call, "v", [Variant("s", job)])
        raise AssertionError(asked)

    on.serve(answer)
    await on.own(SYSTEMD)


@pytest.mark.parametrize(
    ("job", "told"), [("stop", "stop"), ("restart", "restart"), ("start", "start"), ("", ""), ("stranger", "")]
)
async def test_job_type_tells_stop_from_restart(bus: BusDaemon, job: str, told: str) -> None:
    async with caller(bus.address) as ours, caller(bus.address) as fake:
        await fake_systemd(fake, job)
        assert await job_type(ours.bus) == told


async def test_job_type_does_not_wait_for_missing_or_silent_systemd(
    bus: BusDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd1, "_ASK_DEADLINE", 0.01)
    async with caller(bus.address) as ours, caller(bus.address) as fake:
        assert await job_type(ours.bus) == ""
        await fake_systemd(fake, "stop", silent=True)
        assert await job_type(ours.bus) == ""


async def test_job_type_ends_with_the_bus(bus: BusDaemon) -> None:
    async with caller(bus.address) as ours, caller(bus.address) as fake:
        asked = asyncio.Event()
        fake.serve(lambda _call: asked.set())
        await fake.own(SYSTEMD)
        question = asyncio.create_task(job_type(ours.bus))
        await asked.wait()
        bus.kill()
        assert await question == ""


# Does the machine go down?


SHUTDOWN = "/org/freedesktop/systemd1/unit/shutdown_2etarget"


class FakeShutdown:
    """A systemd that is asked about shutdown.target, which has a job or is not even loaded."""

    def __init__(self, caller: Caller, *, loaded: bool = True, job: bool = False) -> None:
        self.job = job
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self._caller = caller
        self._loaded = loaded

    async def start(self) -> None:
        self._caller.serve(self._answer)
        await self._caller.own(SYSTEMD)

    async def tell(self, unit: str, *, to: Any = None) -> None:
        """Send JobNew; with `to`, to one connection, as anybody can."""
        await self._caller.bus.send(
            Message(
                destination=to,
                message_type=MessageType.SIGNAL,
                path="/org/freedesktop/systemd1",
                interface=f"{SYSTEMD}.Manager",
                member="JobNew",
                signature="uos",
                body=[77, JOB, unit],
            )
        )

    def _answer(self, call: Message) -> Message:
        self.asked.put_nowait(call.member)
        asked = (call.path, call.interface, call.member, *call.body)
        if asked == ("/org/freedesktop/systemd1", f"{SYSTEMD}.Manager", "Subscribe"):
            return Message.new_method_return(call)
        if asked == ("/org/freedesktop/systemd1", f"{SYSTEMD}.Manager", "GetUnit", "shutdown.target"):
            if self._loaded:
                return Message.new_method_return(call, "o", [SHUTDOWN])
            return Message.new_error(call, f"{SYSTEMD}.NoSuchUnit", "Unit shutdown.target not loaded.")
        if asked == (SHUTDOWN, PROPERTIES, "Get", f"{SYSTEMD}.Unit", "Job"):
            return Message.new_method_return(call, "v", [Variant("(uo)", [77, JOB] if self.job else [0, "/"])])
        raise AssertionError(asked)


async def test_shutdown_is_noticed_when_it_begins_and_after_it_began(bus: BusDaemon) -> None:
    async with caller(bus.address) as ours, caller(bus.address) as fake:
        systemd = FakeShutdown(fake)
        await systemd.start()
        waiting = asyncio.create_task(shutdown(ours.bus))
        while await systemd.asked.get() != "Get":
            pass
        assert not await is_going_down(ours.bus)
        systemd.job = True
        await systemd.tell("shutdown.target")
        await waiting
        assert await is_going_down(ours.bus)
        await shutdown(ours.bus)


async def test_shutdown_signal_of_a_stranger_is_checked_with_systemd(bus: BusDaemon) -> None:
    async with (
        caller(bus.address) as ours,
        caller(bus.address) as fake,
        caller(bus.address) as stranger,
    ):
        systemd = FakeShutdown(fake, loaded=False)
        await systemd.start()
        waiting = asyncio.create_task(shutdown(ours.bus))
        while await systemd.asked.get() != "GetUnit":
            pass
        await FakeShutdown(stranger).tell("shutdown.target", to=ours.name)
        assert await systemd.asked.get() == "GetUnit", "systemd is asked"
        assert not await is_going_down(ours.bus)
        assert not waiting.done()
        waiting.cancel()


async def test_shutdown_without_systemd_is_never_noticed(bus: BusDaemon) -> None:
    async with caller(bus.address) as ours:
        assert not await is_going_down(ours.bus)
        waiting = asyncio.create_task(shutdown(ours.bus))
        assert await asyncio.wait({waiting}, timeout=0.2) == (set(), {waiting})
        waiting.cancel()
