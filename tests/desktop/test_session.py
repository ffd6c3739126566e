# SPDX-License-Identifier: MIT
"""What a person sees and presses, on a screen with a program that others wrote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.desktop.screen import Picture
from tests.desktop.session import BACK, BUSY, Session, lost

TOOLS = ("Xvfb", "dunst", "dbus-daemon")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}: make desktop-tools, as root"
)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with Session(tmp_path) as session:
        yield session


def lines(picture: Picture) -> int:
    """How many rows of the picture have something in them."""
    return sum(len(set(row)) > 1 for row in picture.rows)


def test_screen_shows_a_disk_in_trouble_until_it_is_well(session: Session) -> None:
    empty = session.screen.picture()
    assert empty.colours == 1
    session.nbdd.change("photos", **lost())
    first = session.picture("Photos has lost its server")
    assert session.dunst.shown[-1].urgency == "NORMAL"
    session.nbdd.change("photos", **lost(30))
    session.dunst.wait_for("Photos is about to fail")
    # In the same place, and not below the one before.
    second = session.screen.wait_until(lambda picture: picture.colours > 10 and picture != first)
    assert session.dunst.shown[-1].urgency == "CRITICAL"
    assert abs(lines(second) - lines(first)) < 40
    session.nbdd.change("photos", **BACK)
    session.dunst.wait_for("Photos is back")
    session.nbdd.remove("photos")


def test_screen_is_empty_when_the_disk_is_gone(session: Session) -> None:
    session.nbdd.change("photos", **lost())
    session.picture("Photos has lost its server")
    session.nbdd.remove("photos")
    session.screen.wait_until(lambda picture: picture.colours == 1)


def test_button_detaches_and_a_disk_in_use_asks_again(session: Session) -> None:
    session.nbdd.errors["Detach"] = BUSY
    session.nbdd.change("photos", **lost())
    session.picture("Photos has lost its server")
    session.dunst.press()
    assert session.nbdd.wait_for("Detach").body == ["photos", {}]
    session.picture("Photos was not detached")
    assert "/media/eve/Photos" in session.dunst.shown[-1].body
    del session.nbdd.errors["Detach"]
    session.nbdd.calls.clear()
    session.dunst.press()
    _, options = session.nbdd.wait_for("Detach").body
    assert options["force"].value is True


def test_dunst_that_died_is_followed_by_one_that_shows_the_same(session: Session) -> None:
    session.nbdd.change("photos", **lost())
    session.picture("Photos has lost its server")
    session.renew()
    session.picture("Photos has lost its server")


def test_link_that_is_bad_is_a_sentence_on_the_screen(session: Session) -> None:
    assert session.click("nbd://eve:secret@storage.example/photos") == 1
    session.picture("The network disk can't be opened")
    assert "a password must not be in a URI" in session.dunst.shown[-1].body
    assert "secret" not in session.dunst.shown[-1].body
