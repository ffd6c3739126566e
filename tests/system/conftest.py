# SPDX-License-Identifier: MIT
"""`lab`: the shared guest, clean before and checked after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guest import Guest
from tests.system.lab import Lab
from tests.system.seat import RULES_FILE, Seat, to_front


@pytest.fixture
def lab(guest: Guest) -> Iterator[Lab]:
    """A guest with a running nbdd that has nothing to do; what the test leaves is undone, and checked for harm."""
    lab = Lab(guest)
    lab.mark()
    yield lab
    lab.cleanup()


@pytest.fixture
def seat(lab: Lab) -> Iterator[Seat]:
    lab.guest.run("systemctl start udisks2 polkit")
    made = Seat(lab)
    told = made.run("loginctl show-session $XDG_SESSION_ID -p Active -p Remote -p Seat")
    assert set(told.stdout.split()) == {"Active=yes", "Remote=no", "Seat=seat0"}
    yield made
    lab.guest.run(
        f"rm -f {RULES_FILE}; for m in $(findmnt -rno SOURCE,TARGET | awk '/nbd/{{print $2}}'); do umount $m; done;"
        f"gpasswd -d visitor disks; groupdel disks; {to_front(1)}; systemctl stop udisks2",
        check=False,
    )
