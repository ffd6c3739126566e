# SPDX-License-Identifier: MIT
"""The real `python -m nbdd` on a bus of the test's own: how it starts, reloads, suffers and ends. No kernel device."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.bus import (
    DEADLINE,
    ERROR,
    OBJECT_MANAGER,
    PEER,
    BusDaemon,
    BusError,
    Caller,
    FakePolkit,
    NotifySocket,
    caller,
    private_bus,
)
from tests.fakes.servers import Server, offers

# isort: split
from dbus_next.signature import Variant

TREE = Path(__file__).parents[2]
NAME = "org.nbdd1"
ROOT = "/org/nbdd1"
MANAGER = "org.nbdd1.Manager"
DEVICE = "org.nbdd1.Device"
OWN = "org.nbdd1.Error."

GOOD = "devices:\n  backup: {uri: 'nbd://127.0.0.1:1/backup'}\n  other: {uri: 'nbd://127.0.0.1:1/other'}\n"
BAD = "devices:\n  backup:\n    uri: nbd://127.0.0.1:1/backup\n    tiemout: 5\n    connections: many\n"

WITHOUT_NBD = pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="the nbd module is loaded on this machine")


class Daemon:
    """One nbdd process, with its configuration, its run-time directory and its systemd."""

    def __init__(self, folder: Path, bus: BusDaemon) -> None:
        self.etc = folder / "etc"
        self.run = folder / "run"
        self.etc.mkdir()
        self.config = self.etc / "nbdd.yaml"
        self.config.write_text(GOOD)
        self.systemd = NotifySocket()
        self._bus = bus
        self._log = folder / "stderr"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def begin(self, **environment: str) -> None:
        """Start it; do not wait for anything."""
        # What the service manager of whoever runs the tests put there is not for this one.
        own = ("LISTEN_", "WATCHDOG_", "JOURNAL_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nbdd", str(self.etc)],
                cwd=TREE,
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={
                    **inherited,
                    "DBUS_SYSTEM_BUS_ADDRESS": self._bus.address,
                    "RUNTIME_DIRECTORY": str(self.run),
                    "NOTIFY_SOCKET": self.systemd.path,
                    **environment,
                },
            )

    def start(self, **environment: str) -> list[bytes]:
        """Start it and wait until it says that it is ready; returns what it told systemd."""
        self.begin(**environment)
        return self.systemd.wait_for(b"READY=1")

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(DEADLINE)

    def end(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.wait()

    @property
    def log(self) -> str:
        """All that it wrote to stderr."""
        return self._log.read_text()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.systemd.__exit__()


@pytest.fixture
def bus() -> Iterator[BusDaemon]:
    with private_bus() as daemon:
        yield daemon


@pytest.fixture
def nbdd(tmp_path: Path, bus: BusDaemon) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, bus)
    yield daemon
    daemon.close()
    assert "Traceback" not in daemon.log, daemon.log
    assert "internal error" not in daemon.log, daemon.log


def children(pid: int) -> list[int]:
    """Every descendant of a process, the direct ones first."""
    try:
        direct = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*direct, *(grandchild for child in direct for grandchild in children(child))]


@contextlib.contextmanager
def no_survivors(pid: int) -> Iterator[list[int]]:
    """What the process has for children now is gone soon after the end of the block."""
    pids = children(pid)
    fds = []
    for child in pids:
        with contextlib.suppress(ProcessLookupError):  # a child may just have ended
            fds.append(os.pidfd_open(child))
    try:
        yield pids
        for fd in fds:
            # No grace for those whom nobody told: a descriptor of a process is readable when it has ended.
            assert select.select([fd], [], [], DEADLINE)[0], "a child was left behind"
    finally:
        for fd in fds:
            os.close(fd)


class Client(Caller):
    """A caller of nbdd."""

    async def call(self, member: str, *body: Any, types: str = "") -> Any:
        return await self.ask(NAME, ROOT, MANAGER, member, *body, types=types)

    async def fails(self, member: str, *body: Any, types: str = "") -> tuple[str, str]:
        """The name and the text of the error that a call ends with."""
        with pytest.raises(BusError) as caught:
            await self.call(member, *body, types=types)
        return caught.value.name, str(caught.value)

    async def devices(self) -> dict[str, dict[str, Any]]:
        """The properties of every device, by its name."""
        objects = await self.ask(NAME, ROOT, OBJECT_MANAGER, "GetManagedObjects")
        told = [interfaces[DEVICE] for interfaces in objects.values()]
        return {one["Name"].value: {key: variant.value for key, variant in one.items()} for one in told}

    async def until(self, device: str, **wanted: Any) -> None:
        """Wait for signals until the device's properties are so."""
        while True:
            told = (await self.devices())[device]
            if all(told[key] == value for key, value in wanted.items()):
                return
            await self.signals.get()


@asynccontextmanager
async def client(bus: BusDaemon) -> AsyncIterator[Client]:
    """Somebody who may do everything, root or not, and hears all signals of nbdd."""
    async with caller(bus.address) as polkit, caller(bus.address) as made:
        await FakePolkit().start(polkit)
        client = Client(made.bus)
        await client.listen(NAME)
        yield client


# Start and end


async def test_daemon_starts_serves_configured_devices_and_ends_leaving_nothing(nbdd: Daemon, bus: BusDaemon) -> None:
    told = nbdd.start() + nbdd.systemd.wait_for(b"STATUS=0/2 attached")
    assert len([message for message in told if message.startswith(b"STATUS=")]) == 1, (
        "one for all that is added at once"
    )
    async with client(bus) as here:
        devices = await here.devices()
        assert set(devices) == {"backup", "other"}
        assert devices["backup"]["State"] == "detached"
        assert devices["backup"]["Configured"] is True
    with no_survivors(nbdd.process.pid) as pids:
        assert pids, "the fork server"
        assert nbdd.end() == 0
    assert nbdd.systemd.wait_for(b"STOPPING=1")
    assert list(nbdd.run.rglob("*.json")) == []


def test_daemon_killed_has_successor_ready_within_two_seconds(nbdd: Daemon, show: Callable[[str], None]) -> None:
    """This machine's processor is a real one; those of the guests, which have the devices, are emulated in most places.

    The two seconds are systemd's pause before the restart, the start, and the adoption by a worker, for which the
    emulated ones need a third of one (tests/system/test_survival.py).
    """
    [pause] = re.findall(r"^RestartSec=(\d+)ms$", (TREE / "systemd/nbdd.service").read_text(), re.MULTILINE)
    adoption, took = 0.3, []
    for _ in range(4):
        start = time.monotonic()
        nbdd.start()
        took.append(time.monotonic() - start)
        nbdd.process.kill()
        nbdd.wait()
    show(f"from the start of a manager until it is ready: {min(took):.2f} to {max(took):.2f} s")
    # The best of them, as other tests run beside this one.
    assert int(pause) / 1000 + min(took) + adoption <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_daemon_exits_0_on_sigterm_and_sigint(nbdd: Daemon, number: signal.Signals) -> None:
    nbdd.start()
    with no_survivors(nbdd.process.pid):
        nbdd.process.send_signal(number)
        assert nbdd.wait() == 0


def test_daemon_starts_without_configuration_file(nbdd: Daemon) -> None:
    nbdd.config.unlink()
    nbdd.start()
    assert nbdd.end() == 0


async def test_second_instance_exits_says_so_and_leaves_the_first_alone(
    nbdd: Daemon, bus: BusDaemon, tmp_path: Path
) -> None:
    nbdd.start()
    # The first is the fork server, which may have a child of its own for a moment, when it rehearses.
    server = children(nbdd.process.pid)[0]
    (tmp_path / "second").mkdir()
    second = Daemon(tmp_path / "second", bus)
    try:
        second.begin()
        assert second.wait() == 1
        [line] = second.log.splitlines()
        assert line.startswith("nbdd: Another nbdd is running: it owns the bus name org.nbdd1. ")
        assert line.endswith(".")
        assert second.systemd.receive() is None
        assert not second.run.exists()
    finally:
        second.close()
    async with client(bus) as here:
        assert set(await here.devices()) == {"backup", "other"}
    assert children(nbdd.process.pid)[0] == server
    assert nbdd.end() == 0


def test_bad_configuration_exits_78_and_names_every_place(nbdd: Daemon) -> None:
    nbdd.config.write_text(BAD)
    (nbdd.etc / "devices.d").mkdir()
    (nbdd.etc / "devices.d" / "more.yaml").write_text("devices: [\n")
    nbdd.begin()
    assert nbdd.wait() == 78
    assert nbdd.log.startswith("nbdd: the configuration is bad, nothing was started:\n")
    assert f"{nbdd.config}:4:5: " in nbdd.log
    assert f"{nbdd.config}:5:18: " in nbdd.log
    assert f"{nbdd.etc}/devices.d/more.yaml:" in nbdd.log
    assert nbdd.systemd.receive() is None or b"READY=1" not in nbdd.log.encode()


def test_missing_bus_exits_1_with_one_sentence(nbdd: Daemon, bus: BusDaemon) -> None:
    bus.kill()
    nbdd.begin()
    assert nbdd.wait() == 1
    [line] = nbdd.log.splitlines()
    assert line.startswith("nbdd: The system bus can't be reached: ")
    assert line.endswith("nbdd needs dbus.service.")


async def test_ready_does_not_wait_for_servers(nbdd: Daemon, bus: BusDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        nbdd.config.write_text(f"devices:\n  backup: {{uri: 'nbd://127.0.0.1:{port}/x', attach: boot}}\n")
        nbdd.start()
        # It is on its way, and the server has not said a word.
        conn, _ = silent.accept()
        with conn:
            async with client(bus) as here:
                await here.until("backup", State="connecting")
            nbdd.systemd.wait_for(b"STATUS=0/1 attached (1 connecting)")
            with no_survivors(nbdd.process.pid):
                assert nbdd.end() == 0


async def test_boot_device_keeps_trying_and_reports_last_error(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.config.write_text("devices:\n  backup: {uri: 'nbd://127.0.0.1:1/x', attach: boot}\n")
    nbdd.start()
    async with client(bus) as here:
        while (told := (await here.devices())["backup"])["LastError"][0] != f"{OWN}ConnectFailed":
            await here.signals.get()
        assert told["State"] == "connecting"
        # Tried again, by another worker.
        while (await here.devices())["backup"]["WorkerPID"] in (0, told["WorkerPID"]):
            await here.signals.get()
        assert await here.call("Detach", "backup", {}, types="sa{sv}") is None
        await here.until("backup", State="detached")
    assert nbdd.end() == 0


def test_signals_during_slow_start_are_handled_after_it(nbdd: Daemon) -> None:
    """Both would end a process that does not expect them, and leave its children in the middle of something."""
    (nbdd.run / "devices").mkdir(parents=True)
    record = nbdd.run / "devices" / "slow.json"
    # Reading it takes until somebody writes, which is how long this start takes.
    os.mkfifo(record)
    nbdd.begin()
    with record.open("w") as pipe, no_survivors(nbdd.process.pid) as pids:
        assert pids, "the fork server"
        nbdd.process.send_signal(signal.SIGHUP)
        nbdd.process.send_signal(signal.SIGTERM)
        pipe.write("nothing of ours")
        pipe.close()
        nbdd.systemd.wait_for(b"READY=1")
        assert nbdd.wait() == 0
    assert "slow.json can't be read, its device is left alone" in nbdd.log


def test_watchdog_is_notified(nbdd: Daemon) -> None:
    nbdd.start(WATCHDOG_USEC="100000")
    nbdd.systemd.wait_for(b"WATCHDOG=1")
    nbdd.systemd.wait_for(b"WATCHDOG=1")
    assert nbdd.end() == 0


# Reload


async def test_sighup_reloads(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.start()
    nbdd.config.write_text(GOOD.replace("other", "another"))
    nbdd.process.send_signal(signal.SIGHUP)
    told = nbdd.systemd.wait_for(b"READY=1")
    assert [message for message in told if message.startswith(b"RELOADING=1\nMONOTONIC_USEC=")]
    async with client(bus) as here:
        assert set(await here.devices()) == {"backup", "another"}
    assert nbdd.end() == 0
    assert "reloaded: 1 added, 0 changed, 1 removed" in nbdd.log


async def test_sighup_with_bad_file_changes_nothing_and_says_why(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.start()
    nbdd.config.write_text(BAD)
    nbdd.process.send_signal(signal.SIGHUP)
    nbdd.systemd.wait_for(b"READY=1")
    async with client(bus) as here:
        assert set(await here.devices()) == {"backup", "other"}
    assert nbdd.end() == 0
    assert f"{nbdd.config}:4:5: " in nbdd.log


async def test_reload_returns_what_it_did(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.start()
    async with client(bus) as here:
        assert await here.call("Reload") == [[], [], []]
        assert here.signals.empty()
        text = GOOD.replace("other:", "another:").replace("1/backup'", "1/changed', timeout: 7")
        await asyncio.to_thread(nbdd.config.write_text, text)
        assert await here.call("Reload") == [["another"], ["backup"], ["other"]]
        devices = await here.devices()
        assert set(devices) == {"backup", "another"}
        assert devices["backup"]["URI"] == "nbd://127.0.0.1:1/changed"
        assert devices["backup"]["Timeout"] == 7
    assert nbdd.end() == 0


async def test_reload_of_bad_file_fails_with_every_place_and_changes_nothing(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.start()
    async with client(bus) as here:
        before = await here.devices()
        await asyncio.to_thread(nbdd.config.write_text, BAD)
        name, text = await here.fails("Reload")
        assert name == f"{OWN}InvalidConfig"
        assert [line.split(": ")[0] for line in text.splitlines()] == [f"{nbdd.config}:4:5", f"{nbdd.config}:5:18"]
        assert await here.devices() == before
        assert here.signals.empty()
    assert nbdd.end() == 0


# Calls


@pytest.mark.parametrize(
    ("member", "body", "types", "error"),
    [
        ("Attach", ["nope", {}], "sa{sv}", f"{OWN}NoSuchDevice"),
        ("Attach", ["", {}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["a b", {}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["../../etc", {}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["über", {}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["x" * 255, {}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["backup", {"colour": Variant("s", "red")}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["backup", {"connections": Variant("u", 0)}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["backup", {"device": Variant("s", "/dev/sda")}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["backup", {"block-size": Variant("u", 513)}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("Attach", ["backup"], "s", f"{ERROR}InvalidArgs"),
        ("AttachURI", ["nonsense", {}], "sa{sv}", f"{OWN}InvalidURI"),
        ("AttachURI", ["http://127.0.0.1:1/x", {}], "sa{sv}", f"{OWN}InvalidURI"),
        ("AttachURI", ["nbd://127.0.0.1:70000/x", {}], "sa{sv}", f"{OWN}InvalidURI"),
        ("AttachURI", ["nbd://127.0.0.1:1/%zz", {}], "sa{sv}", f"{OWN}InvalidURI"),
        ("AttachURI", ["nbds://127.0.0.1:1/x", {}], "sa{sv}", f"{OWN}TLSFailed"),
        ("AttachURI", ["nbd://127.0.0.1:1/x", {"name": Variant("s", "backup")}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("AttachURI", ["nbd://127.0.0.1:1/x", {"name": Variant("s", "a/b")}], "sa{sv}", f"{ERROR}InvalidArgs"),
        ("AttachURI", ["nbd://127.0.0.1:1/x", {}], "sa{sv}", f"{OWN}ConnectFailed"),
        ("Detach", ["backup", {}], "sa{sv}", f"{OWN}NotAttached"),
        ("Detach", ["nope", {}], "sa{sv}", f"{OWN}NoSuchDevice"),
        ("SetTimeout", ["backup", 5], "su", f"{OWN}NotAttached"),
        ("ListExports", ["nbd://127.0.0.1:1", {}], "sa{sv}", f"{OWN}ConnectFailed"),
        ("ListExports", ["nbds://127.0.0.1:1", {}], "sa{sv}", f"{OWN}TLSFailed"),
        ("ListExports", ["nbd+unix:///?socket=/nonexistent", {}], "sa{sv}", f"{OWN}ConnectFailed"),
    ],
)
async def test_wrong_call_ends_with_its_error_and_harms_nothing(
    shared: Daemon, shared_bus: BusDaemon, *, member: str, body: list[Any], types: str, error: str
) -> None:
    assert shared.process.poll() is None
    async with client(shared_bus) as here:
        before = await here.devices()
        name, text = await here.fails(member, *body, types=types)
        assert name == error
        assert text.endswith(".")
        assert await here.devices() == before


@pytest.fixture(scope="module")
def shared_bus() -> Iterator[BusDaemon]:
    with private_bus() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def shared(shared_bus: BusDaemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One nbdd for many calls that must not change it."""
    daemon = Daemon(tmp_path_factory.mktemp("shared"), shared_bus)
    daemon.start()
    yield daemon
    assert daemon.end() == 0
    daemon.close()
    assert "Traceback" not in daemon.log, daemon.log


async def test_list_exports_returns_exports_of_a_server(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.start()
    with Server(offers({b"": 512, b"backup": 1 << 40, b"b\xffd": 1024, b"empty": 0})) as server:
        async with client(bus) as here:
            told = await here.call("ListExports", str(server.uri()), {}, types="sa{sv}")
            found = [{key: variant.value for key, variant in one.items()} for one in told]
            sizes = [("", 512), ("backup", 1 << 40), ("b?d", 1024), ("empty", None)]
            assert [(one["name"], one.get("size")) for one in found] == sizes
            assert "problem" in found[3]
            assert set(await here.devices()) == {"backup", "other"}
    assert nbdd.end() == 0


@WITHOUT_NBD
async def test_attach_without_nbd_module_fails_and_says_what_to_load(nbdd: Daemon, bus: BusDaemon) -> None:
    with Server(offers({b"backup": 1 << 20})) as server:
        nbdd.config.write_text(f"devices:\n  backup: {{uri: '{server.uri('backup')}'}}\n")
        nbdd.start()
        async with client(bus) as here:
            name, text = await here.fails("Attach", "backup", {}, types="sa{sv}")
            assert name == f"{OWN}KernelError"
            assert "modprobe nbd" in text
            told = (await here.devices())["backup"]
            assert told["State"] == "failed"
            assert told["LastError"] == [name, text]
            assert told["WorkerPID"] == 0
            # And what was attached by hand alone leaves nothing behind.
            name, text = await here.fails("AttachURI", str(server.uri("backup")), {}, types="sa{sv}")
            assert name == f"{OWN}KernelError"
            assert set(await here.devices()) == {"backup"}
            assert await here.call("Detach", "backup", {}, types="sa{sv}") is None
            assert (await here.devices())["backup"]["State"] == "detached"
    assert list(nbdd.run.rglob("*.json")) == []
    with no_survivors(nbdd.process.pid) as pids:
        assert len(pids) == 1, "the workers that failed are gone, the fork server is there"
        assert nbdd.end() == 0


async def test_attach_by_two_callers_is_one_attempt(nbdd: Daemon, bus: BusDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        nbdd.config.write_text(f"devices:\n  backup: {{uri: 'nbd://127.0.0.1:{port}/x'}}\n")
        nbdd.start()
        async with client(bus) as here:
            calls = [asyncio.create_task(here.fails("Attach", "backup", {}, types="sa{sv}")) for _ in range(2)]
            conn, _ = await asyncio.to_thread(listener.accept)
            await here.until("backup", State="connecting")
            # Both calls are in: the bus keeps the order.
            await here.ask(NAME, ROOT, PEER, "Ping")
            conn.close()
            one, other = await asyncio.gather(*calls)
            assert one == other
            assert one[0] == f"{OWN}NegotiationFailed"
            assert (await here.devices())["backup"]["State"] == "failed"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert nbdd.end() == 0


async def test_detach_ends_attach_under_way(nbdd: Daemon, bus: BusDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        nbdd.config.write_text(f"devices:\n  backup: {{uri: 'nbd://127.0.0.1:{port}/x'}}\n")
        nbdd.start()
        async with client(bus) as here:
            attach = asyncio.create_task(here.fails("Attach", "backup", {}, types="sa{sv}"))
            conn, _ = await asyncio.to_thread(listener.accept)
            with conn:
                assert await here.call("Detach", "backup", {}, types="sa{sv}") is None
                name, _ = await attach
                assert name == f"{OWN}NotAttached"
                assert (await here.devices())["backup"]["State"] == "detached"
    assert nbdd.end() == 0


# What it suffers


async def test_daemon_survives_death_of_fork_server(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.start()
    fork_server = children(nbdd.process.pid)[0]
    with no_survivors(nbdd.process.pid):
        os.kill(fork_server, signal.SIGKILL)
    async with client(bus) as here:
        name, _ = await here.fails("ListExports", "nbd://127.0.0.1:1", {}, types="sa{sv}")
        assert name == f"{OWN}ConnectFailed"
        assert set(await here.devices()) == {"backup", "other"}
    with no_survivors(nbdd.process.pid) as pids:
        assert pids[0] != fork_server
        assert nbdd.end() == 0


async def test_stop_answers_calls_under_way(nbdd: Daemon, bus: BusDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        nbdd.config.write_text(f"devices:\n  backup: {{uri: 'nbd://127.0.0.1:{port}/x'}}\n")
        nbdd.start()
        async with client(bus) as here:
            attach = asyncio.create_task(here.fails("Attach", "backup", {}, types="sa{sv}"))
            listing = asyncio.create_task(here.fails("ListExports", f"nbd://127.0.0.1:{port}", {}, types="sa{sv}"))
            conns = [await asyncio.to_thread(listener.accept) for _ in range(2)]
            with no_survivors(nbdd.process.pid) as pids:
                assert len(pids) >= 5, "the fork server, two workers, and a child of each"
                assert await asyncio.to_thread(nbdd.end) == 0
            for call in (attach, listing):
                name, text = await call
                assert name == f"{ERROR}Failed"
                assert text
            for conn, _ in conns:
                conn.close()


async def test_daemon_killed_leaves_no_process_behind(nbdd: Daemon, bus: BusDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        nbdd.config.write_text(f"devices:\n  backup: {{uri: 'nbd://127.0.0.1:{port}/x', attach: boot}}\n")
        nbdd.start()
        conn, _ = listener.accept()
        with conn, no_survivors(nbdd.process.pid) as pids:
            assert len(pids) >= 3, "the fork server, a worker and its child"
            nbdd.process.kill()
            assert nbdd.wait() == -signal.SIGKILL
            # The worker is in the middle of a handshake, and looks up when that ends.
            conn.close()
    # And its successor starts as if nothing had been.
    nbdd.config.write_text(GOOD)
    nbdd.start()
    await still_serves(bus)
    assert nbdd.end() == 0


async def still_serves(bus: BusDaemon) -> None:
    async with client(bus) as here:
        assert {"backup", "other"} <= set(await here.devices())


def test_death_of_bus_ends_daemon_so_that_systemd_restarts_it(nbdd: Daemon, bus: BusDaemon) -> None:
    nbdd.start()
    with no_survivors(nbdd.process.pid):
        bus.kill()
        assert nbdd.wait() == 1
    assert "the system bus is gone" in nbdd.log
