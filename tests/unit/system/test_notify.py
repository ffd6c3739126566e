# SPDX-License-Identifier: MIT
"""What systemd hears from nbdd and what nbdd hears from systemd, with a fake at the other end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdd.bus.daemon import systemd1
from nbdd.bus.daemon.systemd1 import is_going_down, job_type, shutdown
from nbdd.config.definition import NAME_PATTERN
from nbdd.system.notify import Notifier, _from_fdname, _to_fdname
from tests.fakes.bus import DEADLINE, PROPERTIES, BusDaemon, Caller, NotifySocket, caller, private_bus, run

# isort: split
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotifySocket]:
    with NotifySocket() as listening:
        monkeypatch.setenv("NOTIFY_SOCKET", listening.path)
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            monkeypatch.delenv(name, raising=False)
        yield listening


@pytest.fixture
def notifier(systemd: NotifySocket) -> Iterator[Notifier]:  # noqa: ARG001 - sets the environment
    notifier = Notifier()
    yield notifier
    notifier._notifier.socket.close()


# Notifications


def test_each_state_is_one_datagram(systemd: NotifySocket, notifier: Notifier) -> None:
    notifier.ready()
    notifier.stopping()
    assert [systemd.receive() for _ in range(3)] == [b"READY=1", b"STOPPING=1", None]


def test_a_reload_is_told_with_its_time_in_the_same_datagram(systemd: NotifySocket, notifier: Notifier) -> None:
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    told, stamp = (systemd.receive() or b"").split(b"\n")
    assert told == b"RELOADING=1"
    name, _, microseconds = stamp.partition(b"=")
    assert name == b"MONOTONIC_USEC"
    assert before <= int(microseconds) <= time.monotonic_ns() // 1000
    assert systemd.receive() is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1/2 attached", b"1/2 attached"),
        ("über 💾", rb"\xfcber \U0001f4be"),
        ("one\nREADY=1", b"one READY=1"),
        ("alone \udcff", rb"alone \udcff"),
        ("", b""),
    ],
)
def test_a_status_is_one_line_of_ascii(systemd: NotifySocket, notifier: Notifier, text: str, told: bytes) -> None:
    notifier.status(text)
    assert systemd.receive() == b"STATUS=" + told
    assert systemd.receive() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sdnotify forgets its socket
@pytest.mark.parametrize("path", [None, "", "/nonexistent/notify", "nonsense"])
def test_without_systemd_nothing_happens(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    notifier = Notifier()
    notifier.ready()
    notifier.reloading()
    notifier.status("text")
    notifier.keep_sockets("backup", [0])
    notifier.keep_sockets("backup", [])
    run(notifier.watchdog())
    assert "NOTIFY_SOCKET" not in os.environ


def test_a_systemd_that_went_away_is_no_fault(systemd: NotifySocket, notifier: Notifier) -> None:
    systemd._sock.close()
    notifier.ready()
    notifier.keep_sockets("backup", [0])


@pytest.mark.usefixtures("systemd")
def test_children_can_neither_speak_for_us_nor_believe_that_they_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    notifier._notifier.socket.close()


# The watchdog


@pytest.mark.parametrize("pid", [None, "own"])
def test_the_watchdog_hears_from_us_at_half_its_interval(
    pid: str | None, systemd: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier()
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr("nbdd.system.notify.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(notifier.watchdog())
    assert waits == [15.0, 15.0, 15.0]
    assert [systemd.receive() for _ in range(4)] == [b"WATCHDOG=1"] * 3 + [None]
    notifier._notifier.socket.close()


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}]
)
def test_without_a_watchdog_or_with_that_of_another_nothing_is_told(
    environment: dict[str, str], systemd: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notifier = Notifier()
    run(notifier.watchdog())
    assert systemd.receive() is None
    notifier._notifier.socket.close()


# The descriptor store


def test_links_are_kept_under_their_device_and_replace_those_kept_before(
    systemd: NotifySocket, notifier: Notifier
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        notifier.keep_sockets("a:b.c", [ours.fileno(), theirs.fileno()])
        assert systemd.receive() == b"FDSTOREREMOVE=1\nFDNAME=a+b.c"
        assert systemd.fds == []
        # FDPOLL=0: systemd must not drop a link because it died, its death is what the next manager wants to see.
        assert systemd.receive() == b"FDSTORE=1\nFDNAME=a+b.c\nFDPOLL=0"
        same = [os.fstat(fd).st_ino for fd in (ours.fileno(), theirs.fileno())]
        assert [os.fstat(fd).st_ino for fd in systemd.fds] == same
        assert systemd.receive() is None


def test_no_links_are_taken_out_of_the_store(systemd: NotifySocket, notifier: Notifier) -> None:
    notifier.keep_sockets("backup", [])
    assert systemd.receive() == b"FDSTOREREMOVE=1\nFDNAME=backup"
    assert systemd.receive() is None


@settings(deadline=None)  # a busy machine is no fault of the code
@given(name=st.from_regex(NAME_PATTERN, fullmatch=True))
def test_every_device_has_a_name_in_the_store_and_gets_it_back(name: str) -> None:
    name = name.removesuffix("\n")
    kept = _to_fdname(name)
    # systemd's fdname_is_valid(): no colon, no control characters, at most 255.
    assert ":" not in kept
    assert kept.isprintable()
    assert len(kept) <= 255
    assert _from_fdname(kept) == name


CHILD = """
import json, os, sys
given, environment = json.loads(sys.argv[1])
null = os.open("/dev/null", os.O_RDWR)
fds = [os.dup2(null, 3 + number, inheritable=True) for number in range(given)]
os.environ.update({key: value.replace("PID", str(os.getpid())) for key, value in environment.items()})
from nbdd.system.notify import kept_sockets
found = kept_sockets()
print(json.dumps([
    found,
    [os.get_inheritable(fd) for fds in found.values() for fd in fds],
    kept_sockets(),
    [key for key in os.environ if key.startswith("LISTEN")],
]))
"""


def kept(given: int, **environment: str) -> Sequence[Any]:
    """What a fresh process finds: the descriptors begin at 3, where this one has others."""
    command = [sys.executable, "-c", CHILD, json.dumps([given, environment])]
    found: list[Any] = json.loads(subprocess.run(command, check=True, stdout=-1, timeout=DEADLINE).stdout)
    return found


def test_what_systemd_kept_is_found_by_device_once_and_by_no_child() -> None:
    found = kept(3, LISTEN_PID="PID", LISTEN_FDS="3", LISTEN_FDNAMES="backup:a+b:backup")
    assert found == [{"backup": [3, 5], "a:b": [4]}, [False] * 3, {}, []]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "backup"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "backup"},
        {"LISTEN_PID": "PID", "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
        {"LISTEN_PID": "PID", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "backup"},
        {"LISTEN_PID": "PID", "LISTEN_FDNAMES": "backup"},
    ],
)
def test_what_was_kept_for_another_or_does_not_add_up_is_not_taken(environment: dict[str, str]) -> None:
    assert kept(1, **environment) == [{}, [], {}, []]


# Why are we being stopped?


UNIT = "/org/freedesktop/systemd1/unit/nbdd_2eservice"
JOB = "/org/freedesktop/systemd1/job/77"
SYSTEMD = "org.freedesktop.systemd1"


@pytest.fixture
def bus() -> Iterator[BusDaemon]:
    with private_bus() as daemon:
        yield daemon


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
async def test_systemd_knows_whether_this_is_a_stop_or_a_restart(bus: BusDaemon, job: str, told: str) -> None:
    async with caller(bus.address) as ours, caller(bus.address) as fake:
        await fake_systemd(fake, job)
        assert await job_type(ours.bus) == told


async def test_a_systemd_that_is_not_there_or_does_not_answer_is_not_waited_for(
    bus: BusDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd1, "_ASK_DEADLINE", 0.01)
    async with caller(bus.address) as ours, caller(bus.address) as fake:
        assert await job_type(ours.bus) == ""
        await fake_systemd(fake, "stop", silent=True)
        assert await job_type(ours.bus) == ""


async def test_the_question_ends_with_the_bus(bus: BusDaemon) -> None:
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


async def test_the_way_down_is_noticed_when_it_begins_and_when_it_has_begun(bus: BusDaemon) -> None:
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


async def test_nobody_but_systemd_can_make_nbdd_believe_that_the_machine_goes_down(bus: BusDaemon) -> None:
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


async def test_without_systemd_no_machine_goes_down(bus: BusDaemon) -> None:
    async with caller(bus.address) as ours:
        assert not await is_going_down(ours.bus)
        waiting = asyncio.create_task(shutdown(ours.bus))
        assert await asyncio.wait({waiting}, timeout=0.2) == (set(), {waiting})
        waiting.cancel()
