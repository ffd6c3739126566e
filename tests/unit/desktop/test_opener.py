# SPDX-License-Identifier: MIT
"""nbdd-open: a click on a link is a folder or one sentence, and what was opened goes again."""

from __future__ import annotations

import contextlib
import html
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.desktop import UDISKS, FakeBlock, FakeFileManager, FakeNotificationServer, FakeUDisks
from tests.fakes.manager import DEADLINE, PRESENT, FakeManager

EVE = 1000
OPEN = [
    sys.executable,
    "-c",
    f"import os, sys; from nbdd.desktop.opener import main; os.geteuid = lambda: {EVE}; sys.exit(main())",
]
LINK = "nbd://storage.example/photos"
FOUND = PRESENT | {"URI": LINK, "Desktop": True, "Configured": False, "AttachedBy": EVE}
INTERACTIVE = 4


@dataclass
class World:
    """Everything that a click needs."""

    nbdd: FakeManager
    udisks: FakeUDisks
    server: FakeNotificationServer
    files: FakeFileManager
    environment: dict[str, str]

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """A click, or what a launcher starts: without a terminal."""
        return subprocess.Popen(
            [*OPEN, *arguments], stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True, env=self.environment, **more
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Status, output and errors of a click."""
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=DEADLINE)
        assert "Traceback" not in err
        return process.returncode, out, err

    def fails(self, *arguments: str) -> str:
        """The sentence of a click that fails, which is a notification as well."""
        status, out, err = self.run(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        sentence = err.removeprefix("nbdd-open: ").rstrip()
        shown = self.server.wait_for_summary("The network disk can't be")
        assert (shown.body, shown.icon) == (html.escape(sentence, quote=False), "dialog-error")
        assert sentence.endswith(".")
        return sentence

    def asked(self, fake: FakeManager, member: str) -> list[list[Any]]:
        return [call.body for call in fake.calls if call.member == member]


@pytest.fixture
def world(buses: tuple[str, str], tmp_path: Path) -> Iterator[World]:
    system, session = buses
    environment = os.environ | {
        "DBUS_SYSTEM_BUS_ADDRESS": system,
        "DBUS_SESSION_BUS_ADDRESS": session,
        "XDG_RUNTIME_DIR": str(tmp_path),
        "PATH": str(tmp_path),
    }
    with (
        FakeManager(system) as nbdd,
        FakeUDisks(system) as udisks,
        FakeNotificationServer(session) as server,
        FakeFileManager(session) as files,
    ):
        yield World(nbdd, udisks, server, files, environment)


def attached_by_link(world: World, *blocks: FakeBlock) -> None:
    """The export answers: nbdd makes a device of it, and UDisks gets to know what is on that."""

    def known() -> None:
        world.nbdd.wait_for("AttachURI")
        world.udisks.know(*(blocks or (FakeBlock("/dev/nbd0"),)))

    world.nbdd.replies["AttachURI"] = ("o", ["/org/nbdd1/device/photos"])
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos", "URI": "nbd://elsewhere.example/photos"}
    threading.Thread(target=known, daemon=True).start()


def test_link_becomes_a_folder_in_the_file_manager(world: World) -> None:
    attached_by_link(world)
    assert world.run(LINK) == (0, "/media/eve/nbd0\n", "")
    uri, options = world.nbdd.wait_for("AttachURI").body
    assert (uri, options["desktop"].signature, options["desktop"].value) == (LINK, "a{sv}", {})
    assert world.asked(world.files, "ShowFolders") == [[["file:///media/eve/nbd0"], ""]]
    # Each may ask for an administrator's password.
    assert int(world.nbdd.wait_for("AttachURI").flags) == INTERACTIVE
    assert int(world.udisks.wait_for("Mount").flags) == INTERACTIVE
    assert world.server.history.visible == []


def test_udisks_may_take_a_moment_to_know_the_disk(world: World) -> None:
    world.udisks.know(FakeBlock("/dev/nbd0", size=0, usage=""))
    attached_by_link(world, FakeBlock("/dev/nbd1", size=0, usage=""))
    process = world.start(LINK)
    world.udisks.wait_for("GetManagedObjects")
    world.udisks.blocks[0].size, world.udisks.blocks[0].usage = 1 << 30, "filesystem"
    world.udisks.know(FakeBlock("/dev/loop7"))
    out, _ = process.communicate(timeout=DEADLINE)
    assert out == "/media/eve/nbd0\n"


def test_mount_of_every_filesystem_shows_the_largest(world: World) -> None:
    parts = [FakeBlock(f"/dev/nbd0p{number}", size=size, table="/dev/nbd0") for number, size in enumerate((9, 99, 5))]
    hidden = FakeBlock("/dev/nbd0p7", ignored=True, table="/dev/nbd0")
    other = FakeBlock("/dev/nbd1p1", size=999, table="/dev/nbd1")
    attached_by_link(world, FakeBlock("/dev/nbd0", usage=""), *parts, hidden, other)
    assert world.run(LINK)[1] == "/media/eve/nbd0p1\n"
    assert [block.mount_points for block in parts] == [[f"/media/eve/nbd0p{number}"] for number in range(3)]
    assert hidden.mount_points == other.mount_points == []


@pytest.mark.parametrize("uri", [LINK, "NBD://Storage.Example:10809/photos"])
def test_link_to_an_attached_export_does_not_attach_it_twice(world: World, uri: str) -> None:
    world.nbdd.devices["backup"] = FOUND | {"Name": "backup"}
    world.udisks.know(FakeBlock("/dev/nbd0", mount_points=["/srv/photos"]))
    assert world.run(uri) == (0, "/srv/photos\n", "")
    assert world.asked(world.nbdd, "AttachURI") == world.asked(world.udisks, "Mount") == []


def test_link_to_a_defined_export_attaches_as_the_definition_says(world: World) -> None:
    idle = {"State": "detached", "Node": "", "Configured": True}
    world.nbdd.devices["backup"] = FOUND | {"Name": "backup"} | idle

    def come() -> None:
        world.nbdd.wait_for("Attach")
        world.nbdd.devices["backup"] |= {"State": "attached", "Node": "/dev/nbd0"}
        world.udisks.know(FakeBlock("/dev/nbd0"))
        world.nbdd.release("Attach")

    world.nbdd.held.add("Attach")
    helper = threading.Thread(target=come)
    helper.start()
    assert world.run(LINK)[:2] == (0, "/media/eve/nbd0\n")
    helper.join()
    assert world.asked(world.nbdd, "Attach") == [["backup", {}]]
    assert world.asked(world.nbdd, "AttachURI") == []


def test_link_clicked_twice_attaches_one_disk(world: World) -> None:
    world.nbdd.held.add("AttachURI")
    first = world.start(LINK)
    world.nbdd.wait_for("AttachURI")
    second = world.start(LINK)
    # It waits for the first when it, too, has the lock's file open.
    lock = Path(world.environment["XDG_RUNTIME_DIR"], "nbdd-open.lock")
    wait_until_open(second.pid, lock)
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos"}
    world.udisks.know(FakeBlock("/dev/nbd0"))
    world.nbdd.release("AttachURI")
    assert [process.communicate(timeout=DEADLINE)[0] for process in (first, second)] == ["/media/eve/nbd0\n"] * 2
    assert len(world.asked(world.nbdd, "AttachURI")) == 1


def wait_until_open(pid: int, file: Path) -> None:
    """Return when the process has the file open."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):  # a descriptor that was closed meanwhile
            if any(found.samefile(file) for found in Path(f"/proc/{pid}/fd").iterdir() if found.exists()):
                return
        time.sleep(0.01)  # nothing tells of this
    raise AssertionError(f"{file} is not opened")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("http://storage.example/x", "the scheme must be one of nbd, nbds"),
        ("nbd://eve:secret@storage.example/x", "a password must not be in a URI"),
        ("nbds://eve@storage.example/x", "A link must not name a user or a file with keys"),
        ("nbds://storage.example/x?tls-psk-file=/home/eve/.key", "A link must not name a user or a file with keys"),
        ("nbd://storage.example/%zz", "is not followed by two hexadecimal digits"),
        ("nbd://<b>&/", "must be written %3C"),
    ],
)
def test_link_that_is_bad_or_not_to_be_trusted_is_refused_unasked(world: World, uri: str, sentence: str) -> None:
    told = world.fails(uri)
    assert sentence in told
    assert "secret" not in told
    assert world.nbdd.calls == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (("org.nbdd1.Error.ConnectFailed", "storage.example:10809 refused the connection."), "refused the connection."),
        (("org.nbdd1.Error.TLSFailed", "TLS is not supported."), "TLS is not supported."),
        (("org.freedesktop.DBus.Error.AccessDenied", "You are not allowed to do this."), "You are not allowed"),
        (("org.x.Y", "two\nlines \x1b[2J \u202e."), "two lines [2J ."),
    ],
)
def test_error_of_nbdd_is_what_the_user_reads(world: World, error: tuple[str, str], sentence: str) -> None:
    world.nbdd.errors["AttachURI"] = error
    assert sentence in world.fails(LINK)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (FakeBlock("/dev/nbd0", usage="crypto"), "photos is attached as /dev/nbd0, and encrypted: unlock it in the"),
        (FakeBlock("/dev/nbd0", ignored=True), "has no filesystem that could be opened; 'nbdd-open --detach photos'"),
    ],
)
def test_mount_without_a_filesystem_is_a_sentence(world: World, block: FakeBlock, sentence: str) -> None:
    attached_by_link(world, block)
    assert sentence in world.fails(LINK)


def test_mount_of_a_disk_whose_server_is_away_is_refused_as_it_would_hang(world: World) -> None:
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos", "State": "reconnecting"}
    assert "is attached as /dev/nbd0, but storage.example does not answer" in world.fails(LINK)
    assert world.udisks.calls == []


@pytest.mark.parametrize("state", ["detaching", "connecting"])
def test_link_to_a_disk_in_a_short_state_says_try_again(world: World, state: str) -> None:
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos", "State": state}
    assert world.fails(LINK).endswith("; try again in a moment.")


def test_link_to_any_server_of_a_disk_finds_it(world: World) -> None:
    uris = ["nbd://one.example/photos", LINK]
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos", "URI": uris[0], "URIs": uris}
    world.udisks.know(FakeBlock("/dev/nbd0"))
    assert world.run(LINK) == (0, "/media/eve/nbd0\n", "")
    assert world.asked(world.nbdd, "AttachURI") == []
    assert world.run("--detach", LINK) == (0, "photos is detached\n", "")


def test_mount_of_a_filesystem_mounted_from_another_device_is_refused(world: World) -> None:
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos", "Node": "/dev/nbd1"}
    block = FakeBlock("/dev/nbd1", uuid="3D1A")
    world.udisks.know(FakeBlock("/dev/nbd0", uuid="3D1A", mount_points=["/media/eve/a"]), block)
    assert "holds the same filesystem as /dev/nbd0, which is mounted at /media/eve/a; mounted" in world.fails(LINK)
    assert world.asked(world.udisks, "Mount") == []
    # Where it is mounted itself, by hand or meanwhile, there is nothing left to prevent.
    block.mount_points.append("/media/eve/b")
    assert world.run(LINK)[:2] == (0, "/media/eve/b\n")


def test_detach_of_an_empty_name_is_not_all_disks(world: World) -> None:
    assert world.run("--detach", "")[0] == 2
    assert world.nbdd.calls == []


def test_mount_of_one_filesystem_that_fails_does_not_hide_the_others(world: World) -> None:
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos"}
    parts = [FakeBlock(f"/dev/nbd0p{number}", table="/dev/nbd0", size=number << 20) for number in (1, 2)]
    world.udisks.know(FakeBlock("/dev/nbd0", usage=""), *parts)
    world.udisks.refuses["/dev/nbd0p2"] = (f"{UDISKS}.Error.Failed", "wrong fs type")
    assert world.run(LINK) == (0, "/media/eve/nbd0p1\n", "nbdd-open: UDisks could not mount it: wrong fs type.\n")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ("Error.NotAuthorizedDismissed", "The authentication dialog was dismissed"),
            "Polkit does not let you mount it:",
        ),
        (
            ("Error.Failed", "wrong fs type,\nbad superblock"),
            "UDisks could not mount it: wrong fs type, bad superblock.",
        ),
    ],
)
def test_mount_that_fails_is_a_sentence(world: World, error: tuple[str, str], sentence: str) -> None:
    attached_by_link(world)
    world.udisks.refuses["/dev/nbd0"] = (f"{UDISKS}.{error[0]}", error[1])
    assert sentence in world.fails(LINK)


def test_mount_by_the_desktop_meanwhile_is_shown_where_it_is(world: World) -> None:
    block = FakeBlock("/dev/nbd0")
    attached_by_link(world, block)
    world.udisks.held.add("Mount")
    process = world.start(LINK)
    world.udisks.wait_for("Mount")
    block.mount_points.append("/media/eve/label")
    world.udisks.release("Mount")
    assert process.communicate(timeout=DEADLINE)[0] == "/media/eve/label\n"


def test_udisks_that_does_not_answer_is_not_waited_for(world: World) -> None:
    attached_by_link(world)
    world.udisks.held.add("GetManagedObjects")
    assert world.fails(LINK) == "UDisks does not answer within 5 s."


def test_udisks_that_is_missing_is_a_sentence(buses: tuple[str, str], world: World) -> None:
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos"}
    world.udisks.leave()
    assert world.fails(LINK) == "UDisks, which mounts disks for users, is missing; install udisks2."
    assert buses


def test_file_manager_missing_on_the_bus_means_xdg_open(world: World, tmp_path: Path) -> None:
    world.files.leave()
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos"}
    world.udisks.know(FakeBlock("/dev/nbd0", mount_points=["/media/eve/a b"]))
    program = tmp_path / "xdg-open"
    program.write_text(f'#!/bin/sh\nprintf "%s" "$*" >{tmp_path}/opened\n')
    program.chmod(0o755)
    assert world.run(LINK)[0] == 0
    assert (tmp_path / "opened").read_text() == "/media/eve/a b"
    program.write_text("#!/bin/sh\nexit 3\n")
    status, _, err = world.run(LINK)
    assert (status, err) == (
        1, "nbdd-open: The disk is mounted at /media/eve/a b, but no file manager could be opened.\n",
    )  # fmt: skip


def test_feedback_on_a_slow_server_goes_when_it_answers(world: World) -> None:
    world.nbdd.held.add("AttachURI")
    process = world.start(LINK)
    shown = world.server.wait_for_summary("Opening a network disk")
    assert shown.body == "photos on storage.example is asked for."
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos"}
    world.udisks.know(FakeBlock("/dev/nbd0"))
    world.nbdd.release("AttachURI")
    assert process.communicate(timeout=DEADLINE) == ("/media/eve/nbd0\n", "")
    assert world.server.history.visible == []


def test_opener_interrupted_says_that_nbdd_goes_on(world: World) -> None:
    world.nbdd.held.add("AttachURI")
    process = world.start(LINK)
    world.nbdd.wait_for("AttachURI")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (130, "")
    assert err == "nbdd-open: Stopped waiting; nbdd goes on with what it was asked for.\n"


def test_feedback_on_a_terminal_is_there_and_nowhere_else(world: World) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen([*OPEN, "nbd:///"], env=world.environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    assert process.wait(DEADLINE) == 1
    assert b"nbdd-open: 'nbd:///' is not a URI that nbdd can use: the host is missing" in os.read(ours, 1000)
    os.close(ours)
    assert world.server.history.all == []


def test_link_without_a_session_is_opened_all_the_same(world: World, tmp_path: Path) -> None:
    world.environment["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/nonexistent"
    world.nbdd.devices["photos"] = FOUND | {"Name": "photos"}
    world.udisks.know(FakeBlock("/dev/nbd0"))
    (tmp_path / "xdg-open").write_text("#!/bin/sh\n")
    (tmp_path / "xdg-open").chmod(0o755)
    assert world.run(LINK) == (0, "/media/eve/nbd0\n", "")


# The way back


def opened(world: World, *names: str) -> list[FakeBlock]:
    """Disks that are attached and mounted."""
    blocks = []
    for number, name in enumerate(names):
        node = f"/dev/nbd{number}"
        uri = f"nbd://storage.example/{name}"
        world.nbdd.devices[name] = FOUND | {"Name": name, "Node": node, "URI": uri}
        blocks.append(FakeBlock(node, mount_points=[f"/media/eve/{name}"]))
    world.udisks.know(*blocks)
    return blocks


@pytest.mark.parametrize(
    "target", ["photos", "nbd://storage.example/photos", "/dev/nbd1", "/media/eve/photos", "/media/eve/../eve/photos"]
)
def test_detach_unmounts_first_whatever_the_disk_is_called_by(world: World, target: str) -> None:
    music, photos = opened(world, "music", "photos")
    assert world.run("--detach", target) == (0, "photos is detached\n", "")
    assert (photos.mount_points, music.mount_points) == ([], ["/media/eve/music"])
    ((name, options),) = world.asked(world.nbdd, "Detach")
    assert (name, {key: value.value for key, value in options.items()}) == ("photos", {"wait": 5})
    assert world.server.wait_for_summary("photos is detached").hints["transient"]


def test_detach_unmounts_partitions_too(world: World) -> None:
    (disk,) = opened(world, "photos")
    disk.usage, disk.mount_points = "", []
    part = FakeBlock("/dev/nbd0p1", table="/dev/nbd0", mount_points=["/media/eve/a", "/mnt"])
    world.udisks.know(part)
    assert world.run("--detach", "/dev/nbd0p1")[0] == 0
    assert part.mount_points == []


def test_detach_without_a_target_detaches_all_that_this_user_attached_and_nothing_else(world: World) -> None:
    opened(world, "music", "photos", "backup", "server")
    world.nbdd.devices["photos"]["Configured"] = True
    world.nbdd.devices["backup"]["AttachedBy"] = EVE + 1
    world.nbdd.devices["server"]["Desktop"] = False
    assert world.run("--detach") == (0, "music is detached\nphotos is detached\n", "")
    assert [name for name, _ in world.asked(world.nbdd, "Detach")] == ["music", "photos"]


def test_detach_of_nothing_is_no_error(world: World) -> None:
    assert world.run("--detach") == (0, "Nothing to detach: no network disk is yours\n", "")
    world.server.wait_for_summary("Nothing to detach")


def test_detach_without_a_session_folder_works(world: World) -> None:
    world.environment["XDG_RUNTIME_DIR"] = "/nowhere/at/all"
    assert world.run("--detach")[0] == 0


def test_detach_of_a_disk_in_use_is_refused_and_the_user_reads_why(world: World) -> None:
    opened(world, "photos")
    world.udisks.refuses["/dev/nbd0"] = (f"{UDISKS}.Error.DeviceBusy", "target is busy")
    assert world.fails("--detach", "photos") == "It is still in use: target is busy."
    assert world.asked(world.nbdd, "Detach") == []


def test_detach_of_what_is_no_disk_is_a_sentence(world: World) -> None:
    opened(world, "photos")
    assert world.fails("--detach", "/media/eve") == (
        "/media/eve is no network disk that is attached; 'nbdctl list' shows them."
    )


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("--eject",)])
def test_opener_usage_error_is_status_2(world: World, arguments: tuple[str, ...]) -> None:
    status, out, err = world.run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: nbdd-open")
