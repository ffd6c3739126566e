# SPDX-License-Identifier: MIT
"""How nbdctl ends: errors, usage, outputs that are closed or full, and how little it loads."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import nbdd.errors
from nbdd.bus.caller.client import ManagerProxy
from nbdd.bus.caller.failure import _classes
from nbdd.ctl import show
from nbdd.ctl.cli import cli
from nbdd.errors import NbddError
from tests.fakes.manager import DEADLINE, FakeManager, private_bus
from tests.fakes.terminal import NBDCTL, Run, Terminal


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


def test_help_and_usage_need_no_bus_library() -> None:
    code = "import sys, nbdd.ctl.__main__ as m; m.main(['attach', '--help']); sys.exit('dbus_next' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "NAME|URI" in done.stdout


def test_bus_library_is_imported_by_the_bus_package_only() -> None:
    for module in Path(show.__file__).parent.glob("*.py"):
        assert "import dbus_next" not in module.read_text()
        assert "from dbus_next" not in module.read_text()


def test_garbage_collector_is_left_alone_until_the_command_runs() -> None:
    assert gc.get_threshold()[0] < 50_000


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
