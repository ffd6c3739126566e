# SPDX-License-Identifier: MIT
"""Which server is nbd5, who uses it, and how is it? nbdctl list and nbdctl status answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdd.ctl import find, show, users
from nbdd.kernel.usage import Usage
from nbdd.text import printable
from tests.fakes.manager import ABSENT, PRESENT, FakeManager
from tests.fakes.terminal import NBDCTL, Run

MOUNTED = "/dev/nbd5p1 is mounted on /srv/photos"
OPEN = "/dev/nbd5 is open in process 77 (qemu)"


@pytest.fixture
def photos(fake: FakeManager, monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    """A device that is /dev/nbd5 and in use."""
    fake.devices["photos"] = PRESENT | {"Name": "photos", "Node": "/dev/nbd5", "URI": "nbd://one.example/photos"}
    monkeypatch.setattr(Usage, "users", lambda _self, node: [MOUNTED, OPEN] if node.index == 5 else [])
    monkeypatch.setattr(Usage, "all_claims", lambda _self: {"/dev/nbd5": [MOUNTED, "/dev/nbd5 is used as swap"]})
    return fake


@pytest.mark.parametrize(
    ("target", "index"),
    [("nbd5", 5), ("/dev/nbd5", 5), ("/dev/nbd5p2", 5), ("nbd0", 0), ("nbd", None), ("nbd05", None), ("backup", None),
     ("/dev/sda", None), ("nbd5\n", None), ("/dev/nbd", None), ("nbd999999", None)],
)  # fmt: skip
def test_target_node_differs_from_a_name(target: str, index: int | None) -> None:
    assert find.index_of(target) == index


def test_target_link_is_followed_to_its_node(tmp_path: Path) -> None:
    link = tmp_path / "photos"
    link.symlink_to("/dev/nbd5")
    assert find.index_of(str(link)) == 5


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("target", ["photos", "nbd5", "/dev/nbd5", "/dev/nbd5p1"])
def test_status_takes_a_name_or_a_node(run: Run, target: str) -> None:
    status, out, _ = run("status", target, "--json")
    assert (status, json.loads(out)["name"]) == (0, "photos")


BY_NODE = ["nbd5", "/dev/nbd5p1", "nbd://one.example/photos", "NBD://One.Example:10809/photos"]


@pytest.mark.parametrize("target", BY_NODE)
@pytest.mark.parametrize(
    ("command", "member"),
    [("detach", "Detach"), ("reconnect", "Reconnect"), ("resize", "Resize"), ("set-timeout", "SetTimeout")],
)
def test_target_of_each_command_is_a_name_node_or_uri(
    photos: FakeManager, run: Run, command: str, member: str, target: str
) -> None:
    status, out, err = run(command, target, *(["5"] if command == "set-timeout" else []))
    assert (status, out.split()[0].rstrip(":"), err) == (0, "photos", "")
    assert photos.wait_for(member).body[0] == "photos"


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("command", ["detach", "status"])
@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("/dev/nbd77", "Nothing is attached as /dev/nbd77; `nbdctl list` shows what is where."),
        ("/dev/disk/by-nbd/none", "/dev/disk/by-nbd/none is no NBD device that is attached; `nbdctl list` shows what"),
        ("nbd://one.example/none", "No device has nbd://one.example/none; `nbdctl list` shows the servers of all."),
    ],
)
def test_target_that_is_no_device_is_refused_with_its_reason(run: Run, command: str, target: str, told: str) -> None:
    status, out, err = run(command, target)
    assert (status, out) == (1, "")
    assert err.startswith(f"nbdctl: {told}")
    if command == "detach":
        assert run(command, target, "--if-needed")[:2] == (0, f"{target} was not attached\n")


def test_target_uri_of_several_devices_is_not_guessed_at_and_detached_ones_do_not_count(
    photos: FakeManager, run: Run
) -> None:
    uri = photos.devices["photos"]["URI"]
    photos.devices["copy"] = ABSENT | {"Name": "copy", "URI": uri}
    assert run("detach", uri)[:2] == (0, "photos is detached\n")
    photos.devices["copy"] |= {"Node": "/dev/nbd6", "State": "attached"}
    status, _, err = run("detach", uri)
    assert (status, err) == (1, f"nbdctl: Several devices have {uri}: copy, photos; say which by its name.\n")


def test_target_named_like_a_node_is_found_by_its_name_and_the_node_by_its_path(photos: FakeManager, run: Run) -> None:
    photos.devices["nbd5"] = ABSENT | {"Name": "nbd5"}
    assert json.loads(run("status", "nbd5", "--json")[1])["name"] == "nbd5"
    assert json.loads(run("status", "/dev/nbd5", "--json")[1])["name"] == "photos"


@pytest.mark.usefixtures("photos")
def test_target_node_that_is_free_differs_from_one_of_another_program(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("status", "/dev/nbd77") == (
        1, "", "nbdctl: Nothing is attached as /dev/nbd77; `nbdctl list` shows what is where.\n",
    )  # fmt: skip
    monkeypatch.setattr("nbdd.kernel.sysfs.Node.pid", 4711)
    monkeypatch.setattr("nbdd.kernel.sysfs.Node.backend", "theirs")
    assert run("status", "nbd77") == (
        1, "", "nbdctl: /dev/nbd77 is bound under the identifier 'theirs', but not by nbdd.\n",
    )  # fmt: skip


@pytest.mark.usefixtures("photos")
def test_status_names_what_uses_the_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Usage, "sees_all", lambda _self: True)
    lines = run("status", "photos")[1].splitlines()
    first = next(number for number, line in enumerate(lines) if "Used by" in line)
    assert lines[first].strip() == f"Used by: {MOUNTED}"
    assert lines[first + 1].strip() == OPEN
    assert lines[first + 1].index(OPEN) == lines[first].index(MOUNTED)
    found = json.loads(run("status", "photos", "--json")[1])
    assert (found["users"], found["users-complete"]) == ([MOUNTED, OPEN], True)
    assert "Used by: nothing\n" in run("status", "backup")[1]


@pytest.mark.usefixtures("photos")
def test_status_says_what_its_caller_may_not_see(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Usage, "sees_all", lambda _self: False)
    assert "(the processes of other users are shown to root only)" in run("status", "photos")[1]
    assert "Used by: nothing that you may see\n" in run("status", "backup")[1]
    assert json.loads(run("status", "backup", "--json")[1])["users-complete"] is False


@pytest.mark.usefixtures("photos")
def test_detach_by_force_says_what_is_mounted_still(run: Run) -> None:
    status, out, err = run("detach", "--force", "photos")
    assert (status, out) == (0, "photos is detached\n")
    assert err.splitlines() == [
        f"nbdctl: {claim} still: what was not written is lost, and all I/O there fails."
        for claim in (MOUNTED, "/dev/nbd5 is used as swap")
    ]


def test_status_of_a_device_without_a_node_has_no_users(photos: FakeManager, run: Run) -> None:
    photos.devices["photos"] |= {"State": "detached", "Node": ""}
    assert "Used by" not in run("status", "photos")[1]
    found = json.loads(run("status", "photos", "--json")[1])
    assert (found["users"], found["users-complete"]) == ([], True)


@pytest.mark.usefixtures("photos")
def test_list_shows_what_each_device_is_used_for(run: Run) -> None:
    lines = run("list")[1].splitlines()
    last = lines[0].index("USE")
    assert [line[last:] for line in lines] == ["USE", "-", "mounted on /srv/photos, used as swap"]
    devices = {device["name"]: device["users"] for device in json.loads(run("list", "--json")[1])["devices"]}
    assert devices == {"backup": [], "photos": [MOUNTED, "/dev/nbd5 is used as swap"]}


ROWS = [
    ("a-name-of-a-certain-length", "/dev/nbd100", "reconnecting", "1023.9 GiB", "rw", "16/16",
     "nbd://storage.example:10810/an-export", "mounted on /srv/something"),
    ("b", "/dev/nbd0", "attached", "1 GiB", "ro", "1/1", "nbd://[2001:db8::1]/", ""),
]  # fmt: skip
HEAD = ("NAME", "NODE", "STATE", "SIZE", "MODE", "CONNS", "SERVER", "USE")


@pytest.mark.parametrize("columns", [50, 60, 80, 100, 132, 200])
def test_table_fits_its_terminal(columns: int) -> None:
    look = show.Look(width=columns, terminal=True)
    flexible, spare = ("NAME", "SERVER", "USE"), ("CONNS", "MODE", "SIZE")
    text = show.table(HEAD, ROWS, look, right=("SIZE",), flexible=flexible, spare=spare)
    assert max(map(show.width, text.splitlines())) <= columns
    for kept in ("NAME", "NODE", "STATE"):
        assert kept in text
    assert ("CONNS" in text) == (columns > 100)


@pytest.mark.parametrize("columns", [1, 2, 5, 16, 17, 30, 100])
@pytest.mark.parametrize(
    "text", ["nbd://storage.example/photos", "nbd://storage.example/\u5199\u771f\u5199\u771f", "x"]
)
def test_table_shows_both_ends_of_a_server_that_is_cut(text: str, columns: int) -> None:
    cut = show.squeeze(text, columns)
    assert show.width(cut) <= columns
    assert (cut == text) == (show.width(text) <= columns)
    if 16 <= columns < show.width(text):
        assert cut.startswith("nbd://s")
        assert cut.endswith(text[-4:])


def test_table_without_a_terminal_is_not_cut() -> None:
    text = show.table(HEAD, ROWS, show.Look(), flexible=("NAME", "SERVER", "USE"), spare=("CONNS", "MODE", "SIZE"))
    for row in ROWS:
        assert all(cell in text for cell in row)


def heavy(*arguments: str) -> set[str]:
    """The modules that one command loads and that cost time."""
    done = subprocess.run([sys.executable, "-X", "importtime", *NBDCTL[1:], *arguments], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return loaded & {"asyncio", "dbus_next", "_ssl", "rich", "yaml", "jsonschema", "json", "importlib.metadata"}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("arguments", "needed"), [(["list"], {"asyncio", "dbus_next"}), (["--help"], set()), (["attach", "--help"], set())]
)
def test_command_loads_no_library_that_it_does_not_need(arguments: Sequence[str], needed: set[str]) -> None:
    assert heavy(*arguments) == needed


def test_list_reads_the_machine_once_for_any_number_of_devices(
    fake: FakeManager, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look() -> dict[str, list[str]]:
        looks.append(1)
        return {}

    monkeypatch.setattr(users, "claims", look)
    fake.devices |= {f"d{index}": PRESENT | {"Name": f"d{index}", "Node": f"/dev/nbd{index}"} for index in range(200)}
    assert len(run("list")[1].splitlines()) == 202
    assert len(looks) == 1


@given(st.text(), st.integers(min_value=1, max_value=40))
def test_fit_text_is_within_its_columns(text: str, columns: int) -> None:
    assert show.width(show.fit(printable(text), columns)) <= columns
