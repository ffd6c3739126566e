# SPDX-License-Identifier: MIT
"""Write docs/screenshots: what a person is told, as dunst shows it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.desktop.screen import Picture
from tests.desktop.session import BACK, BUSY, TREE, Session, lost

FOLDER = TREE / "docs" / "screenshots"


def main() -> None:
    """Show one thing after the other, and keep a picture of each."""
    with tempfile.TemporaryDirectory() as folder, Session(Path(folder)) as session:
        before = session.screen.picture()

        def keep(name: str, summary: str) -> None:
            nonlocal before
            last = before
            session.dunst.wait_for(summary)
            before = session.screen.wait_until(lambda picture: picture.colours > 10 and picture != last)
            _write(name, before)

        session.nbdd.change("photos", **lost())
        keep("lost", "Photos has lost its server")
        session.nbdd.errors["Detach"] = BUSY
        session.dunst.press()
        keep("in-use", "Photos was not detached")
        session.nbdd.change("photos", **lost(30))
        keep("failing", "Photos is about to fail")
        session.nbdd.change("photos", **BACK)
        keep("back", "Photos is back")
        session.renew()
        session.click("nbd://eve:secret@storage.example/photos")
        keep("bad-link", "The network disk can't be opened")


def _write(name: str, picture: Picture) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.png"
    path.write_bytes(picture.png())
    print(f"{path.relative_to(TREE)}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
