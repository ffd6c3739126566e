# SPDX-License-Identifier: MIT
"""What `nbdctl monitor` tells people: sentences, each with what they want to know at that moment."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdd.bus.caller.client import EventKind, ManagerEvent
from nbdd.bus.caller.device import DeviceView, fields
from nbdd.ctl.events import EventFormatter
from tests.fakes.manager import ABSENT, PRESENT

LOST = ["org.nbdd1.Error.ConnectFailed", "A connection to nbd://one.example/ ended: the server closed it."]
REFUSED = ["org.nbdd1.Error.ConnectFailed", "Can't connect to one.example:10809: Connection refused."]
AT = 1_700_000_000_000_000


class Told:
    """The events of `backup`, and a clock that a test sets."""

    def __init__(self, **properties: Any) -> None:
        self.now = 100.0
        self.formatter = EventFormatter(
            [DeviceView.of(PRESENT | {"Name": "backup"} | properties)], clock=lambda: self.now
        )

    def change(self, after: float = 0.0, **changes: Any) -> str:
        self.now += after
        return self.formatter.format(ManagerEvent(EventKind.CHANGED, "backup", fields(changes))).removeprefix(
            "backup: "
        )


def test_events_of_a_server_that_goes_and_comes_back_are_two_sentences() -> None:
    told = Told()
    clock = time.strftime("%H:%M:%S", time.localtime(AT / 1e6))
    assert told.change(State="reconnecting", LiveConnections=0, LastError=LOST, FailsAt=AT) == (
        f"a connection to nbd://one.example/ ended: the server closed it; reconnecting, and I/O waits until {clock}"
    )
    assert told.change(3.2, State="attached", LiveConnections=1, Reconnects=1, FailsAt=0) == (
        "attached again after 3.2 s"
    )


def test_event_of_a_failed_attempt_has_its_reason() -> None:
    told = Told(State="reconnecting", LiveConnections=0)
    assert told.change(LastError=REFUSED) == "can't connect to one.example:10809: Connection refused; trying again"


def test_events_of_a_server_that_stays_away_end_in_failing_io_and_its_return() -> None:
    told = Told()
    told.change(State="reconnecting", LiveConnections=0, LastError=LOST)
    assert told.change(300, State="failed", LastError=["x.y", "No server came back within 300 s."]) == (
        "no server came back within 300 s; I/O fails until its server is back; reconnecting"
    )
    assert told.change(300, State="attached", LiveConnections=1) == "attached again after 10 min"


def test_event_of_io_that_waits_for_a_changed_export_does_not_say_failing() -> None:
    later = (int(time.time()) + 100) * 1_000_000
    told = Told().change(State="failed", LiveConnections=0, LastError=["x.y", "It has other data."], FailsAt=later)
    clock = time.strftime("%H:%M:%S", time.localtime(later / 1e6))
    assert told == f"it has other data; I/O waits until {clock}"


def test_events_of_an_attach_go_from_its_beginning_to_its_end() -> None:
    told = Told(**ABSENT | {"Name": "backup"})
    assert told.change(State="connecting") == "connecting to nbd://storage.example/backup"
    assert told.change(LastError=REFUSED) == "can't connect to one.example:10809: Connection refused; trying again"
    assert told.change(WorkerPID=12) == ""
    assert told.change(1.25, State="attached", Node="/dev/nbd3", Size=10 << 30, LiveConnections=1, LastError=["", ""],
                       AttachedSince=AT) == "attached as /dev/nbd3, 10 GiB, after 1.2 s"  # fmt: skip


def test_event_of_a_failed_attach_says_why_and_that_it_is_over() -> None:
    told = Told(**ABSENT | {"Name": "backup", "State": "connecting"})
    assert told.change(State="failed", LastError=REFUSED) == (
        "can't connect to one.example:10809: Connection refused; not attached, given up"
    )


def test_event_of_an_attach_that_a_detach_ends_is_no_detach() -> None:
    assert (
        Told(**ABSENT | {"Name": "backup", "State": "connecting"}).change(State="detached")
        == "the attach was cancelled"
    )


def test_event_of_a_detach_and_of_a_refused_one() -> None:
    told = Told()
    assert told.change(State="detaching") == "detaching"
    assert told.change(State="attached") == "not detached; it stays attached as /dev/nbd0"
    assert told.change(State="detaching") == "detaching"
    assert told.change(State="detached", Node="", Size=0) == "detached"


def test_event_of_one_lost_connection_of_several_counts_the_rest() -> None:
    told = Told(Connections=4, LiveConnections=4)
    assert told.change(State="degraded", LiveConnections=3, LastError=LOST) == (
        "a connection to nbd://one.example/ ended: the server closed it; 3 of 4 connections left; mending"
    )
    assert told.change(1, LiveConnections=2) == "2 of 4 connections now"
    assert told.change(1, State="attached", LiveConnections=4) == "all 4 connections are back after 2.0 s"


def test_events_of_connections_that_come_back_one_by_one() -> None:
    told = Told(Connections=2, LiveConnections=2)
    exchanged = told.change(State="reconnecting", LiveConnections=0)
    assert exchanged == "replacing all connections; reconnecting"
    assert told.change(1, State="degraded", LiveConnections=1) == "attached again on 1 of 2 connections after 1.0 s"
    assert told.change(1, State="attached", LiveConnections=2) == "all 2 connections are back after 2.0 s"


def test_event_of_an_adopted_device_without_connections_does_not_say_replaced() -> None:
    told = Told(State="connecting", LiveConnections=0)
    assert told.change(State="reconnecting") == "reconnecting"


def test_event_of_an_adopted_device_does_not_say_new() -> None:
    told = Told()
    assert told.formatter.format(ManagerEvent(EventKind.STOPPED)).startswith(
        "nbdd stopped; attached devices stay attached"
    )
    assert told.formatter.format(ManagerEvent(EventKind.STARTED)) == "nbdd started"
    again = PRESENT | {"Name": "backup", "State": "connecting"}
    assert (
        told.formatter.format(ManagerEvent(EventKind.ADDED, "backup", fields(again)))
        == "backup: adopting /dev/nbd0, left by the previous instance"
    )
    assert told.change(State="attached") == "adopted as /dev/nbd0"


def test_event_of_an_unknown_device_does_not_say_back() -> None:
    assert (
        EventFormatter().format(
            ManagerEvent(EventKind.CHANGED, "new", fields({"State": "attached", "Node": "/dev/nbd1"}))
        )
        == "new: attached"
    )


def test_event_of_a_replaced_worker() -> None:
    assert Told().change(WorkerPID=4712) == "a new worker runs, PID 4712"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"Timeout": 30}, "a request may take 30 s now"),
        ({"DeadTimeout": 9}, "without a connection I/O waits 9 s now"),
        ({"Size": 1 << 40}, "the size is 1 TiB now"),
        ({"ReadOnly": True}, "read-only now"),
        ({"Configured": False}, "no configuration defines it any more"),
        ({"URI": "nbd://two.example/"}, "the server is nbd://two.example/ now"),
        ({"Reconnects": 1}, "a lost connection was replaced"),
        ({"Connections": 2}, "2 connections are wanted now"),
        ({"LastError": ["", ""]}, ""),
        ({"AttachedSince": AT}, ""),
        ({"Colour": "red"}, ""),
        ({"Size": None}, ""),
    ],
)
def test_event_of_a_property_is_a_sentence_or_nothing(changes: dict[str, Any], sentence: str) -> None:
    assert Told().change(**changes) == sentence


def test_events_of_a_device_that_comes_and_goes() -> None:
    formatter = EventFormatter()
    made = ABSENT | {"Name": "copy", "Configured": False, "State": "connecting"}
    assert formatter.format(ManagerEvent(EventKind.ADDED, "copy", fields(made))) == (
        "copy: new, without a definition: nbd://storage.example/backup, connecting"
    )
    assert formatter.format(ManagerEvent(EventKind.REMOVED, "copy")) == "copy: gone, as it has no definition"
    assert formatter.state("copy") == ""


STATES = st.sampled_from(["detached", "connecting", "attached", "degraded", "reconnecting", "failed", "detaching", "?"])


@given(st.lists(st.tuples(STATES, st.text(max_size=9), st.integers(0, 9), st.booleans()), max_size=12))
def test_events_in_any_order_give_printable_lines(events: list[tuple[str, str, int, bool]]) -> None:
    formatter = EventFormatter()
    for state, text, number, added in events:
        changes = {"State": state, "LastError": [text, text], "LiveConnections": number, "Node": text, "URI": text}
        line = formatter.format(ManagerEvent(EventKind.ADDED if added else EventKind.CHANGED, text, fields(changes)))
        assert line.isprintable()
