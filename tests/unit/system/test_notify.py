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

from nbdd.config.definition import NAME_PATTERN
from nbdd.system.notify import Notifier, _from_fdname, _to_fdname
from tests.fakes.bus import DEADLINE, NotifySocket


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


def test_notifier_sends_each_state_in_one_datagram(systemd: NotifySocket, notifier: Notifier) -> None:
    notifier.ready()
    notifier.stopping()
    assert [systemd.receive() for _ in range(3)] == [b"READY=1", b"STOPPING=1", None]


def test_notifier_sends_reloading_and_its_time_in_one_datagram(systemd: NotifySocket, notifier: Notifier) -> None:
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
def test_notifier_sends_status_as_one_line_of_ascii(
    systemd: NotifySocket, notifier: Notifier, text: str, told: bytes
) -> None:
    notifier.status(text)
    assert systemd.receive() == b"STATUS=" + told
    assert systemd.receive() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sdnotify forgets its socket
@pytest.mark.parametrize("path", [None, "", "/nonexistent/notify", "nonsense"])
async def test_notifier_without_systemd_does_nothing(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
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
    await notifier.watchdog()
    assert "NOTIFY_SOCKET" not in os.environ


def test_notifier_survives_end_of_systemd(systemd: NotifySocket, notifier: Notifier) -> None:
    systemd._sock.close()
    notifier.ready()
    notifier.keep_sockets("backup", [0])


@pytest.mark.usefixtures("systemd")
def test_notifier_removes_its_environment_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    notifier._notifier.socket.close()


# The watchdog


@pytest.mark.parametrize("pid", [None, "own"])
async def test_watchdog_is_notified_at_half_its_interval(
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
        await notifier.watchdog()
    assert waits == [15.0, 15.0, 15.0]
    assert [systemd.receive() for _ in range(4)] == [b"WATCHDOG=1"] * 3 + [None]
    notifier._notifier.socket.close()


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}]
)
async def test_watchdog_of_another_process_or_none_is_not_notified(
    environment: dict[str, str], systemd: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notifier = Notifier()
    await notifier.watchdog()
    assert systemd.receive() is None
    notifier._notifier.socket.close()


# The descriptor store


def test_descriptor_store_keeps_sockets_by_device_and_replaces_those_before(
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


def test_descriptor_store_drops_sockets_of_a_device(systemd: NotifySocket, notifier: Notifier) -> None:
    notifier.keep_sockets("backup", [])
    assert systemd.receive() == b"FDSTOREREMOVE=1\nFDNAME=backup"
    assert systemd.receive() is None


@settings(deadline=None)  # a busy machine is no fault of the code
@given(name=st.from_regex(NAME_PATTERN, fullmatch=True))
def test_descriptor_store_name_is_valid_and_reversible_for_every_device(name: str) -> None:
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


def test_kept_sockets_are_found_by_device_once_and_not_by_children() -> None:
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
def test_kept_sockets_of_another_process_or_wrong_count_are_not_taken(environment: dict[str, str]) -> None:
    assert kept(1, **environment) == [{}, [], {}, []]
