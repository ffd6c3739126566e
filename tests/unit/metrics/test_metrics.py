# SPDX-License-Identifier: MIT
"""What nbdd-metrics promises: to Prometheus, to nbdd, which it must not start, and of clients that mean it no good."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

from nbdd.bus.caller.device import DeviceView
from nbdd.errors import NbddError
from nbdd.metrics import textfile
from nbdd.metrics.__main__ import main
from nbdd.metrics.families import OPENMETRICS, PLAIN, open_text, text
from nbdd.metrics.gather import Snapshot, gather
from nbdd.metrics.server import HEAD_BYTES, MAX_CLIENTS, Server
from tests.fakes.asserts import run
from tests.fakes.manager import ABSENT, DEADLINE, PRESENT, FakeManager

NO_AUTOSTART = 2
COUNTS = {
    "reads": 1, "writes": 2, "discards": 3, "flushes": 4, "read-bytes": 512, "written-bytes": 1024,
    "discarded-bytes": 4096, "in-flight": 5, "io-time": 1500,
}  # fmt: skip
LABELS = {"device": "backup"}


@pytest.fixture
def fake(fake: FakeManager) -> FakeManager:
    fake.replies["GetStatistics"] = ("a{st}", [COUNTS])
    return fake


def families(snapshot: Snapshot) -> dict[str, Metric]:
    """What a reader of OpenMetrics, which is strict, makes of it."""
    return {family.name: family for family in read_openmetrics(open_text(snapshot).decode())}  # type: ignore[no-untyped-call]


def samples(snapshot: Snapshot) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in families(snapshot).values():
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def device(**told: Any) -> DeviceView:
    """A device that is attached, but for what is told."""
    return DeviceView.of(PRESENT | {"Name": "backup"} | told)


# What is gathered


def test_metrics_have_every_property_of_a_device(fake: FakeManager) -> None:
    fake.change("backup", Connections=4, LiveConnections=3, Reconnects=7, State="degraded", Size=(1 << 63) + 1)
    found = samples(run(gather()))
    assert found["nbdd_up"] == [({}, 1)]
    assert found["nbdd_build_info"] == [({"version": "0.1.0"}, 1)]
    wanted = {
        "configured_connections": 4, "live_connections": 3, "reconnects_total": 7, "size_bytes": float(1 << 63),
        "dead_timeout_seconds": 300, "attached_timestamp_seconds": 1_700_000_000, "without_link_seconds": 0,
        "read_bytes_total": 512, "written_bytes_total": 1024, "discarded_bytes_total": 4096, "requests_in_flight": 5,
        "io_time_seconds_total": 1.5, "statistics_up": 1,
    }  # fmt: skip
    assert {name: found[f"nbdd_device_{name}"] for name in wanted} == {n: [(LABELS, v)] for n, v in wanted.items()}
    requests = {labels["kind"]: value for labels, value in found["nbdd_device_requests_total"]}
    assert requests == {"read": 1, "write": 2, "discard": 3, "flush": 4}
    assert found["nbdd_device_info"] == [
        (
            LABELS | {"uri": "nbd://storage.example/backup", "node": "/dev/nbd0", "read_only": "false",
                      "encryption": "none", "configured": "true"},
            1,
        )
    ]  # fmt: skip
    states = {labels["nbdd_device_state"]: value for labels, value in found["nbdd_device_state"]}
    assert [state for state, value in states.items() if value] == ["degraded"]
    assert len(states) == 7


def test_gather_never_starts_nbdd(fake: FakeManager) -> None:
    run(gather())
    assert {call.member for call in fake.calls} == {"Get", "GetManagedObjects", "GetStatistics"}
    assert all(call.flags.value & NO_AUTOSTART for call in fake.calls)


@pytest.mark.usefixtures("no_service")
def test_gather_without_nbdd_gives_down_and_nothing_else() -> None:
    snapshot = run(gather())
    assert snapshot.problem == "nbdd is not running. See `systemctl status nbdd`."
    assert samples(snapshot) == {"nbdd_up": [({}, 0)]}


def test_gather_without_a_bus_gives_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    assert not run(gather()).up


@pytest.mark.parametrize("member", ["Get", "GetManagedObjects"])
def test_gather_from_nbdd_that_hangs_gives_down(fake: FakeManager, member: str) -> None:
    fake.held.add(member)
    assert run(gather(list_seconds=0.2)).problem == "nbdd did not answer within 0.2 seconds."


def test_gather_gives_up_a_bus_that_hangs_and_closes_its_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as bus:
        bus.bind(str(tmp_path / "bus"))
        bus.listen()
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
        assert not run(gather(list_seconds=0.2)).up
        end, _ = bus.accept()
        with end:
            end.settimeout(DEADLINE)
            while end.recv(1000):  # the end of it, and a ResourceWarning is an error
                pass
    gc.collect()


def test_gather_lacks_only_the_counters_of_a_device_that_hangs(fake: FakeManager) -> None:
    # More hang than dbus-daemon lets one connection wait for.
    hung = {f"hung{number}" for number in range(150)}
    for name in hung | {"well", "zzz"}:
        fake.devices[name] = PRESENT | {"Name": name}
    fake.held |= {f"/org/nbdd1/device/{name}" for name in hung}
    found = samples(run(gather(counts_seconds=1)))
    told = {labels["device"]: value for labels, value in found["nbdd_device_statistics_up"]}
    assert {name for name, value in told.items() if not value} == hung
    assert {labels["device"] for labels, _ in found["nbdd_device_read_bytes_total"]} == {"backup", "well", "zzz"}
    assert len(found["nbdd_device_size_bytes"]) == len(fake.devices)


def test_gather_lacks_the_counters_of_a_device_detached_meanwhile(fake: FakeManager) -> None:
    fake.errors["GetStatistics"] = ("org.nbdd1.Error.NotAttached", "gone")
    found = samples(run(gather()))
    assert found["nbdd_device_statistics_up"] == [(LABELS, 0)]
    assert "nbdd_device_read_bytes_total" not in found


def test_gather_does_not_ask_a_detached_device_for_counters(fake: FakeManager) -> None:
    fake.devices["backup"] = ABSENT | {"Name": "backup"}
    found = samples(run(gather()))
    assert all(call.member != "GetStatistics" for call in fake.calls)
    absent = ("statistics_up", "without_link_seconds", "attached_timestamp_seconds", "io_fails_timestamp_seconds")
    assert not {f"nbdd_device_{name}" for name in absent} & found.keys()
    assert found["nbdd_device_size_bytes"] == [(LABELS, 0)]


async def test_gather_asks_two_hundred_devices_at_the_same_time(fake: FakeManager) -> None:
    for number in range(200):
        fake.devices[f"disk{number}"] = PRESENT | {"Name": f"disk{number}"}
    # All are asked before any answers: one after the other, none would ever.
    fake.held.add("GetStatistics")

    def answer_all() -> None:
        with fake.called:
            assert fake.called.wait_for(
                lambda: sum(call.member == "GetStatistics" for call in fake.calls) == 201, DEADLINE
            )
        fake.held.clear()
        for call in fake.calls:
            if call.member == "GetStatistics":
                fake._loop.call_soon_threadsafe(fake.bus.send, fake._answer(call))

    found, _ = await asyncio.gather(gather(DEADLINE, DEADLINE), asyncio.to_thread(answer_all))
    assert len(found.counts) == 201


# What is made of it


def test_metrics_of_a_lost_connection_last_until_it_is_back() -> None:
    lost = device(State="reconnecting", LiveConnections=0, FailsAt=1_000_000_000, DeadTimeout=300)
    found = samples(Snapshot(at=760.5, devices=(lost,)))
    assert found["nbdd_device_without_link_seconds"] == [(LABELS, 60.5)]
    assert found["nbdd_device_io_fails_timestamp_seconds"] == [(LABELS, 1000)]
    found = samples(Snapshot(at=2000, devices=(replace(lost, fails_at=0),)))
    assert found["nbdd_device_without_link_seconds"] == [(LABELS, 0)]
    assert "nbdd_device_io_fails_timestamp_seconds" not in found


def test_metrics_with_a_clock_that_was_put_back_have_no_negative_time() -> None:
    lost = device(FailsAt=1_000_000_000, DeadTimeout=300)
    assert samples(Snapshot(at=1, devices=(lost,)))["nbdd_device_without_link_seconds"] == [(LABELS, 0)]


def test_metrics_have_the_state_of_a_newer_nbdd_too() -> None:
    found = samples(Snapshot(at=1, devices=(device(State="dreaming"), device(Name="other"))))
    dreaming = [labels for labels, value in found["nbdd_device_state"] if labels["device"] == "backup" and value]
    assert [labels["nbdd_device_state"] for labels in dreaming] == ["dreaming"]


def test_metrics_have_the_types_and_units_of_openmetrics() -> None:
    types = {name: family.type for name, family in families(Snapshot(at=1, devices=(device(),))).items()}
    assert types["nbdd_device_state"] == "stateset"
    assert types["nbdd_device"] == types["nbdd_build"] == "info"
    assert types["nbdd_device_read_bytes"] == types["nbdd_device_requests"] == "counter"
    assert types["nbdd_device_size_bytes"] == types["nbdd_up"] == "gauge"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_metrics_with_any_text_of_a_server_keep_the_format(uri: str, name: str) -> None:
    snapshot = Snapshot(at=1, devices=(device(URI=uri, Name=name),), counts={name: COUNTS})
    (labels, _) = samples(snapshot)["nbdd_device_info"][0]
    assert (labels["uri"], labels["device"]) == (uri, name)
    # The older text cuts at every character that Python takes for the end of a line; Prometheus does so at \n alone.
    if not set(uri + name) & set("\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
        assert {family.name for family in read_plain(text(snapshot).decode())} >= {"nbdd_device_info", "nbdd_up"}


# Over HTTP


class Served:
    """A server of the test's own; `end` is done when it has ended."""

    def __init__(self, look: Callable[[], Awaitable[Snapshot]], **limits: float) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.server = Server(look, **limits)
        self.end = asyncio.ensure_future(self.server.run([self._listener]))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.stop()
        await self.end

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def talk(self, said: bytes, *, hang_up: bool = False) -> bytes:
        """Say something, and hear all that is answered."""
        reader, writer = await self.connect()
        try:
            writer.write(said)
            if hang_up:
                writer.write_eof()
            return await reader.read()
        finally:
            writer.close()


SCRAPE = b"GET /metrics HTTP/1.1\r\n\r\n"


async def nothing() -> Snapshot:
    return Snapshot(at=1)


async def request(said: bytes, **limits: float) -> tuple[str, bytes, bytes]:
    """The status line, the head and the body of the answer."""
    async with Served(nothing, **limits) as served:
        head, _, body = (await served.talk(said)).partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0].decode(), head, body


async def test_server_answers_in_the_format_that_was_asked_for() -> None:
    wanted = (
        b"GET /metrics HTTP/1.1\r\nHost: x\r\naccept: application/openmetrics-text;version=1.0.0,text/plain\r\n\r\n"
    )
    status, head, body = await request(wanted)
    assert status == "HTTP/1.1 200 OK"
    assert f"Content-Type: {OPENMETRICS}\r\n".encode() in head
    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert body.endswith(b"# EOF\n")
    status, head, body = await request(b"GET http://x/metrics?a=b HTTP/1.0\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert f"Content-Type: {PLAIN}\r\n".encode() in head
    assert body == text(Snapshot(at=1))


async def test_server_answers_head_with_the_head_alone() -> None:
    status, head, body = await request(b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert (status, body) == ("HTTP/1.1 200 OK", b"")
    assert f"Content-Length: {len(text(Snapshot(at=1)))}\r\n".encode() in head


OTHERS = {
    "another path": (b"GET / HTTP/1.1\r\n\r\n", 404),
    "a path that climbs": (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", 404),
    "no URL": (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
    "no version": (b"GET /metrics\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "nothing": (b"\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x00\xff\r\n\r\n", 400),
    "POST": (b"POST /metrics HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n" + bytes(3_000_000), 405),
    "DELETE": (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
    "a long head": (b"GET /metrics HTTP/1.1\r\nCookie: " + b"x" * HEAD_BYTES + b"\r\n\r\n", 431),
    "a very long line": (b"x" * 3_000_000, 431),
}


@pytest.mark.parametrize(("said", "status"), OTHERS.values(), ids=OTHERS)
async def test_server_answers_any_other_request_with_its_status_and_a_sentence(said: bytes, status: int) -> None:
    first, _, body = await request(said)
    assert int(first.split()[1]) == status
    assert body.endswith(b".\n")
    assert body.count(b"\n") == 1


async def test_server_sends_no_reset_to_a_client_that_reads_last() -> None:
    async with Served(nothing) as served:

        def talk() -> bytes:
            with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as client:
                client.sendall(b"POST /metrics HTTP/1.1\r\n\r\n" + bytes(8 << 20))
                return client.recv(1 << 16)

        assert (await asyncio.to_thread(talk)).startswith(b"HTTP/1.1 405 ")


async def test_server_names_the_allowed_methods() -> None:
    assert b"\r\nAllow: GET, HEAD\r\n" in (await request(b"PUT /metrics HTTP/1.1\r\n\r\n"))[1]


async def answers(said: list[bytes]) -> list[bytes]:
    async with Served(nothing) as served:
        return [await served.talk(one, hang_up=True) for one in said]


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=300), max_size=20))
def test_server_survives_garbage_and_sends_no_traceback(said: list[bytes]) -> None:
    for answer in run(answers(said)):
        assert b"Traceback" not in answer
        assert b"journal" not in answer
        assert not answer or answer.startswith(b"HTTP/1.1 ")


async def test_server_times_out_a_client_that_sends_nothing() -> None:
    assert (await request(b"GET /metr", head_seconds=0.05))[0] == "HTTP/1.1 408 Request Timeout"


async def test_server_gives_up_a_client_that_does_not_read() -> None:
    big = Snapshot(at=1, devices=tuple(device(Name=f"disk{number}") for number in range(5000)))

    async def look() -> Snapshot:
        return big

    # The server ends when it has had no client for a moment: so this one is given up.
    async with Served(look, answer_seconds=0.1, idle_seconds=0.5) as served:
        _, writer = await served.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(SCRAPE)
        await served.end
        writer.transport.abort()


async def test_server_refuses_clients_over_its_limit_and_serves_later_ones() -> None:
    async with Served(nothing) as served:
        slow = [await served.connect() for _ in range(MAX_CLIENTS)]
        assert (await served.talk(b"")).startswith(b"HTTP/1.1 503 ")
        for _, writer in slow:
            writer.write(SCRAPE)
        for reader, writer in slow:
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
        while (answer := await served.talk(SCRAPE)).startswith(b"HTTP/1.1 503 "):
            pass  # the server has not yet seen all of them leave
        assert answer.startswith(b"HTTP/1.1 200 ")


async def test_server_asks_nbdd_once_for_scrapes_at_the_same_time() -> None:
    looks = 0
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def look() -> Snapshot:
        nonlocal looks
        looks += 1
        begun.set()
        await go_on.wait()
        return Snapshot(at=1)

    async with Served(look) as served:
        two = [asyncio.ensure_future(served.talk(SCRAPE)) for _ in range(2)]
        _, writer = await served.connect()
        writer.write(SCRAPE)
        await writer.drain()
        writer.close()  # one that leaves takes nothing from the others
        await begun.wait()
        while served.server._clients < 3:  # noqa: ASYNC110 - nothing tells that
            await asyncio.sleep(0)
        go_on.set()
        for answer in await asyncio.gather(*two):
            assert answer.startswith(b"HTTP/1.1 200 ")
        assert looks == 1
        await served.talk(SCRAPE)
        assert looks == 2


async def test_server_logs_a_bug_as_a_sentence_and_serves_the_next_scrape(caplog: pytest.LogCaptureFixture) -> None:
    looks = iter([ValueError("oops")])

    async def look() -> Snapshot:
        for problem in looks:
            raise problem
        return Snapshot(at=1)

    async with Served(look) as served:
        assert (await served.talk(SCRAPE)).startswith(b"HTTP/1.1 500 ")
        assert (await served.talk(SCRAPE)).startswith(b"HTTP/1.1 200 ")
    assert caplog.messages == ["This is a bug in nbdd-metrics, please report it: ValueError: oops"]


async def test_server_logs_one_line_when_nbdd_goes_and_one_when_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    problems = iter(["It is away.", "It is away.", "", ""])

    async def look() -> Snapshot:
        return Snapshot(1, next(problems))

    async with Served(look) as served:
        for _ in range(4):
            await served.talk(SCRAPE)
    assert caplog.messages == ["It is away.", "nbdd answers again."]


async def test_server_ends_when_idle_and_not_while_it_serves() -> None:
    go_on = asyncio.Event()

    async def look() -> Snapshot:
        await go_on.wait()
        return Snapshot(at=1)

    async with Served(look, idle_seconds=0.1) as served:
        client = asyncio.ensure_future(served.talk(SCRAPE))
        done, _ = await asyncio.wait({served.end}, timeout=0.5)
        assert not done
        assert (await served.talk(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")  # and others are let in
        go_on.set()
        assert (await client).startswith(b"HTTP/1.1 200 ")
        await served.end


# The command


def command(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nbdd.metrics", *arguments], stdout=-1, stderr=-1, text=True, **more
    )  # fmt: skip


def test_command_without_an_option_prints_the_metrics(fake: FakeManager, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.devices
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert 'nbdd_device_read_bytes_total{device="backup"} 512.0\n' in out
    assert err == ""


@pytest.mark.usefixtures("no_service")
def test_textfile_without_nbdd_says_down_and_the_timer_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nbdd.prom"
    assert main(["--textfile", str(path)]) == 0
    assert path.read_text().endswith("\nnbdd_up 0.0\n")
    assert capsys.readouterr().err == "nbdd-metrics: nbdd is not running. See `systemctl status nbdd`.\n"


def test_textfile_is_replaced_as_a_whole_and_others_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "nbdd.prom"
    path.write_text("old")
    with path.open() as reader:
        textfile.write(path, b"new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_textfile_that_can_not_be_written_leaves_the_old_one_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nbdd.prom"
    path.write_text("old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NbddError, match=r"^\S+/nbdd.prom can't be written: No space left on device.$"):
        textfile.write(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("no_service")
@pytest.mark.parametrize(
    ("path", "reason"),
    [("nbdd.txt", "does not end in .prom"), ("no/nbdd.prom", "can't be written: No such file or directory")],
)
def test_textfile_in_a_bad_place_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, reason: str
) -> None:
    assert main(["--textfile", str(tmp_path / path)]) == 1
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_command_serve_without_sockets_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--serve"]) == 1
    assert capsys.readouterr().err == (
        "nbdd-metrics: systemd passed no listening socket; --serve is for nbdd-metrics.socket.\n"
    )


@pytest.mark.usefixtures("no_service")
def test_command_without_the_library_says_which_package_to_install(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError(name='prometheus_client')")
    with command(env=os.environ | {"PYTHONPATH": str(tmp_path)}) as process:
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert err == "nbdd-metrics: The Prometheus client library is missing: apt install python3-prometheus-client.\n"


@pytest.mark.usefixtures("no_service")
def test_output_to_a_closed_pipe_or_a_full_disk_is_no_traceback() -> None:
    with Path("/dev/full").open("w") as full, command() as lost:
        assert lost.communicate(timeout=DEADLINE)
        done = subprocess.run(
            [sys.executable, "-m", "nbdd.metrics"], stdout=full, stderr=-1, text=True, check=False, timeout=DEADLINE
        )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, "nbdd-metrics: The output can't be written: No space left on device.",
    )  # fmt: skip


@pytest.mark.usefixtures("no_service")
def test_output_that_is_closed_is_a_sentence() -> None:
    run = ["sh", "-c", '"$0" -m nbdd.metrics >&-', sys.executable]
    done = subprocess.run(run, stderr=-1, text=True, check=False, timeout=DEADLINE)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, "nbdd-metrics: There is no standard output to write to.",
    )  # fmt: skip


def test_command_serves_on_the_sockets_that_systemd_passes(fake: FakeManager) -> None:
    # LISTEN_PID is the program's own, which only a child between fork and exec knows: so a shell is that child.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        os.set_inheritable(listener.fileno(), True)
        line = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ exec "$0" -m nbdd.metrics --serve'
        process = subprocess.Popen(
            ["bash", "-c", line, sys.executable], stderr=-1, text=True, pass_fds=[listener.fileno()],
            env=os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbdd-metrics.socket"},
        )  # fmt: skip
        with process, socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
            client.sendall(SCRAPE)
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=DEADLINE)[1] == ""
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'nbdd_device_info{configured="true",device="backup"' in answer
    assert fake.calls
