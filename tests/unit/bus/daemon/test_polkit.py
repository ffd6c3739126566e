# SPDX-License-Identifier: MIT
"""Who may do what: root always, everyone else as polkit says, and nobody because polkit was away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nbdd.bus.daemon import polkit
from nbdd.bus.daemon.polkit import Polkit
from nbdd.bus.daemon.service import Caller as Asker
from nbdd.bus.wire.calls import DBUS, Peer
from nbdd.errors import AccessDenied, InteractiveAuthorizationRequired
from tests.fakes.bus import ERROR, BusDaemon, Caller, FakePolkit, caller

# isort: split
from dbus_next.message import Message
from dbus_next.signature import Variant

ACTION = "org.nbdd1.attach"
DETAILS = {"device": "backup"}
ASKED = "CheckAuthorization"
NOBODY = 65534


class World:
    """polkitd, whom it answers, and the authority under test."""

    def __init__(self, stranger: Caller, ours: Caller, uids: dict[str, int]) -> None:
        self.polkit = FakePolkit()
        self.stranger = stranger
        self.authority = Polkit(ours.bus)
        self.uids = uids
        """The user behind each connection, as the bus would tell it."""

    async def check(self, *, interactive: bool = False) -> None:
        await self.authority.check(Asker(self.stranger.name, interactive), ACTION, DETAILS)


@asynccontextmanager
async def world(bus: BusDaemon, monkeypatch: pytest.MonkeyPatch, uid: int = NOBODY) -> AsyncIterator[World]:
    """Tests run as root or not, so who is behind a connection is said by a fake, in the bus's own words."""
    monkeypatch.setattr(polkit, "DBUS", Peer("org.example.Bus", DBUS.path, DBUS.interface))
    async with caller(bus.address) as stranger, caller(bus.address) as ours, caller(bus.address) as fakes:
        made = World(stranger, ours, {stranger.name: uid})

        def answer(call: Message) -> Message | None:
            if call.interface != DBUS.interface:
                return None
            assert (call.path, call.member, call.signature) == (DBUS.path, "GetConnectionUnixUser", "s")
            if call.body[0] not in made.uids:
                return Message.new_error(call, f"{ERROR}NameHasNoOwner", "Could not get UID of name")
            return Message.new_method_return(call, "u", [made.uids[call.body[0]]])

        async with caller(bus.address) as daemon:
            daemon.serve(answer)
            await daemon.own("org.example.Bus")
            await made.polkit.start(fakes)
            yield made


async def test_polkit_is_not_asked_about_root(bus: BusDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(bus, monkeypatch, uid=0) as here:
        here.polkit.authorized = False
        await here.check()
        assert here.polkit.asked == []


async def test_polkit_may_be_missing_for_root(bus: BusDaemon) -> None:
    """... and who root is, the bus itself says."""
    async with caller(bus.address) as stranger, caller(bus.address) as ours:
        check = Polkit(ours.bus).check(Asker(stranger.name, interactive=False), ACTION, DETAILS)
        if os.getuid() == 0:
            await check
        else:
            with pytest.raises(AccessDenied, match="only root may"):
                await check


async def test_polkit_subject_is_the_bus_name_and_never_a_process(
    bus: BusDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(bus, monkeypatch) as here:
        subject = ["system-bus-name", {"name": Variant("s", here.stranger.name)}]
        await here.check()
        await here.check(interactive=True)
        assert here.polkit.asked == [[subject, ACTION, DETAILS, 0, ""], [subject, ACTION, DETAILS, 1, ""]]


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize(("authorized", "challenge"), [(True, False), (True, True), (False, False), (False, True)])
async def test_polkit_answer_decides(
    bus: BusDaemon, monkeypatch: pytest.MonkeyPatch, *, interactive: bool, authorized: bool, challenge: bool
) -> None:
    async with world(bus, monkeypatch) as here:
        here.polkit.authorized, here.polkit.challenge = authorized, challenge
        if authorized:
            await here.check(interactive=interactive)
            return
        # A person who could be asked, and gave no password, was asked: that is a no.
        wanted = InteractiveAuthorizationRequired if challenge and not interactive else AccessDenied
        with pytest.raises(wanted, match=r"org\.nbdd1\.attach.*\.$") as caught:
            await here.check(interactive=interactive)
        assert type(caught.value) is wanted


@pytest.mark.parametrize(
    ("challenge", "dismissed", "words"),
    [
        (True, False, "no polkit agent runs for this session"),  # polkit: it could be asked for, but there is nobody
        (False, True, "the question for a password was cancelled"),
        (False, False, "You are not allowed to do this"),
    ],
)
async def test_polkit_refusal_says_why(
    bus: BusDaemon, monkeypatch: pytest.MonkeyPatch, *, challenge: bool, dismissed: bool, words: str
) -> None:
    async with world(bus, monkeypatch) as here:
        here.polkit.authorized, here.polkit.challenge, here.polkit.dismissed = False, challenge, dismissed
        with pytest.raises(AccessDenied, match=words):
            await here.check(interactive=True)


@pytest.mark.parametrize(
    "error",
    [
        ("org.freedesktop.PolicyKit1.Error.Failed", "Action org.nbdd1.attach is not registered"),
        (f"{ERROR}NoReply", "polkitd fell over"),
    ],
)
async def test_polkit_error_denies_with_the_reason_in_the_journal(
    bus: BusDaemon, monkeypatch: pytest.MonkeyPatch, error: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with world(bus, monkeypatch) as here:
        here.polkit.error = error
        with pytest.raises(AccessDenied, match=r"can't be asked about org\.nbdd1\.attach, so only root may"):
            await here.check()
    assert error[1] in caplog.text


async def test_polkit_missing_denies(bus: BusDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polkit, "_AUTHORITY", Peer("org.example.Absent", "/a", "org.example.Absent"))
    async with world(bus, monkeypatch) as here:
        with pytest.raises(AccessDenied, match="so only root may"):
            await here.check(interactive=True)


async def test_polkit_denies_a_caller_that_left_the_bus(bus: BusDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(bus, monkeypatch) as here:
        here.uids.clear()
        with pytest.raises(AccessDenied, match="left the bus"):
            await here.check()
        assert here.polkit.asked == []


async def test_polkit_that_dies_before_it_answers_denies(bus: BusDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        polkit, "_AUTHORITY", Peer("org.example.Dying", polkit._AUTHORITY.path, polkit._AUTHORITY.interface)
    )
    async with world(bus, monkeypatch) as here:
        async with caller(bus.address) as dying:
            asked = asyncio.Event()
            dying.serve(lambda _call: asked.set())
            await dying.own("org.example.Dying")
            check = asyncio.create_task(here.check(interactive=True))
            await asked.wait()
            assert not check.done()
        with pytest.raises(AccessDenied, match="so only root may"):
            await check


@pytest.mark.parametrize("answer", [("", []), ("s", ["yes"]), ("b", [True]), ("(bb)", [[True, True]])])
async def test_polkit_reply_of_wrong_types_denies(
    bus: BusDaemon, monkeypatch: pytest.MonkeyPatch, answer: tuple[str, list[Any]]
) -> None:
    async with world(bus, monkeypatch) as here:
        monkeypatch.setattr(polkit, "_AUTHORITY", Peer("org.example.Odd", "/a", "org.example.Odd"))
        async with caller(bus.address) as odd:
            odd.serve(lambda call: Message.new_method_return(call, *answer))
            await odd.own("org.example.Odd")
            with pytest.raises(AccessDenied, match="so only root may"):
                await here.check()
