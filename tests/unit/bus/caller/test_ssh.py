# SPDX-License-Identifier: MIT
"""nbdctl --host: every command on another machine; ssh is a script here, and the machine a private bus."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import click
import pytest

from nbdd.ctl.__main__ import main
from nbdd.ctl.cli import cli
from nbdd.kernel.usage import Usage
from tests.fakes.manager import DEADLINE, PRESENT, FakeManager, private_bus

HOST = "root@storage.example"

SPLICE = """
import os, socket, sys, threading
bus = socket.socket(socket.AF_UNIX)
bus.connect(os.environ["THERE"].removeprefix("unix:path="))
def pour(read, write, end):
    while octets := read(65536):
        write(octets)
    end()
out = bus.recv, lambda octets: os.write(1, octets), lambda: os._exit(0)
threading.Thread(target=pour, args=out, daemon=True).start()
pour(lambda count: os.read(0, count), bus.sendall, lambda: bus.shutdown(socket.SHUT_WR))
"""
"""A bridge that passes everything on unread, the login too; systemd's answers the login itself, up to 257 at least."""

BRIDGES = {"systemd's": "systemd-stdio-bridge --bus-path=$THERE", "a plain one": f"{sys.executable} -c '{SPLICE}'"}

Run = Callable[..., tuple[int, str, str]]
Ssh = Callable[[str], None]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the bus of the other machine."""
    with private_bus(tmp_path_factory.mktemp("bus")) as (address, _):
        yield address


@pytest.fixture
def ssh(tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch) -> Ssh:
    """Call it with the lines of a shell script: they become ssh, and there is no bus on this machine."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    monkeypatch.setenv("THERE", there)
    monkeypatch.setenv("ARGUMENTS", str(tmp_path / "arguments"))

    def write(script: str) -> None:
        program = tmp_path / "ssh"
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"$ARGUMENTS"\necho $$ >>"$ARGUMENTS.pids"\n{script}\n')
        program.chmod(0o755)

    return write


@pytest.fixture(params=BRIDGES)
def bridge(request: pytest.FixtureRequest, ssh: Ssh) -> None:
    command = BRIDGES[request.param]
    if shutil.which(command.split()[0]) is None:
        pytest.skip("there is no systemd-stdio-bridge here")
    ssh(f"exec {command}")


@pytest.fixture
def fake(there: str) -> Iterator[FakeManager]:
    with FakeManager(there) as manager:
        manager.devices["backup"] = PRESENT | {"Name": "backup"}
        manager.replies["Reload"] = ("asasas", [[], [], []])
        manager.replies["ListExports"] = ("aa{sv}", [[]])
        manager.replies["GetStatistics"] = ("a{st}", [{}])
        yield manager


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def nbdctl(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        pids = tmp_path / "arguments.pids"
        if pids.exists():
            assert [pid for pid in pids.read_text().split() if Path("/proc", pid).exists()] == []
        return status, captured.out, captured.err

    return nbdctl


def asked(tmp_path: Path) -> list[str]:
    """What ssh was called with last."""
    return (tmp_path / "arguments").read_text().splitlines()


@pytest.mark.usefixtures("bridge", "fake")
def test_host_option_runs_command_on_other_machine(run: Run, tmp_path: Path) -> None:
    status, out, err = run("--host", HOST, "list", "--json")
    assert (status, [device["name"] for device in json.loads(out)["devices"]], err) == (0, ["backup"], "")
    assert asked(tmp_path) == ["-xT", "--", HOST, "systemd-stdio-bridge"]


COMMANDS: dict[str, tuple[list[str], str]] = {
    "attach": (["backup"], "Attach"),
    "detach": (["backup"], "Detach"),
    "list": ([], "GetManagedObjects"),
    "status": (["backup"], "GetStatistics"),
    "set-timeout": (["backup", "5"], "SetTimeout"),
    "reconnect": (["backup"], "Reconnect"),
    "resize": (["backup"], "Resize"),
    "exports": (["nbd://storage.example"], "ListExports"),
    "reload": ([], "Reload"),
    "top": (["-n", "1", "-d", "0.1"], "GetStatistics"),
}

HERE = {"doctor", "import"}
"""Commands about the machine that they run on."""


@pytest.mark.usefixtures("bridge")
@pytest.mark.parametrize("command", COMMANDS)
def test_host_option_is_taken_before_and_after_every_command(fake: FakeManager, run: Run, command: str) -> None:
    arguments, member = COMMANDS[command]
    assert run("-H", HOST, command, *arguments)[0] == 0
    assert run(command, *arguments, "--host", HOST)[0] == 0
    assert [call.member for call in fake.calls].count(member) == (4 if command == "top" else 2)  # which looks twice


def test_host_option_is_missing_in_no_command() -> None:
    assert COMMANDS.keys() | {"monitor"} | HERE == cli.commands.keys()
    for name, command in cli.commands.items():
        has = any("--host" in option.opts for option in command.params if isinstance(option, click.Option))
        assert has == (name not in HERE)


@pytest.mark.parametrize("command", sorted(HERE))
def test_host_option_is_refused_by_commands_about_this_machine(run: Run, command: str) -> None:
    status, out, err = run("--host", HOST, command)
    assert (status, out) == (2, "")
    assert "run it there" in err


@pytest.mark.usefixtures("bridge", "fake")
def test_users_of_a_remote_device_are_not_searched_on_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object) -> None:
        pytest.fail("looked at this machine")

    for name in ("users", "all_claims"):
        monkeypatch.setattr(Usage, name, look)
    [device] = json.loads(run("--host", HOST, "list", "--json")[1])["devices"]
    assert device["users"] is None
    assert run("--host", HOST, "list")[1].splitlines()[1].endswith("  ?")
    status = json.loads(run("--host", HOST, "status", "/dev/nbd0", "--json")[1])
    assert (status["name"], status["users"], status["users-complete"]) == ("backup", None, False)
    assert "Used by" not in run("--host", HOST, "status", "backup")[1]


@pytest.mark.usefixtures("bridge", "fake")
def test_host_option_of_the_command_itself_wins(run: Run, tmp_path: Path) -> None:
    assert run("--host", "one.example", "list", "--host", "two.example")[0] == 0
    assert asked(tmp_path)[2] == "two.example"


class Monitor:
    """`nbdctl monitor` of the other machine, its stderr a terminal; in ``with`` once it watches."""

    def __init__(self) -> None:
        self.terminal, end = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nbdd.ctl", "--host", HOST, "monitor"],
            stdout=subprocess.PIPE, stderr=end, text=True, env=os.environ | {"TERM": "xterm"}, start_new_session=True,
        )  # fmt: skip
        os.close(end)

    def __enter__(self) -> Self:
        self.hear("Ctrl-C ends it.\r\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.terminal)

    def hear(self, wanted: str) -> str:
        """What is said up to `wanted`."""
        text, end = "", time.monotonic() + DEADLINE
        while wanted not in text:
            assert select.select([self.terminal], [], [], max(end - time.monotonic(), 0))[0], text
            text += os.read(self.terminal, 4096).decode()
        return text


@pytest.mark.usefixtures("bridge")
def test_monitor_of_remote_host_ends_with_ctrl_c_which_ssh_gets_too(fake: FakeManager) -> None:
    with Monitor() as monitor:
        fake.change("backup", State="degraded")
        assert monitor.process.stdout is not None
        assert monitor.process.stdout.readline().endswith(
            "backup: a connection is lost; 1 of 1 connections left; mending\n"
        )
        os.killpg(monitor.process.pid, signal.SIGINT)
        assert monitor.process.wait(DEADLINE) == 0


@pytest.mark.usefixtures("bridge", "fake")
def test_ssh_connection_that_is_lost_is_one_sentence(tmp_path: Path) -> None:
    with Monitor() as monitor:
        os.kill(int((tmp_path / "arguments.pids").read_text()), signal.SIGKILL)
        said = f"nbdctl: The connection to the system bus of {HOST} was lost. See `systemctl status nbdd`.\r\n"
        assert monitor.hear(said) == said
        assert monitor.process.wait(DEADLINE) == 1


RESOLVE = "ssh: Could not resolve hostname x: Name or service not known"
CHATTY = " came instead of D-Bus; perhaps a start-up file of the shell there says it"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"echo Welcome. >&2; echo '{RESOLVE}\r' >&2; exit 255", RESOLVE),
        ("echo 'Permission denied (publickey).' >&2; exit 255", "Permission denied (publickey)"),
        ("echo 'sh: not found' >&2; exit 127", "there is no systemd-stdio-bridge, which comes with systemd"),
        ("echo 'Failed to start bus client: No such file' >&2; exit 1", "Failed to start bus client: No such file"),
        ("exit 255", "it hung up"),
        ("exit 1", "systemd-stdio-bridge failed there, and the journal there says why"),
        ("printf 'Hello, you.\\nDATA\\r\\n'; cat >/dev/null", f"'Hello, you.'{CHATTY}"),
        ("printf 'REJECTED EXTERNAL\\r\\n'; cat >/dev/null", f"'REJECTED EXTERNAL'{CHATTY}"),
    ],
)
def test_ssh_failure_is_one_sentence(ssh: Ssh, run: Run, script: str, reason: str) -> None:
    ssh(script)
    said = f"nbdctl: The system bus of {HOST} can't be reached with ssh: {reason}.\n"
    assert run("--host", HOST, "list") == (1, "", said)


def test_bridge_is_sent_no_user_id_of_this_machine(ssh: Ssh, run: Run) -> None:
    ssh("head -c 16 | tr -d '\\0' >&2; exit 255")
    assert run("--host", HOST, "list")[2].endswith(": AUTH EXTERNAL.\n")


def test_ssh_that_hangs_is_given_up(ssh: Ssh, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh("exec sleep 60")
    monkeypatch.setattr("nbdd.bus.caller.client._REMOTE_SECONDS", 0.5)
    said = f"nbdctl: The system bus of {HOST} can't be reached with ssh: it does not answer.\n"
    assert run("--host", HOST, "list") == (1, "", said)


def test_ssh_that_is_missing_is_one_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = f"nbdctl: There is no ssh to reach {HOST} with: install it (package openssh-client).\n"
    assert run("--host", HOST, "list") == (1, "", said)


@pytest.mark.parametrize("host", ["", " ", "-oProxyCommand=touch /tmp/x", "a\nb"])
def test_host_that_is_invalid_never_reaches_ssh(ssh: Ssh, run: Run, tmp_path: Path, host: str) -> None:
    ssh("exit 0")
    assert run(f"--host={host}", "list")[0] == 2
    assert not (tmp_path / "arguments").exists()


def complete(line: str) -> list[str]:
    """What a shell would offer for `line`, whose last word is begun."""
    environment = os.environ | {"_NBDCTL_COMPLETE": "bash_complete", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(line.split(" ")) - 1)
    command = [sys.executable, "-m", "nbdd.ctl"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert done.stderr == ""
    return [entry.split(",", 1)[1] for entry in done.stdout.split()]


@pytest.mark.usefixtures("bridge", "fake")
def test_completion_of_remote_names_never_asks_for_a_password(tmp_path: Path) -> None:
    assert complete(f"nbdctl --host {HOST} status b") == ["backup"]
    assert "-oBatchMode=yes" in asked(tmp_path)
    assert complete(f"nbdctl status -H {HOST} b") == ["backup"]
    assert complete("nbdctl status --h") == ["--host", "--help"]


def test_completion_is_empty_and_silent_if_ssh_fails(ssh: Ssh) -> None:
    ssh("echo 'Permission denied (publickey).' >&2; exit 255")
    assert complete(f"nbdctl --host {HOST} status b") == []
