# SPDX-License-Identifier: MIT
"""A person without root at the machine, and polkit's prompt: given a password, a wrong one, none, or nobody to ask."""

from __future__ import annotations

import pytest

from tests.system.lab import Lab, Server
from tests.system.seat import PASSWORD, Seat

QUESTION = "Authentication is required to {} the network disk photos."
ASKED = "Password: "

pytestmark = pytest.mark.quick_on("debian13")


@pytest.fixture
def photos(lab: Lab) -> Server:
    """A disk that is defined, not attached, and has a filesystem that the person may write to."""
    lab.guest.run(
        "truncate -s 64M /root/photos.img;"
        "mkfs.ext4 -qF -L PHOTOS -E root_owner=$(id -u visitor):$(id -g visitor) /root/photos.img"
    )
    server = lab.nbdkit("file /root/photos.img")
    lab.define(f"devices:\n  photos:\n    uri: {server.uri}\n    desktop: {{name: Photos}}\n")
    return server


@pytest.mark.usefixtures("photos")
def test_prompt_lets_a_disk_be_attached_mounted_written_to_unmounted_and_detached_without_root(
    lab: Lab, seat: Seat
) -> None:
    seat.know_password()
    attached = seat.type("nbdctl attach photos", (ASKED, PASSWORD + "\n"))
    assert attached.returncode == 0, attached.stdout
    assert QUESTION.format("attach") in attached.stdout
    # The prompt stood alone: how long it takes is told when nbdd has begun.
    assert " for " not in attached.stdout.partition("AUTHENTICATION COMPLETE")[0]
    assert "photos is /dev/nbd0" in attached.stdout
    seat.run(
        "disk=$(readlink -f /dev/disk/by-nbd/photos) && udisksctl mount -b $disk && "
        "echo hello >/media/visitor/PHOTOS/greeting && udisksctl unmount -b $disk"
    )
    # Who attached it is not asked again.
    assert seat.run("nbdctl detach photos").stdout == "photos is detached\n"
    assert (lab.device("photos")["State"], lab.bound()) == ("detached", [])
    assert lab.guest.run("debugfs -R 'cat greeting' /root/photos.img 2>/dev/null").stdout == "hello\n"


@pytest.mark.usefixtures("photos")
def test_prompt_lets_a_disk_be_detached_that_somebody_else_attached(lab: Lab, seat: Seat) -> None:
    seat.know_password()
    lab.attach("photos")
    assert seat.run("nbdctl detach photos </dev/null", check=False).returncode == 1
    detached = seat.type("nbdctl detach photos", (ASKED, PASSWORD + "\n"))
    assert detached.returncode == 0, detached.stdout
    assert QUESTION.format("detach") in detached.stdout
    assert (lab.device("photos")["State"], lab.bound()) == ("detached", [])


@pytest.mark.usefixtures("photos")
def test_prompt_without_a_right_password_says_why_and_does_nothing(lab: Lab, seat: Seat) -> None:
    seat.know_password()
    wrong = seat.type("nbdctl attach photos", (ASKED, "wrong\n"))
    assert wrong.returncode == 1
    assert "nbdctl: You are not allowed to do this (org.nbdd1.attach)" in wrong.stdout, wrong.stdout
    left = seat.type("nbdctl attach photos", (ASKED, "\x03"))
    assert left.returncode == 130, left.stdout
    assert "nbdctl:" not in left.stdout, "nobody goes on attaching what nobody allowed"
    cancelled = seat.with_cancelling_agent("cancels", "nbdctl attach photos")
    assert cancelled.stdout.splitlines()[-1] == QUESTION.format("attach")
    assert (cancelled.returncode, cancelled.stderr) == (
        1, "nbdctl: Nothing was done: the question for a password was cancelled (org.nbdd1.attach).\n"
    )  # fmt: skip
    withdrawn = seat.with_cancelling_agent("thinks", "nbdctl attach photos")
    assert (withdrawn.returncode, withdrawn.stdout.splitlines()[-1:]) == (130, [QUESTION.format("attach")]), withdrawn
    unasked = seat.run("nbdctl attach photos </dev/null", check=False)
    assert unasked.returncode == 1
    assert "nothing here can ask for it (no polkit agent runs for this session); run it as root.\n" in unasked.stderr
    # As over ssh, where no session is at the machine.
    far = lab.guest.run("nbdctl attach photos </dev/null", user="visitor", check=False)
    assert (far.returncode, far.stderr) == (
        1, "nbdctl: You are not allowed to do this (org.nbdd1.attach); run it as root, or ask an administrator.\n"
    )  # fmt: skip
    assert (lab.device("photos")["State"], lab.bound()) == ("detached", [])
    assert lab.guest.run("pgrep -c pkttyagent || :").stdout == "0\n", "an agent was left behind"
