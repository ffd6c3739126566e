# SPDX-License-Identifier: MIT
"""nbdd-notify, as a session runs it: between nbdd on one bus and whoever shows notifications on the other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.desktop import FakeNotificationServer, activatable
from tests.fakes.manager import ABSENT, DEADLINE, PRESENT, FakeManager, private_bus

NOTIFY = [sys.executable, "-c", "import sys; from nbdd.desktop.notifier import main; sys.exit(main())"]
NO_AUTOSTART = 2
PHOTOS = PRESENT | {"Desktop": True, "DisplayName": "Photos"}
BACK: dict[str, Any] = {"State": "attached", "LiveConnections": 1, "FailsAt": 0}
GONE: dict[str, Any] = {
    "State": "failed",
    "Node": "",
    "LiveConnections": 0,
    "FailsAt": 0,
    "LastError": ["org.x.Y", "It went."],
}
FAILED: dict[str, Any] = {
    "State": "failed",
    "LiveConnections": 0,
    "LastError": ["org.x.Y", "It was away for too long."],
}


def lost(left: float = 200.0, dead_timeout: int = 300) -> dict[str, Any]:
    """The properties of a device without links whose I/O fails in so many seconds."""
    fails = int((time.time() + left) * 1e6)
    return {"State": "reconnecting", "LiveConnections": 0, "FailsAt": fails, "DeadTimeout": dead_timeout}


@pytest.fixture
def nbdd(buses: tuple[str, str]) -> Iterator[FakeManager]:
    with FakeManager(buses[0]) as manager:
        manager.devices["photos"] = PHOTOS | {"Name": "photos"}
        yield manager


@pytest.fixture
def server(buses: tuple[str, str]) -> Iterator[FakeNotificationServer]:
    with FakeNotificationServer(buses[1]) as server:
        yield server


class Notifier:
    """The running program."""

    def __init__(self, buses: tuple[str, str], *arguments: str) -> None:
        system, session = buses
        environment = os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": system, "DBUS_SESSION_BUS_ADDRESS": session}
        self.process = subprocess.Popen([*NOTIFY, *arguments], stderr=subprocess.PIPE, text=True, env=environment)

    def end(self) -> tuple[int, str]:
        """Ask it to end; its status and what it wrote."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, told = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, told


@contextlib.contextmanager
def notifier(buses: tuple[str, str], *arguments: str) -> Iterator[Notifier]:
    running = Notifier(buses, *arguments)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


@pytest.fixture
def running(buses: tuple[str, str], nbdd: FakeManager, server: FakeNotificationServer) -> Iterator[Notifier]:  # noqa: ARG001
    """The program, when it has asked nbdd for its devices."""
    with notifier(buses) as program:
        nbdd.wait_for("GetManagedObjects")
        yield program


def test_notifier_shows_a_lost_server_and_its_return_in_the_same_place(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **lost())
    first = server.wait_for_summary("Photos has lost its server")
    assert first.hints == {"urgency": 1, "category": "network.disconnected", "desktop-entry": "org.nbdd1.open"}
    assert (first.icon, first.actions, first.timeout) == ("network-offline", ["detach", "Detach"], 0)
    nbdd.change("photos", **BACK)
    then = server.wait_for_summary("Photos is back")
    assert (then.number, then.replaced) == (first.number, True)
    assert (then.hints["transient"], then.timeout) == (True, -1)
    assert running.end()[0] == 0


def test_notifier_does_not_show_a_blip(running: Notifier, nbdd: FakeManager, server: FakeNotificationServer) -> None:
    nbdd.add("other", PHOTOS | {"DisplayName": "Other"})
    nbdd.change("photos", **lost(299.9))
    nbdd.change("photos", **BACK)
    nbdd.change("other", **lost())
    server.wait_for_summary("Other has lost")
    assert running.end()[0] == 0
    assert server.history.summaries == ["Other has lost its server"]


def test_notifier_shows_failing_by_the_clock_alone(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **lost(61.5))
    first = server.wait_for_summary("has lost")
    then = server.wait_for_summary("Photos is about to fail")
    assert (then.number, then.hints["urgency"], then.icon) == (first.number, 2, "dialog-warning")
    nbdd.change("photos", **FAILED)
    last = server.wait_for_summary("Photos has failed")
    assert (last.number, last.hints["urgency"]) == (first.number, 2)
    assert "It was away for too long." in last.body
    assert running.process.poll() is None


def test_notifier_shows_a_loss_when_it_has_lasted(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    before = time.monotonic()
    nbdd.change("photos", **lost(296.5))  # 3.5 s of 5 are over
    server.wait_for_summary("has lost")
    assert time.monotonic() - before > 1
    assert running.process.poll() is None


def test_notifier_shows_a_device_without_the_key_desktop_only_with_all(
    buses: tuple[str, str], nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.devices["server"] = PRESENT | {"Name": "server"} | lost()
    nbdd.devices["photos"] |= lost()
    with notifier(buses) as program:
        server.wait_for_summary("Photos has lost")
        program.end()
    assert server.history.summaries == ["Photos has lost its server"]
    with notifier(buses, "--all"):
        server.wait_for_summary("server has lost")


def test_notifier_closes_what_is_no_longer_true(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **lost())
    server.wait_for_summary("has lost")
    nbdd.change("photos", State="detaching")
    nbdd.change("photos", **{key: ABSENT[key] for key in ("State", "Node", "LiveConnections", "FailsAt")})
    server.wait_until(lambda history: not history.open)
    nbdd.add("link", PHOTOS | {"Configured": False} | lost())
    server.wait_for_summary("has lost")
    nbdd.remove("link")
    server.wait_until(lambda history: not history.open)
    assert running.process.poll() is None


def test_notifier_keeps_closed_what_the_user_closed_until_it_is_worse(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **lost())
    server.dismiss(server.wait_for_summary("has lost").number)
    nbdd.change("photos", LastError=["org.x.Y", "Refused."])
    nbdd.change("photos", FailsAt=lost(100)["FailsAt"])
    nbdd.change("photos", **FAILED)
    last = server.wait_for_summary("has failed")
    assert not last.replaced
    assert server.history.summaries == ["Photos has lost its server", "Photos has failed"]
    assert running.process.poll() is None


def test_notifier_keeps_what_is_shown_over_a_restart_of_nbdd_and_shows_what_is_new(
    buses: tuple[str, str], server: FakeNotificationServer
) -> None:
    with contextlib.ExitStack() as stack:
        with FakeManager(buses[0]) as first:
            first.devices["photos"] = PHOTOS | {"Name": "photos"} | lost()
            first.devices["music"] = PHOTOS | {"Name": "music", "DisplayName": "Music"} | lost()
            first.devices["films"] = PHOTOS | {"Name": "films", "DisplayName": "Films"} | lost()
            running = stack.enter_context(notifier(buses))
            server.wait_until(lambda history: len(history.open) == 3)
        second = FakeManager(buses[0])
        second.devices["photos"] = first.devices["photos"]
        second.devices["music"] = PHOTOS | {"Name": "music", "DisplayName": "Music"}
        stack.enter_context(second)
        server.wait_for_summary("Music is back")
        server.wait_until(lambda history: len(history.open) == 2)
        assert sorted(server.history.visible) == ["Music is back", "Photos has lost its server"]
        assert len(server.history.all) == 4
        assert running.process.poll() is None


def test_notifier_never_starts_nbdd(buses: tuple[str, str], nbdd: FakeManager, server: FakeNotificationServer) -> None:
    nbdd.devices["photos"] |= lost()
    with notifier(buses) as program:
        server.wait_for_summary("has lost")
        assert program.end()[0] == 0
    assert {call.flags for call in nbdd.calls} == {NO_AUTOSTART}


def test_notifier_waits_for_an_nbdd_that_does_not_run(buses: tuple[str, str], server: FakeNotificationServer) -> None:
    with notifier(buses) as program:
        with FakeManager(buses[0]) as nbdd:
            nbdd.devices["photos"] = PHOTOS | {"Name": "photos"} | lost()
            server.wait_for_summary("has lost")
        assert program.process.poll() is None


def test_notification_server_that_is_new_gets_what_is_true_then(buses: tuple[str, str], nbdd: FakeManager) -> None:
    nbdd.devices["music"] = PHOTOS | {"Name": "music", "DisplayName": "Music"} | lost()
    nbdd.devices["films"] = PHOTOS | {"Name": "films", "DisplayName": "Films"} | lost()
    nbdd.devices["photos"] |= lost()
    with contextlib.ExitStack() as stack:
        with FakeNotificationServer(buses[1]) as first:
            program = stack.enter_context(notifier(buses))
            first.wait_until(lambda history: len(history.open) == 3)
            first.dismiss(first.wait_for_summary("Films").number)
            nbdd.change("music", **BACK)
            first.wait_for_summary("Music is back")
        second = stack.enter_context(FakeNotificationServer(buses[1], first=7))
        assert second.wait_for_summary("Photos has lost").number == 7
        nbdd.change("photos", **FAILED)
        second.wait_for_summary("Photos has failed")
        assert second.history.summaries == ["Photos has lost its server", "Photos has failed"]
        assert program.end()[0] == 0


def test_notification_server_that_comes_later_gets_what_was_not_shown(
    buses: tuple[str, str], nbdd: FakeManager
) -> None:
    nbdd.devices["photos"] |= lost()
    with notifier(buses) as program:
        assert program.process.stderr is not None
        assert "not shown: Photos has lost its server" in program.process.stderr.readline()
        with FakeNotificationServer(buses[1]) as server:
            server.wait_for_summary("Photos has lost")


def test_notification_server_that_the_bus_starts_shows_it_once(
    buses: tuple[str, str], nbdd: FakeManager, tmp_path: Path
) -> None:
    with private_bus(tmp_path) as (session, _):
        log = tmp_path / "shown"
        activatable(session, log)
        nbdd.devices["photos"] |= lost()
        with notifier((buses[0], session)) as program:
            wait_for_line(log, "Photos has lost its server")
            nbdd.change("photos", **FAILED)
            wait_for_line(log, "Photos has failed")
            assert program.end()[0] == 0
        assert log.read_text().splitlines() == ["Photos has lost its server", "Photos has failed"]


def wait_for_line(path: Path, line: str) -> None:
    """Return when another process has written the line."""
    end = time.monotonic() + DEADLINE
    while not path.exists() or line not in path.read_text().splitlines():
        assert time.monotonic() < end, f"no {line!r}"
        time.sleep(0.02)


def test_notification_server_that_refuses_does_not_end_the_notifier(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    server.errors["Notify"] = ("org.freedesktop.DBus.Error.LimitsExceeded", "Too many")
    nbdd.change("photos", **lost())
    server.wait_for("Notify")
    assert running.process.stderr is not None
    assert "Too many" in running.process.stderr.readline()
    del server.errors["Notify"]
    nbdd.change("photos", **FAILED)
    server.wait_for_summary("has failed")


def test_action_detach_detaches_and_the_rest_follows_from_the_device(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **lost())
    server.invoke(server.wait_for_summary("has lost").number, "detach")
    call = nbdd.wait_for("Detach")
    assert call.body == ["photos", {}]
    assert int(call.flags) == 4  # ALLOW_INTERACTIVE_AUTHORIZATION: polkit may ask for a password
    assert running.process.poll() is None


def test_action_detach_of_a_disk_in_use_must_be_given_twice(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.errors["Detach"] = ("org.nbdd1.Error.Busy", "'photos' is in use: it is mounted at /media/eve/<Photos>.")
    nbdd.change("photos", **lost())
    server.invoke(server.wait_for_summary("has lost").number, "detach")
    busy = server.wait_for_summary("Photos was not detached")
    assert "/media/eve/&lt;Photos&gt;." in busy.body
    assert busy.actions == ["detach-anyway", "Detach anyway"]
    del nbdd.errors["Detach"]
    nbdd.calls.clear()
    server.invoke(busy.number, "detach-anyway", close=False)
    name, options = nbdd.wait_for("Detach").body
    assert (name, {key: (value.signature, value.value) for key, value in options.items()}) == (
        "photos",
        {"force": ("b", True)},
    )
    assert running.process.poll() is None


def test_notifier_closing_what_is_being_replaced_does_not_close_the_replacement(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **lost())
    server.wait_for_summary("has lost")
    server.dismisses_what_is_replaced = True
    nbdd.change("photos", **GONE)
    gone = server.wait_for_summary("Photos is gone")
    nbdd.change("photos", **PHOTOS | {"Name": "photos"})
    assert server.wait_for_summary("Photos is back").number == gone.number
    assert server.history.visible == ["Photos is back"]
    assert running.process.poll() is None


def test_notifier_closes_a_refusal_when_the_trouble_ends(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.errors["Detach"] = ("org.freedesktop.DBus.Error.AccessDenied", "You are not allowed to do this.")
    nbdd.change("photos", **lost())
    server.invoke(server.wait_for_summary("has lost").number, "detach")
    refused = server.wait_for_summary("Photos was not detached")
    assert refused.actions == ["detach", "Detach"]
    nbdd.change("photos", **BACK)
    assert server.wait_for_summary("Photos is back").number == refused.number
    assert running.process.poll() is None


def test_action_attach_attaches_a_device_that_is_gone(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **GONE)
    gone = server.wait_for_summary("Photos is gone")
    assert "It went." in gone.body
    server.invoke(gone.number, "attach")
    assert nbdd.wait_for("Attach").body == ["photos", {}]
    nbdd.change("photos", **PHOTOS | {"Name": "photos"})
    assert "look what is missing" in server.wait_for_summary("Photos is back").body
    assert running.process.poll() is None


def test_action_signals_of_strangers_are_ignored(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer, buses: tuple[str, str]
) -> None:
    nbdd.change("photos", **lost())
    number = server.wait_for_summary("has lost").number
    with FakeManagerElsewhere(buses[1]) as stranger:
        # To it alone, as it does not listen to what strangers broadcast.
        to = stranger.owner("org.nbdd1.Notify")
        member = "org.freedesktop.Notifications.ActionInvoked"
        stranger.signal("/org/freedesktop/Notifications", member, "us", [number, "detach"], to)
        stranger.connections()
    server.invoke(number, "no such action", close=False)
    nbdd.change("photos", **BACK)
    server.wait_for_summary("is back")
    assert not any(call.member == "Detach" for call in nbdd.calls)
    assert running.process.poll() is None


class FakeManagerElsewhere(FakeManager):
    NAME = "org.example.Stranger"


def test_notification_server_without_markup_and_buttons_gets_plain_text_and_none(
    buses: tuple[str, str], nbdd: FakeManager
) -> None:
    nbdd.devices["photos"] |= GONE | {"State": "reconnecting", "Node": "/dev/nbd0"} | lost()
    with FakeNotificationServer(buses[1], "body") as server, notifier(buses):
        assert server.wait_for_summary("has lost").actions == []
        nbdd.change("photos", **FAILED | {"LastError": ["org.x.Y", "a <b> & c"]})
        assert server.wait_for_summary("has failed").body.endswith("a <b> & c")


def test_notifier_that_is_the_second_in_a_session_ends(running: Notifier, buses: tuple[str, str]) -> None:
    with notifier(buses) as second:
        assert second.wait() == (0, "another instance runs in this session already\n")
    assert running.process.poll() is None


def test_notifier_closes_its_notifications_at_its_end(
    running: Notifier, nbdd: FakeManager, server: FakeNotificationServer
) -> None:
    nbdd.change("photos", **lost())
    server.wait_for_summary("has lost")
    assert running.end()[0] == 0
    assert server.history.visible == []


@pytest.mark.parametrize("which", [0, 1])
def test_notifier_ends_with_a_sentence_when_a_bus_ends(tmp_path: Path, buses: tuple[str, str], which: int) -> None:
    with private_bus(tmp_path) as (address, daemon):
        chosen = (address, buses[1]) if which == 0 else (buses[0], address)
        with FakeNotificationServer(chosen[1]) as server, FakeManager(chosen[0]) as nbdd, notifier(chosen) as program:
            nbdd.devices["photos"] = PHOTOS | {"Name": "photos"}
            nbdd.wait_for("GetManagedObjects")
            daemon.kill()
            status, told = program.wait()
            assert status == 1
            assert told.splitlines()[-1].startswith("nbdd-notify: The ")
            assert "Traceback" not in told
            del server


def test_notifier_without_a_session_says_so(buses: tuple[str, str]) -> None:
    with notifier((buses[0], "unix:path=/nonexistent")) as program:
        status, told = program.wait()
        assert (status, told.count("\n")) == (1, 1)
        assert told.startswith("nbdd-notify: The session bus can't be reached")
