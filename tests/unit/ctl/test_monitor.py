# SPDX-License-Identifier: MIT
"""`nbdctl monitor`, on a private bus."""

from __future__ import annotations

import json
import signal
import time

from tests.fakes.manager import ABSENT, PRESENT, PRESENT_JSON, FakeManager
from tests.fakes.terminal import Watching

NO_AUTOSTART = 2


# monitor
def test_monitor_prints_a_line_for_each_event_until_it_is_interrupted(fake: FakeManager) -> None:
    with Watching(NO_COLOR="1") as terminal:
        fake.change("backup", State="degraded", Connections=2, LastError=["org.x.Y", "a\nb."])
        fake.change("backup", LastError=["", ""])
        fake.add("1st", ABSENT)
        fake.remove("1st")
        terminal.wait_for("1st: no configuration")
        fake.leave()
        terminal.wait_for("nbdd stopped")
        terminal.process.send_signal(signal.SIGINT)
        status, text = terminal.finish()
    assert status == 0
    assert [line[9:] for line in text.splitlines()[1:] if line[2:3] == ":"] == [
        "backup: a\\nb; 1 of 2 connections left; mending",
        "1st: new in the configuration: nbd://storage.example/backup, detached",
        "1st: no configuration defines it any more",
        "nbdd stopped; attached devices stay attached, but lost connections are not replaced now",
    ]


def test_monitor_as_json_prints_an_object_for_each_event(fake: FakeManager) -> None:
    with Watching("--json") as terminal:
        fake.change("backup", State="degraded", LastError=["org.x.Y", "a"])
        fake.add("1st", PRESENT)
        fake.remove("1st")
        terminal.wait_for('"removed"')
        terminal.process.send_signal(signal.SIGINT)
        status, text = terminal.finish()
    assert status == 0
    changed, added, removed = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert abs(changed.pop("time") / 1e6 - time.time()) < 60
    failure = {"name": "org.x.Y", "message": "a"}
    assert changed == {"event": "changed", "name": "backup", "changes": {"state": "degraded", "last-error": failure}}
    assert added["device"] == PRESENT_JSON | {"name": "1st", "display-name": "1st"}
    assert (removed["event"], removed["name"]) == ("removed", "1st")


def test_monitor_sees_the_service_come_and_does_not_start_it(address: str, no_service: None) -> None:  # noqa: ARG001
    with Watching() as terminal:
        assert "not running now" in terminal.text
        with FakeManager(address) as fake:
            fake.add("backup", ABSENT)
            terminal.wait_for("backup: new in")
        terminal.wait_for("nbdd stopped")
    assert "nbdd started" in terminal.text


def test_monitor_ignores_signals_of_strangers(address: str, fake: FakeManager) -> None:
    with Watching() as terminal, FakeManager(address) as liar:  # the name is taken, so this one only waits for it
        liar.devices["backup"] = dict(PRESENT)
        for connection in liar.connections():
            liar.change("backup", to=connection, State="failed")
            liar.signal("/org/freedesktop/DBus", "org.freedesktop.DBus.NameOwnerChanged", "sss",
                        ["org.nbdd1", "", liar.bus.unique_name], to=connection)  # fmt: skip
        liar.connections()  # now the bus has passed on all of it
        fake.change("backup", State="detaching")
        terminal.wait_for("backup: detaching")
    assert {call.flags for call in fake.calls} == {NO_AUTOSTART}
    assert "failed" not in terminal.text
    assert "started" not in terminal.text
