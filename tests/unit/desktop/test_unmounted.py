# SPDX-License-Identifier: MIT
"""nbdd-notify, beside its notifications: what the person attached and unmounts in the file manager is detached."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.desktop import FakeBlock, FakeNotificationServer, FakeUDisks
from tests.fakes.manager import DEADLINE, PRESENT, FakeManager

EVE = 1000


def notify(uid: int) -> list[str]:
    """The program, as a user runs it who is not the one that runs the tests."""
    run = f"import os, sys; from nbdd.desktop.notifier import main; os.geteuid = lambda: {uid}; sys.exit(main())"
    return [sys.executable, "-c", run]


OWN = PRESENT | {"Desktop": True, "AttachedBy": EVE}


class Detacher(FakeManager):
    """Detaches as nbdd does: the device is gone, or detached."""

    def _answer(self, call: Any) -> Any:
        answer = super()._answer(call)
        if call.member == "Detach" and call.member not in self.errors:
            self.devices.pop(call.body[0], None)
        return answer


@dataclass
class World:
    """A session with one disk, "photos", that this person attached and mounted."""

    nbdd: Detacher
    udisks: FakeUDisks
    server: FakeNotificationServer
    disk: FakeBlock
    runtime: Path
    process: subprocess.Popen[str]
    environment: dict[str, str]

    @property
    def detached(self) -> list[str]:
        return [call.body[0] for call in self.nbdd.calls if call.member == "Detach"]

    def end(self) -> str:
        """End the program when it has done what it had to do, and return what it wrote."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=DEADLINE)[1]

    def look(self, act: Callable[[], object]) -> None:
        """Do something, and return when the program has looked at the mounts since."""
        before = self.looks
        act()
        with self.udisks.called:
            assert self.udisks.called.wait_for(lambda: self.looks > before, DEADLINE)

    @property
    def looks(self) -> int:
        return sum(call.member == "GetManagedObjects" for call in self.udisks.calls)


@pytest.fixture
def world(buses: tuple[str, str], tmp_path: Path) -> Iterator[World]:
    system, session = buses
    environment = os.environ | {
        "DBUS_SYSTEM_BUS_ADDRESS": system, "DBUS_SESSION_BUS_ADDRESS": session, "XDG_RUNTIME_DIR": str(tmp_path),
    }  # fmt: skip
    with Detacher(system) as nbdd, FakeUDisks(system) as udisks, FakeNotificationServer(session) as server:
        nbdd.devices["photos"] = OWN | {"Name": "photos"}
        disk = FakeBlock("/dev/nbd0", mount_points=["/media/eve/photos"])
        udisks.know(disk)
        with subprocess.Popen(notify(EVE), stderr=-1, text=True, env=environment) as process:
            udisks.wait_for("GetManagedObjects")
            try:
                yield World(nbdd, udisks, server, disk, tmp_path, process, environment)
            finally:
                process.kill()


def test_unmount_detaches_what_this_user_attached_and_shows_it(world: World) -> None:
    world.udisks.unmount(world.disk)
    assert world.server.wait_for_summary("photos is detached").hints["transient"]
    assert world.detached == ["photos"]
    assert "photos was unmounted, and is detached" in world.end()


def test_unmount_detaches_only_after_the_last_filesystem(world: World) -> None:
    part = FakeBlock("/dev/nbd0p1", table="/dev/nbd0", mount_points=["/media/eve/a", "/mnt"])
    world.udisks.know(part)
    for block in (world.disk, part):
        world.look(lambda block=block: world.udisks.unmount(block))  # type: ignore[misc]
        assert world.detached == []
    world.udisks.unmount(part)
    world.server.wait_for_summary("photos is detached")


@pytest.mark.parametrize(
    "whose", [{"AttachedBy": EVE + 1}, {"Desktop": False}], ids=["another's", "no disk of the desktop"]
)
def test_unmount_of_other_disks_does_not_detach(world: World, whose: dict[str, Any]) -> None:
    other = FakeBlock("/dev/nbd1", mount_points=["/media/eve/other"])
    world.nbdd.devices["other"] = OWN | whose | {"Name": "other", "Node": "/dev/nbd1"}
    world.udisks.know(other)
    world.udisks.unmount(other)
    world.udisks.unmount(world.disk)
    world.server.wait_for_summary("photos is detached")
    assert world.detached == ["photos"]


def test_unmount_needs_a_mount_before(world: World) -> None:
    world.nbdd.devices["new"] = OWN | {"Name": "new", "Node": "/dev/nbd1"}
    world.udisks.know(FakeBlock("/dev/nbd1"))
    world.udisks.unmount(world.disk)
    world.server.wait_for_summary("photos is detached")
    assert world.detached == ["photos"]


def test_unmount_followed_by_a_mount_does_not_detach(world: World) -> None:
    lock = os.open(world.runtime / "nbdd-open.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as nbdd-open has it, which is at work
    world.look(lambda: world.udisks.unmount(world.disk))
    world.disk.mount_points.append("/media/eve/photos")
    world.look(lambda: os.close(lock))
    # It is still looked after.
    world.look(lambda: world.udisks.tell_mounts(world.disk))
    world.udisks.unmount(world.disk)
    world.server.wait_for_summary("photos is detached")
    assert world.detached == ["photos"]


def test_unmount_of_a_disk_in_use_keeps_it_and_logs_that(world: World) -> None:
    world.nbdd.errors["Detach"] = ("org.nbdd1.Error.Busy", "/dev/nbd0 is opened by dd (PID 7).")
    world.udisks.unmount(world.disk)
    world.nbdd.wait_for("Detach")
    del world.nbdd.errors["Detach"]
    world.disk.mount_points.append("/media/eve/photos")
    world.look(lambda: world.udisks.tell_mounts(world.disk))
    world.udisks.unmount(world.disk)
    world.server.wait_for_summary("photos is detached")
    told = world.end()
    assert "photos was unmounted, and stays attached: /dev/nbd0 is opened by dd (PID 7)." in told


def test_unmount_asks_for_no_password_and_starts_nothing(world: World) -> None:
    world.udisks.unmount(world.disk)
    world.server.wait_for_summary("photos is detached")
    no_autostart = 2
    assert {int(call.flags) for call in world.nbdd.calls} == {no_autostart}
    assert not any(call.member == "Unmount" for call in world.udisks.calls)


def test_unmount_by_root_detaches_nothing_as_the_configuration_attaches_as_root_too(world: World) -> None:
    world.end()
    world.nbdd.devices["photos"] |= {"AttachedBy": 0, "State": "failed"}
    before = world.looks
    with subprocess.Popen(notify(0), stderr=subprocess.PIPE, text=True, env=world.environment) as process:
        # Said of all that there is when it starts, and only then would mounts be looked at.
        world.server.wait_for_summary("photos has failed")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE)
    assert world.looks == before
