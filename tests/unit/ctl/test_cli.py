# SPDX-License-Identifier: MIT
"""The commands of nbdctl against a fake nbdd on a private bus: what they send, and what they print."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import pytest
from dbus_next.signature import Variant

from nbdd.ctl.find import is_uri
from tests.fakes.manager import ABSENT, DEADLINE, PRESENT, PRESENT_JSON, FakeManager
from tests.fakes.terminal import NBDCTL, Run, Terminal

INTERACTIVE = 4


def options(fake: FakeManager, member: str) -> dict[str, tuple[str, Any]]:
    return {key: (value.signature, value.value) for key, value in fake.wait_for(member).body[1].items()}


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


def test_list_as_json_has_keys_that_scripts_can_rely_on(fake: FakeManager, run: Run) -> None:
    assert json.loads(run("list", "--json")[1]) == {"devices": [PRESENT_JSON | {"users": []}]}
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
