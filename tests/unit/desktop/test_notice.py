# SPDX-License-Identifier: MIT
"""When there is something to say about a device, and that it is said in words for a person."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from nbdd.bus.caller.device import DeviceView, Failure
from nbdd.desktop import notice
from nbdd.desktop.notice import GRACE, MAX_TEXT, WARNING, NoticeKind, Verdict, judge
from nbdd.desktop.notifications import Urgency

NOW = time.time()
PHOTOS = DeviceView(
    name="photos", node="/dev/nbd0", state="reconnecting", uri="nbd://storage.example/x", dead_timeout=300,
    desktop=True, display_name="Photos", configured=True,
)  # fmt: skip


def lost(ago: float, dead_timeout: int = 300) -> DeviceView:
    """A device that lost its last link so many seconds ago, as the service tells."""
    return replace(PHOTOS, fails_at=int((NOW - ago + dead_timeout) * 1e6), dead_timeout=dead_timeout)


def verdict(device: DeviceView, *, was_bound: bool = True) -> Verdict:
    return judge(device, now=NOW, lost_since=NOW, was_bound=was_bound)


def kind(device: DeviceView, *, was_bound: bool = True) -> NoticeKind | None:
    found = verdict(device, was_bound=was_bound)
    assert found.decided
    return found.notice.kind if found.notice is not None else None


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (lost(0.1), None),
        (lost(GRACE - 0.1), None),
        (lost(GRACE + 0.1), NoticeKind.LOST),
        (lost(300 - WARNING - 1), NoticeKind.LOST),
        (lost(300 - WARNING + 1), NoticeKind.FAILING),
        (lost(301), NoticeKind.FAILING),  # until the service says that it has failed
        (lost(9, dead_timeout=20), NoticeKind.LOST),
        (lost(11, dead_timeout=20), NoticeKind.FAILING),
        (lost(3, dead_timeout=4), None),
        (replace(lost(301), state="failed"), NoticeKind.FAILED),
        (replace(lost(0, dead_timeout=0), state="failed"), NoticeKind.FAILED),
        (replace(PHOTOS, state="attached"), None),
        (replace(PHOTOS, state="degraded"), None),
        (replace(PHOTOS, state="detached", node=""), None),
        (replace(PHOTOS, state="failed", node=""), NoticeKind.GONE),
        (replace(PHOTOS, state="connecting", node=""), NoticeKind.GONE),
    ],
)
def test_verdict_follows_the_properties(device: DeviceView, expected: NoticeKind | None) -> None:
    assert kind(device) == expected


def test_verdict_of_a_failed_attach_is_no_notice() -> None:
    assert kind(replace(PHOTOS, state="failed", node=""), was_bound=False) is None


@pytest.mark.parametrize(("state", "node"), [("connecting", "/dev/nbd0"), ("detaching", "/dev/nbd0"), ("unknown", "")])
def test_verdict_while_the_device_changes_is_undecided(state: str, node: str) -> None:
    assert not verdict(replace(PHOTOS, state=state, node=node)).decided


@pytest.mark.parametrize(
    ("device", "after"),
    [(lost(1), GRACE - 1), (lost(100), 300 - WARNING - 100), (lost(9, dead_timeout=20), 1), (lost(299), None)],
)
def test_verdict_names_the_time_when_the_clock_changes_it(device: DeviceView, after: float | None) -> None:
    look_at = verdict(device).look_at
    assert look_at == (None if after is None else pytest.approx(NOW + after, abs=0.01))
    if look_at is not None:
        changed = judge(device, now=look_at, lost_since=NOW, was_bound=True)
        assert changed.notice != verdict(device).notice


def test_verdict_without_fails_at_is_still_lost() -> None:
    assert judge(PHOTOS, now=NOW + GRACE - 0.1, lost_since=NOW, was_bound=True) == Verdict(look_at=NOW + GRACE)
    found = judge(PHOTOS, now=NOW + GRACE, lost_since=NOW, was_bound=True).notice
    assert found is not None
    assert found.kind is NoticeKind.LOST
    assert " until " not in found.notification.body


def test_notice_gives_the_end_of_the_waiting_as_a_time_of_day() -> None:
    device = lost(200)
    found = verdict(device).notice
    assert found is not None
    assert notice.clock(device.fails_at / 1e6) in found.notification.body
    assert "storage.example does not answer" in found.notification.body
    assert notice.clock(time.time() + 3 * 86400)[:6].endswith(" ")  # with its day, but without seconds


@pytest.mark.parametrize(
    ("device", "urgency", "actions"),
    [
        (lost(9), Urgency.NORMAL, ["detach"]),
        (lost(290), Urgency.CRITICAL, ["detach"]),
        (replace(PHOTOS, state="failed"), Urgency.CRITICAL, ["detach"]),
        (replace(PHOTOS, state="failed", node=""), Urgency.CRITICAL, ["attach"]),
        (replace(PHOTOS, state="failed", node="", configured=False), Urgency.CRITICAL, []),
        (replace(PHOTOS, state="connecting", node=""), Urgency.CRITICAL, []),
    ],
)
def test_notice_has_the_urgency_and_actions_that_help(device: DeviceView, urgency: Urgency, actions: list[str]) -> None:
    found = verdict(device).notice
    assert found is not None
    shown = found.notification
    assert (shown.urgency, [key for key, _ in shown.actions], shown.lasting) == (urgency, actions, True)
    assert shown.summary.startswith("Photos ")
    assert shown.body.endswith(".")


def test_notice_says_nothing_was_lost_only_if_that_is_so() -> None:
    attached = replace(PHOTOS, state="attached")
    assert "nothing was lost" in notice.back(attached, NoticeKind.LOST).notification.body
    assert "nothing was lost" in notice.back(attached, NoticeKind.FAILING).notification.body
    for before in (NoticeKind.FAILED, NoticeKind.GONE):
        assert "look what is missing" in notice.back(attached, before).notification.body
    assert not notice.back(attached, NoticeKind.LOST).notification.lasting


def test_notice_of_a_changed_export_waits_first_and_fails_later() -> None:
    device = replace(lost(100), state="failed")
    waiting = verdict(device)
    assert waiting.notice is not None
    assert waiting.notice.notification.body.startswith("Programs that use the disk wait, until ")
    assert waiting.look_at == pytest.approx(NOW + 200)
    failing = judge(device, now=NOW + 201, lost_since=NOW, was_bound=True)
    assert failing.notice is not None
    assert failing.notice.notification.body.startswith("Reading and writing fails until the server is back.")


def test_notice_shows_an_error_of_a_server_as_one_short_printable_line() -> None:
    failure = Failure("org.nbdd1.Error.NegotiationFailed", "no\n\x1b[2J" + "\u202eevil " * 100)
    found = verdict(replace(PHOTOS, state="failed", last_error=failure)).notice
    assert found is not None
    body = found.notification.body
    assert body.isprintable()
    assert len(body) < MAX_TEXT + 100
    assert body.endswith("…")


def test_notice_of_a_refusal_offers_what_is_left() -> None:
    busy = notice.refused(PHOTOS, notice.DETACH, "'photos' is in use: it is mounted at /mnt.", in_use=True).notification
    assert busy.actions == (("detach-anyway", "Detach anyway"),)
    assert "loses what was not written" in busy.body
    again = notice.refused(PHOTOS, notice.ATTACH, "No.", in_use=False).notification
    assert (again.summary, again.actions) == ("Photos was not attached", (("attach", "Attach again"),))
