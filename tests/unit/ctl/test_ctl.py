# SPDX-License-Identifier: MIT
"""What nbdctl promises: to people, to scripts, and to those whose terminal a server would like to have."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from dbus_next.signature import Variant
from hypothesis import given
from hypothesis import strategies as st

import nbdd.errors
from nbdd.bus.caller.client import ManagerProxy
from nbdd.bus.caller.device import DeviceView
from nbdd.bus.caller.failure import _classes
from nbdd.bus.wire.names import device_name, device_path
from nbdd.bus.wire.properties import FIELDS
from nbdd.ctl import show
from nbdd.ctl.cli import cli
from nbdd.ctl.find import is_uri
from nbdd.errors import NbddError
from nbdd.text import duration, printable, size
from tests.fakes.manager import ABSENT, DEADLINE, PRESENT, FakeManager, private_bus, properties
from tests.fakes.terminal import NBDCTL, Run, Terminal, Watching

INTERACTIVE = 4
NO_AUTOSTART = 2


def options(fake: FakeManager, member: str) -> dict[str, tuple[str, Any]]:
    return {key: (value.signature, value.value) for key, value in fake.wait_for(member).body[1].items()}


# Names and URIs


@pytest.mark.parametrize(
    ("name", "label"),
    [("backup", "backup"), ("a-b.c", "a_2db_2ec"), ("1st", "_31st"), ("a_b", "a_5fb"), ("é", "_c3_a9"), ("", "_")],
)
def test_object_path_is_escaped_as_systemd_does_it(name: str, label: str) -> None:
    assert device_path(name) == "/org/nbdd1/device/" + label


@given(st.text())
def test_object_path_gives_back_every_name(name: str) -> None:
    assert device_name(device_path(name)) == name


@pytest.mark.parametrize(
    "path", ["/org/nbdd1", "/org/nbdd1/device/a/b", "/org/nbdd1/device/a_zz", "/org/nbdd1/device/_ff"]
)
def test_object_path_of_no_device_has_no_name(path: str) -> None:
    assert device_name(path) is None


@pytest.mark.parametrize(
    ("target", "uri"),
    [("backup", False), ("a:b", False), ("nbd", False), ("nbd://h/x", True), ("nbd:x", True), ("http://h/", True),
     ("nbd+unix:///x?socket=/s", True), ("NBDS://h", True)],
)  # fmt: skip
def test_target_with_a_scheme_is_a_uri_and_a_lone_word_a_name(target: str, uri: bool) -> None:
    assert is_uri(target) is uri


# attach


def test_attach_prints_the_node(fake: FakeManager, run: Run) -> None:
    assert run("attach", "backup") == (0, "backup is /dev/nbd0, 10 GiB, from nbd://storage.example/backup\n", "")
    call = fake.wait_for("Attach")
    assert call.body == ["backup", {}]
    assert call.flags == INTERACTIVE


def test_attach_sends_only_given_options_each_with_its_type(fake: FakeManager, run: Run) -> None:
    arguments = "--device /dev/nbd3 --read-only --connections 2 --timeout 0 --dead-timeout 9 --block-size 4096"
    assert run("attach", "backup", *arguments.split())[0] == 0
    assert options(fake, "Attach") == {
        "device": ("s", "/dev/nbd3"), "read-only": ("b", True), "connections": ("u", 2), "timeout": ("u", 0),
        "dead-timeout": ("u", 9), "block-size": ("u", 4096),
    }  # fmt: skip


def test_attach_of_uri_prints_a_json_document(fake: FakeManager, run: Run) -> None:
    fake.devices["copy"] = PRESENT | {"Name": "copy", "ReadOnly": True}
    status, out, err = run("attach", "nbd://storage.example/backup", "--name", "copy", "--json")
    assert (status, json.loads(out), err) == (0, {"name": "copy", "node": "/dev/nbd0", "size": 10 << 30}, "")
    assert options(fake, "AttachURI") == {"name": ("s", "copy")}


def test_attach_if_needed_accepts_attached_device(fake: FakeManager, run: Run) -> None:
    fake.errors["Attach"] = ("org.nbdd1.Error.AlreadyAttached", "backup is attached already.")
    assert run("attach", "backup") == (1, "", "nbdctl: backup is attached already.\n")
    assert run("attach", "--if-needed", "backup")[:2] == (
        0, "backup is /dev/nbd0, 10 GiB, from nbd://storage.example/backup\n",
    )  # fmt: skip


def test_attach_if_needed_refuses_device_attached_with_other_options(fake: FakeManager, run: Run) -> None:
    fake.errors["Attach"] = ("org.nbdd1.Error.AlreadyAttached", "backup is attached already.")
    code, _, told = run("attach", "--if-needed", "backup", "--read-only")
    assert code == 1
    assert "attached already, as /dev/nbd0, but not with --read-only" in told


def test_attach_if_needed_of_uri_refuses_another_export_of_that_name(fake: FakeManager, run: Run) -> None:
    fake.errors["AttachURI"] = ("org.nbdd1.Error.AlreadyAttached", "backup is attached already.")
    assert run("attach", "--if-needed", "NBD://Storage.Example:10809/backup", "--name", "backup")[0] == 0
    assert run("attach", "--if-needed", "nbd://storage.example/other", "--name", "backup")[0] == 1
    assert run("attach", "--if-needed", "nbd://storage.example/backup", "--name", "other")[0] == 1


def test_attach_with_wait_retries_an_unreachable_server(fake: FakeManager, run: Run) -> None:
    fake.errors["Attach"] = ("org.nbdd1.Error.ConnectFailed", "Connection refused.")
    assert run("attach", "--wait=1", "backup") == (1, "", "nbdctl: Connection refused.\n")
    assert len([call for call in fake.calls if call.member == "Attach"]) == 2
    fake.errors["Attach"] = ("org.nbdd1.Error.NoSuchDevice", "No device is named backup.")
    assert run("attach", "--wait=60", "backup")[0] == 1, "nothing that time will mend"
    fake.errors["Attach"] = ("org.nbdd1.Error.ConnectFailed", "Connection refused.")
    fake.calls.clear()
    with subprocess.Popen([*NBDCTL, "attach", "backup", "--wait=60"], stdout=-1, stderr=-1, text=True) as process:
        fake.wait_for("Attach")
        # The service, which tries by itself, was quicker.
        fake.errors["Attach"] = ("org.nbdd1.Error.AlreadyAttached", "backup is attached already.")
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, "backup is /dev/nbd0, 10 GiB, from nbd://storage.example/backup\n", "")


def test_attach_interrupted_says_that_the_service_goes_on(fake: FakeManager) -> None:
    fake.held.add("Attach")
    with subprocess.Popen([*NBDCTL, "attach", "backup"], stdout=-1, stderr=-1, text=True) as process:
        fake.wait_for("Attach")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (130, "")
    assert err == "nbdctl: Stopped waiting; nbdd goes on attaching backup. To end that: nbdctl detach backup\n"


def test_attach_that_takes_long_shows_progress_on_a_terminal(fake: FakeManager) -> None:
    fake.devices["backup"] = ABSENT | {"Name": "backup"}
    fake.held.add("Attach")
    with Terminal("attach", "backup") as terminal:
        fake.wait_for("Attach")
        fake.change("backup", State="connecting")
        terminal.wait_for("backup: connecting for ")
        fake.change("backup", LastError=["org.nbdd1.Error.ConnectFailed", "no \x1b[31mroute"])
        terminal.wait_for("; last error: no \\x1b[31mroute")
        fake.devices["backup"] = PRESENT | {"Name": "backup"}
        fake.release("Attach")
        status, text = terminal.finish()
    assert status == 0
    assert text.endswith("\r\x1b[Kbackup is /dev/nbd0, 10 GiB, from nbd://storage.example/backup\n")
    assert all(len(line) < 80 for line in text.split("\r\x1b[K"))


def test_attach_that_joins_another_shows_its_progress(fake: FakeManager) -> None:
    failure = ["org.nbdd1.Error.ConnectFailed", "no route"]
    fake.devices["backup"] = ABSENT | {"Name": "backup", "State": "connecting", "LastError": failure}
    fake.held.add("Attach")
    with Terminal("attach", "backup") as terminal:
        terminal.wait_for("; last error: no route")
        assert "backup: connecting for " in terminal.text


def test_attach_by_uri_learns_its_name_from_the_service(fake: FakeManager) -> None:
    fake.devices.clear()
    fake.held.add("AttachURI")
    with Terminal("attach", "nbd://STORAGE.example/backup") as terminal:
        fake.wait_for("AttachURI")
        terminal.wait_for("backup: waiting for ")
        fake.add("copy", ABSENT | {"State": "reconnecting"})
        terminal.wait_for("copy: reconnecting for ")
        terminal.process.send_signal(signal.SIGINT)
        status, text = terminal.finish()
    assert status == 130
    assert text.endswith("nbdd goes on attaching copy. To end that: nbdctl detach copy\n")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({}, "nbdctl: Beware: other can write to the same export. What is mounted twice is destroyed.\n"),
        ({"ReadOnly": True}, ""),
        ({"Node": "", "State": "detached"}, ""),
        ({"URI": "nbd://storage.example/another"}, ""),
    ],
)
def test_attach_of_export_that_is_writable_twice_warns(
    fake: FakeManager, run: Run, other: dict[str, Any], told: str
) -> None:
    fake.devices["other"] = PRESENT | {"Name": "other", "Node": "/dev/nbd7"} | other
    assert run("attach", "backup") == (0, "backup is /dev/nbd0, 10 GiB, from nbd://storage.example/backup\n", told)
    fake.devices["backup"] |= {"ReadOnly": True}
    assert run("attach", "backup", "--read-only")[2] == ""


# detach, set-timeout, reload


def test_detach_sends_its_options(fake: FakeManager, run: Run) -> None:
    assert run("detach", "backup", "--force", "--wait", "5") == (0, "backup is detached\n", "")
    assert fake.wait_for("Detach").body[0] == "backup"
    assert options(fake, "Detach") == {"force": ("b", True), "wait": ("u", 5)}


def test_detach_if_needed_accepts_detached_device(fake: FakeManager, run: Run) -> None:
    fake.errors["Detach"] = ("org.nbdd1.Error.NotAttached", "backup is not attached.")
    assert run("detach", "backup") == (1, "", "nbdctl: backup is not attached.\n")
    assert run("detach", "--if-needed", "backup") == (0, "backup was not attached\n", "")
    assert json.loads(run("detach", "--if-needed", "--json", "backup")[1]) == {"name": "backup", "detached": False}


def test_detach_if_needed_accepts_unknown_device(fake: FakeManager, run: Run) -> None:
    # A unit of nbdd-attach@ that is stopped after a reload took its definition away has nothing left to do.
    fake.errors["Detach"] = ("org.nbdd1.Error.NoSuchDevice", "No device is named backup.")
    assert run("detach", "--if-needed", "backup")[0] == 0


def test_reconnect_and_resize_print_what_was_done(fake: FakeManager, run: Run) -> None:
    assert run("reconnect", "backup") == (0, "backup is connected again\n", "")
    assert fake.wait_for("Reconnect").body == ["backup", {}]
    assert json.loads(run("reconnect", "backup", "--json")[1]) == {"name": "backup", "reconnected": True}
    assert run("resize", "backup") == (0, "backup has 2 GiB (2147483648 bytes)\n", "")
    assert fake.wait_for("Resize").body == ["backup", {}]
    assert json.loads(run("resize", "backup", "--json")[1]) == {"name": "backup", "size": 2 << 30}


def test_set_timeout_sends_seconds(fake: FakeManager, run: Run) -> None:
    assert run("set-timeout", "backup", "30") == (0, "backup: a request may take 30 s\n", "")
    assert fake.wait_for("SetTimeout").body == ["backup", 30]
    assert json.loads(run("set-timeout", "backup", "0", "--json")[1]) == {"name": "backup", "timeout": 0}


def test_reload_prints_what_it_did(fake: FakeManager, run: Run) -> None:
    fake.replies["Reload"] = ("asasas", [["d10", "d9"], [], ["old"]])
    assert run("reload") == (0, "added: d9, d10\nremoved: old\n", "")
    assert json.loads(run("reload", "--json")[1]) == {"added": ["d10", "d9"], "changed": [], "removed": ["old"]}
    fake.replies["Reload"] = ("asasas", [[], [], []])
    assert run("reload")[1] == "Nothing changed.\n"


def test_reload_of_bad_files_prints_a_line_for_each_fault(fake: FakeManager, run: Run) -> None:
    fake.errors["Reload"] = ("org.nbdd1.Error.InvalidConfig", "a.yaml:1:2: one\nb.yaml:3:4: two")
    assert run("reload") == (1, "", "nbdctl: a.yaml:1:2: one\nnbdctl: b.yaml:3:4: two\nnbdctl: Nothing is changed.\n")


# list, status, exports


def test_list_is_a_table_in_natural_order(fake: FakeManager, run: Run) -> None:
    long = "nbd://[2001:db8::1]:10809/" + "x" * 200
    fake.devices["disk10"] = ABSENT | {"Name": "disk10", "URI": long}
    fake.devices["disk9"] = PRESENT | {
        "Name": "disk9", "State": "degraded", "Size": 1536 << 20, "ReadOnly": True, "Connections": 4,
        "LastError": ["org.nbdd1.Error.TimedOut", "slow"],
    }  # fmt: skip
    status, out, _ = run("list")
    assert status == 0
    assert out.splitlines() == [
        f"NAME    NODE       STATE        SIZE  MODE  CONNS  {'SERVER':{len(long)}}  USE",
        f"backup  /dev/nbd0  attached   10 GiB  rw    1/1    {'nbd://storage.example/backup':{len(long)}}  -",
        f"disk9   /dev/nbd0  degraded  1.5 GiB  ro    1/4    {'nbd://storage.example/backup':{len(long)}}  -",
        f"disk10  -          detached        -  rw    0/1    {long}  -",
    ]


def test_list_on_a_terminal_has_colours_no_wrapped_line_and_reasons_of_failures(fake: FakeManager) -> None:
    fake.devices["bad"] = ABSENT | {
        "Name": "bad", "State": "failed", "LastError": ["org.nbdd1.Error.ConnectFailed", "storage.example refuses."],
    }  # fmt: skip
    with Terminal("list") as terminal:
        status, text = terminal.finish()
    assert status == 0
    assert "\x1b[31mfailed\x1b[0m" in text
    assert "       -  rw    nbd://st…e/backup\n" in text
    assert text.endswith("\n\nbad: storage.example refuses.\n")
    with Terminal("list", NO_COLOR="1") as terminal:
        _, text = terminal.finish()
    assert "\x1b" not in text
    assert all(len(line) <= 60 for line in text.splitlines())


def test_list_without_devices_prints_no_table_and_says_what_to_do(fake: FakeManager, run: Run) -> None:
    fake.devices.clear()
    status, out, err = run("list")
    assert (status, out) == (0, "")
    assert "nbdctl attach nbd://" in err
    assert json.loads(run("list", "--json")[1]) == {"devices": []}


def test_list_holds_thousands_of_devices(fake: FakeManager, run: Run) -> None:
    fake.devices |= {f"d{index}": ABSENT | {"Name": f"d{index}"} for index in range(2000)}
    status, out, _ = run("list")
    assert status == 0
    assert len(out.splitlines()) == 2002


DOCUMENT = {
    "name": "backup", "node": "/dev/nbd0", "state": "attached", "size": 10 << 30, "block-size": 512,
    "read-only": False, "uri": "nbd://storage.example/backup", "uris": [],
    "timeout": 0, "dead-timeout": 300, "connections": 1,
    "live-connections": 1, "encryption": "none", "worker-pid": 4711, "reconnects": 0,
    "attached-since": 1_700_000_000_000_000, "attached-by": 0, "fails-at": 0, "configured": True, "last-error": None,
    "desktop": False, "display-name": "backup", "icon-name": "",
}  # fmt: skip


def test_list_as_json_has_keys_that_scripts_can_rely_on(fake: FakeManager, run: Run) -> None:
    assert json.loads(run("list", "--json")[1]) == {"devices": [DOCUMENT | {"users": []}]}
    fake.devices["backup"]["LastError"] = ["org.nbdd1.Error.TimedOut", "slow"]
    found = json.loads(run("list", "--json")[1])["devices"][0]
    assert found["last-error"] == {"name": "org.nbdd1.Error.TimedOut", "message": "slow"}


def test_status_shows_every_property_and_the_counters(fake: FakeManager, run: Run) -> None:
    fake.replies["GetStatistics"] = ("a{st}", [{"reads": 3, "read-bytes": 3 << 20, "writes": 0, "flushes": 2}])
    fake.devices["backup"]["LastError"] = ["org.nbdd1.Error.TimedOut", "slow"]
    fake.devices["backup"]["URIs"] = ["nbd://storage.example/backup", "nbd://two.example/backup"]
    status, out, _ = run("status", "backup")
    lines = [line.strip() for line in out.splitlines()]
    assert status == 0
    assert lines[0] == "backup"
    assert "Size: 10 GiB (10737418240 bytes, blocks of 512)" in lines
    assert "Timeout: none; without any connection I/O fails after 300 s" in lines
    assert "Read: 3 MiB in 3 requests" in lines
    assert "Server: nbd://storage.example/backup" in lines
    assert "or nbd://two.example/backup" in lines
    assert "Last error: slow (org.nbdd1.Error.TimedOut); mended since" in lines
    found = json.loads(run("status", "backup", "--json")[1])
    assert found["statistics"] == {"reads": 3, "read-bytes": 3 << 20, "writes": 0, "flushes": 2}


def test_status_of_detached_device_has_no_statistics(fake: FakeManager, run: Run) -> None:
    fake.devices["backup"] = ABSENT | {"Name": "backup"}
    fake.errors["GetStatistics"] = ("org.nbdd1.Error.NotAttached", "no")
    status, out, _ = run("status", "backup")
    assert status == 0
    assert "Node:" not in out
    assert json.loads(run("status", "backup", "--json")[1])["statistics"] is None


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["nobody", "a b", "ü", "x" * 300, "a\nb\x1b[2J"])
def test_status_of_unknown_name_is_one_sentence(run: Run, name: str) -> None:
    status, out, err = run("status", name)
    assert (status, out) == (1, "")
    assert err.startswith("nbdctl: No device is named ")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_exports_prints_a_table_or_a_document(fake: FakeManager, run: Run) -> None:
    fake.replies["ListExports"] = ("aa{sv}", [[
        {"name": Variant("s", ""), "description": Variant("s", ""), "size": Variant("t", 0), "flags": Variant("u", 3)},
        {"name": Variant("s", "data"), "description": Variant("s", "日本 disk"), "size": Variant("t", (1 << 40) - 1),
         "flags": Variant("u", 0x101), "minimum-block-size": Variant("u", 512)},
    ]])  # fmt: skip
    status, out, _ = run("exports", "nbd://h")
    assert status == 0
    assert out.splitlines() == [
        "NAME     SIZE  MODE  CONNS  DESCRIPTION",
        '""        0 B  ro    1      -',
        "data  1.0 TiB  rw    many   日本 disk",
    ]
    assert fake.wait_for("ListExports").body == ["nbd://h", {}]
    assert json.loads(run("exports", "nbd://h", "--json")[1])["exports"][1] == {
        "name": "data", "description": "日本 disk", "size": (1 << 40) - 1, "flags": 0x101, "minimum-block-size": 512,
    }  # fmt: skip


EVIL = "a\x1b]0;title\x07\r\n\x9b31m\u202ez\x7f"


def test_output_of_hostile_server_text_is_escaped(fake: FakeManager, run: Run) -> None:
    fake.replies["ListExports"] = ("aa{sv}", [[
        {"name": Variant("s", EVIL), "description": Variant("s", EVIL), "size": Variant("t", 1),
         "flags": Variant("u", 1)},
    ]])  # fmt: skip
    fake.devices["backup"] |= {"URI": "nbd://h/" + EVIL, "LastError": [EVIL, EVIL], "State": EVIL, "Encryption": EVIL}
    fake.errors["Detach"] = ("org.nbdd1.Error.Busy", EVIL)
    fake.errors["Reload"] = ("org.nbdd1.Error.InvalidConfig", EVIL.replace("\n", ""))
    for command in ("exports nbd://h", "list", "status backup", "detach backup", "reload", "attach backup"):
        for extra in ((), ("--json",)):
            _, out, err = run(*command.split(), *extra)
            assert set(out + err) - {"\n"} == {char for char in out + err if char.isprintable()}, command


# Failures


@pytest.mark.parametrize("kind", [kind for kind in _classes(NbddError) if "dbus_name" in vars(kind)])
def test_error_of_the_service_is_one_line_and_status_1(fake: FakeManager, run: Run, kind: type[NbddError]) -> None:
    fake.errors["Attach"] = (kind.dbus_name, "Something went wrong\nwith backup.")
    status, out, err = run("attach", "backup")
    expected = "Something went wrong with backup."
    if kind is nbdd.errors.InvalidConfig:
        expected = "Something went wrong\nnbdctl: with backup."
    assert (status, out, err) == (1, "", f"nbdctl: {expected}\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org.nbdd1.Error.OfTheFuture", "nbdctl: text"),
        ("org.freedesktop.DBus.Error.LimitsExceeded", "nbdctl: text"),
        ("org.freedesktop.DBus.Error.UnknownMethod", "another version"),
        ("org.freedesktop.DBus.Error.NoReply", "ended before it answered"),
        ("org.freedesktop.DBus.Error.TimedOut", "could not be started (text)"),
        ("org.freedesktop.systemd1.UnitMasked", "could not be started (text)"),
        ("org.freedesktop.DBus.Error.Spawn.ChildExited", "could not be started (text)"),
    ],
)
def test_error_that_is_not_of_nbdd_is_a_sentence_too(fake: FakeManager, run: Run, name: str, said: str) -> None:
    fake.errors["Attach"] = (name, "text.")
    status, out, err = run("attach", "backup")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert said in err


def test_answer_of_another_version_is_a_sentence(fake: FakeManager, run: Run) -> None:
    fake.replies["Attach"] = ("s", ["x"])
    status, _, err = run("attach", "backup")
    assert status == 1
    assert "another version" in err


@pytest.mark.usefixtures("no_service")
@pytest.mark.parametrize("command", ["list", "status backup", "attach backup", "exports nbd://h", "reload"])
def test_command_without_the_service_says_where_to_look(run: Run, command: str) -> None:
    status, out, err = run(*command.split())
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "nbdd is not running" in err
    assert "systemctl status nbdd" in err


@pytest.mark.parametrize("bus", ["unix:path=/nonexistent/bus", "nonsense", "unix:path=/dev/null", ""])
def test_command_without_a_bus_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, bus: str) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus)
    status, out, err = run("list")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("nbdctl: The system bus can't be reached (")


@pytest.mark.parametrize("greeting", [b"", b"OK", b"REJECTED EXTERNAL\r\n", b"OK 1234deadbeef\r\n", b"\xff\xff\r\n"])
def test_bus_that_hangs_up_at_once_is_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, greeting: bytes
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/bus")
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as bus:
                bus.recv(100)
                bus.sendall(greeting)
                if greeting.startswith(b"OK "):
                    bus.recv(100)

        server = threading.Thread(target=serve)
        server.start()
        status, out, err = run("list")
        server.join()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("nbdctl: The system bus can't be reached (")


def test_service_that_dies_midway_is_a_sentence(fake: FakeManager, run: Run) -> None:
    fake.held.add("Attach")

    def die() -> None:
        fake.wait_for("Attach")
        fake.leave()

    killer = threading.Thread(target=die)
    killer.start()
    status, out, err = run("attach", "backup")
    killer.join()
    assert (status, out) == (1, "")
    assert err.startswith("nbdctl: nbdd ended before it answered, so what was asked may or may not be done. ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["attach backup", "monitor"])
def test_bus_that_dies_midway_is_a_sentence(tmp_path: Path, command: str) -> None:
    with private_bus(tmp_path) as (address, daemon), FakeManager(address) as fake:
        fake.held.add("Attach")
        # On a terminal, where attach listens to events as well.
        with Terminal(*command.split(), DBUS_SYSTEM_BUS_ADDRESS=address) as terminal:
            if command == "monitor":
                terminal.wait_for("Watching")
            else:
                fake.wait_for("Attach")
            daemon.kill()
            status, text = terminal.finish()
    assert status == 1
    assert text.splitlines()[-1].endswith(
        "nbdctl: The connection to the system bus was lost. See `systemctl status nbdd`."
    )
    assert "Traceback" not in text


async def test_call_to_a_bus_that_is_gone_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with private_bus(tmp_path) as (address, daemon):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        async with asyncio.timeout(DEADLINE), ManagerProxy() as client:
            daemon.kill()
            daemon.wait()
            for _ in range(2):  # one that finds it out, and one that comes later
                with pytest.raises(NbddError, match="connection to the system bus was lost"):
                    await client.devices()
    gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["frobnicate"], ["attach"], ["attach", "a", "b"], ["attach", "a", "--timeout", "-1"],
     ["attach", "a", "--timeout", "soon"], ["attach", "a", "--connections", "0"], ["attach", "a", "--name", "b"],
     ["attach", "a", "--timeout", "4294967296"], ["attach", "a", "--timeout", "9" * 10000], ["set-timeout", "a"],
     ["set-timeout", "a", "-1"], ["set-timeout", "a", "1.5"], ["detach", "a", "--wait", "\u0663"], ["list", "--yaml"],
     ["detach", "a", "--wait", ""], ["attach", "\udcff"], ["status", "\udcff"], ["exports", "nbd://h/\udcff"]],
)  # fmt: skip
def test_usage_error_is_status_2_and_calls_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("Usage: nbdctl")


def test_arguments_that_are_not_utf_8_are_usage_errors() -> None:
    done = subprocess.run([*NBDCTL, "status", b"\xff\xfe"], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"not valid UTF-8" in done.stderr


# Output that nobody, or not everybody, can take


@pytest.mark.usefixtures("fake")
def test_output_to_a_closed_pipe_ends_silently() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*NBDCTL, "list"], stdout=writer, stderr=-1, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_output_to_closed_files_does_not_fail(closed: str) -> None:
    command = f"{sys.executable} -m nbdd.ctl attach backup {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    expected = b"" if closed != "2>&-" else b"backup is /dev/nbd0, 10 GiB, from nbd://storage.example/backup\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


@pytest.mark.usefixtures("fake")
def test_output_to_a_full_disk_is_a_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*NBDCTL, "list"], stdout=full, stderr=-1, check=False)
    assert (done.returncode, done.stderr) == (1, b"nbdctl: The output can't be written: No space left on device.\n")


def test_stderr_that_is_full_leaves_the_status(fake: FakeManager) -> None:
    fake.devices.clear()
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([*NBDCTL, "frobnicate"], stderr=full, check=False).returncode == 2
        assert subprocess.run([*NBDCTL, "list"], stderr=full, check=False).returncode == 0
        environment = os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"}
        assert subprocess.run([*NBDCTL, "list"], stderr=full, check=False, env=environment).returncode == 1


def test_logs_of_libraries_are_not_shown() -> None:
    code = "import logging, nbdd.ctl.__main__ as m; m.main(['--version']); logging.error('noise')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_to_a_terminal_without_unicode_is_escaped(fake: FakeManager) -> None:
    fake.devices["backup"]["URI"] = "nbd://h/ü"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*NBDCTL, "list"], capture_output=True, check=True, env=environment)
    assert b"nbd://h/\\xfc" in done.stdout


# monitor


def test_monitor_prints_a_line_for_each_event_until_it_is_interrupted(fake: FakeManager) -> None:
    with Watching(NO_COLOR="1") as terminal:
        fake.change("backup", State="degraded", Connections=2, LastError=["org.x.Y", "a\nb."])
        fake.change("backup", LastError=["", ""])
        fake.add("1st", ABSENT)
        fake.remove("1st")
        terminal.wait_for("1st: no configuration")
        fake.leave()
        terminal.wait_for("nbdd stopped")
        terminal.process.send_signal(signal.SIGINT)
        status, text = terminal.finish()
    assert status == 0
    assert [line[9:] for line in text.splitlines()[1:] if line[2:3] == ":"] == [
        "backup: a\\nb; 1 of 2 connections left; mending",
        "1st: new in the configuration: nbd://storage.example/backup, detached",
        "1st: no configuration defines it any more",
        "nbdd stopped; attached devices stay attached, but lost connections are not replaced now",
    ]


def test_monitor_as_json_prints_an_object_for_each_event(fake: FakeManager) -> None:
    with Watching("--json") as terminal:
        fake.change("backup", State="degraded", LastError=["org.x.Y", "a"])
        fake.add("1st", PRESENT)
        fake.remove("1st")
        terminal.wait_for('"removed"')
        terminal.process.send_signal(signal.SIGINT)
        status, text = terminal.finish()
    assert status == 0
    changed, added, removed = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert abs(changed.pop("time") / 1e6 - time.time()) < 60
    failure = {"name": "org.x.Y", "message": "a"}
    assert changed == {"event": "changed", "name": "backup", "changes": {"state": "degraded", "last-error": failure}}
    assert added["device"] == DOCUMENT | {"name": "1st", "display-name": "1st"}
    assert (removed["event"], removed["name"]) == ("removed", "1st")


def test_monitor_sees_the_service_come_and_does_not_start_it(address: str, no_service: None) -> None:  # noqa: ARG001
    with Watching() as terminal:
        assert "not running now" in terminal.text
        with FakeManager(address) as fake:
            fake.add("backup", ABSENT)
            terminal.wait_for("backup: new in")
        terminal.wait_for("nbdd stopped")
    assert "nbdd started" in terminal.text


def test_monitor_ignores_signals_of_strangers(address: str, fake: FakeManager) -> None:
    with Watching() as terminal, FakeManager(address) as liar:  # the name is taken, so this one only waits for it
        liar.devices["backup"] = dict(PRESENT)
        for connection in liar.connections():
            liar.change("backup", to=connection, State="failed")
            liar.signal("/org/freedesktop/DBus", "org.freedesktop.DBus.NameOwnerChanged", "sss",
                        ["org.nbdd1", "", liar.bus.unique_name], to=connection)  # fmt: skip
        liar.connections()  # now the bus has passed on all of it
        fake.change("backup", State="detaching")
        terminal.wait_for("backup: detaching")
    assert {call.flags for call in fake.calls} == {NO_AUTOSTART}
    assert "failed" not in terminal.text
    assert "started" not in terminal.text


# The shell, and speed


def complete(line: str) -> list[str]:
    words = line.split(" ")
    environment = os.environ | {
        "_NBDCTL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    done = subprocess.run(NBDCTL, capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    return [row.partition(",")[2] for row in done.stdout.splitlines() if row]


def test_completion_offers_names_that_make_sense(fake: FakeManager) -> None:
    fake.devices["bare"] = ABSENT | {"Name": "bare"}
    assert complete("nbdctl status b") == ["backup", "bare"]
    assert complete("nbdctl attach b") == ["bare"]
    assert complete("nbdctl detach ") == ["backup"]
    assert {call.flags for call in fake.calls} == {NO_AUTOSTART}


@pytest.mark.usefixtures("no_service")
def test_completion_without_the_service_is_empty_and_silent() -> None:
    assert complete("nbdctl status b") == []


def test_help_and_usage_need_no_bus_library() -> None:
    code = "import sys, nbdd.ctl.__main__ as m; m.main(['attach', '--help']); sys.exit('dbus_next' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "NAME|URI" in done.stdout


def test_bus_library_is_imported_by_the_bus_package_only() -> None:
    for module in Path(show.__file__).parent.glob("*.py"):
        assert "import dbus_next" not in module.read_text()
        assert "from dbus_next" not in module.read_text()


def test_version_is_one_line(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("nbdctl")
    assert out.count("\n") == 1


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_command_has_help_and_json(run: Run, command: str) -> None:
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    assert ("--json" in out) == bool(command)


# Text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"),
     ((10 << 30) + 512, "10.0 GiB"), ((1 << 40) - 1, "1.0 TiB"), (1 << 63, "8 EiB"), ((1 << 64) - 1, "16.0 EiB")],
)  # fmt: skip
def test_size_is_in_binary_units(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (9000, "2 h 30 min"), (90000, "1 d 1 h")],
)
def test_duration_reads_well(seconds: int, text: str) -> None:
    assert duration(seconds) == text


@given(st.text(), st.integers(min_value=1, max_value=40))
def test_fit_text_is_within_its_columns(text: str, columns: int) -> None:
    assert show.width(show.fit(printable(text), columns)) <= columns


def test_json_has_every_property_of_the_reference() -> None:
    assert set(FIELDS) == set(properties("org.nbdd1.Device"))


def test_properties_of_another_version_do_no_harm() -> None:
    device = DeviceView.of({"Name": "x", "Colour": "red"})
    assert (device.name, device.state, device.size) == ("x", "unknown", 0)
