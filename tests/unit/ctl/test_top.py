# SPDX-License-Identifier: MIT
"""`nbdctl top`: the figures are right, and fit wherever they go."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any, cast

import pytest
from dbus_next.constants import MessageFlag

from nbdd.bus.caller.client import ManagerProxy
from nbdd.bus.caller.device import DeviceView
from nbdd.ctl.frames import HEAD, PATIENCE, Frame, Sampler
from nbdd.ctl.rates import Rates, Sample, between
from nbdd.errors import NbddError, NotAttached
from tests.fakes.manager import ABSENT, PRESENT, FakeManager
from tests.fakes.terminal import NBDCTL, Run, Terminal

COUNTS = {
    "reads": 100, "writes": 50, "read-bytes": 1 << 20, "written-bytes": 2 << 20, "in-flight": 3, "io-time": 500,
    "read-time": 1000, "write-time": 0, "discards": 0, "flushes": 0, "discarded-bytes": 0,
}  # fmt: skip


def later(**more: int) -> dict[str, int]:
    return {key: count + more.get(key.replace("-", "_"), 0) for key, count in COUNTS.items()}


def test_rates_are_per_second_and_latencies_per_request() -> None:
    now = later(
        reads=400, read_bytes=8_000_000, read_time=200, writes=2, written_bytes=8192, write_time=10, io_time=1000
    )
    assert between(Sample(10.0, COUNTS), Sample(14.0, now)) == Rates(
        read_bytes=2_000_000, written_bytes=2048, reads=100, writes=0.5, read_latency=0.0005, write_latency=0.005,
        in_flight=3, busy=0.25,
    )  # fmt: skip


def test_rates_without_requests_have_no_latency() -> None:
    rates = between(Sample(1.0, COUNTS), Sample(2.0, COUNTS))
    assert rates is not None
    assert (rates.read_latency, rates.write_latency, rates.reads, rates.busy) == (None, None, 0, 0)


def test_rates_of_an_nbdd_without_times_lack_only_the_latency() -> None:
    old = {key: value for key, value in COUNTS.items() if not key.endswith("-time")}
    rates = between(Sample(1.0, old), Sample(2.0, old | {"reads": 200}))
    assert rates is not None
    assert (rates.reads, rates.read_latency) == (100, None)


def test_rates_begin_again_with_a_new_attach() -> None:
    assert between(Sample(1.0, COUNTS), Sample(2.0, dict.fromkeys(COUNTS, 0))) is None
    assert between(None, Sample(2.0, COUNTS)) is None


class FakeClient:
    """Answers with what a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.found: list[dict[str, Any]] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.error: NbddError | None = None

    async def devices(self) -> list[DeviceView]:
        if self.error is not None:
            raise self.error
        return [DeviceView.of(properties) for properties in self.found]

    async def statistics(self, name: str) -> dict[str, int]:
        if name not in self.counts:
            raise NotAttached("no")
        return self.counts[name]


def sampler_of(client: FakeClient) -> Sampler:
    return Sampler(cast("ManagerProxy", client), clock=lambda: client.now)


async def test_sampler_samples_only_devices_with_a_node_in_natural_order() -> None:
    client = FakeClient()
    client.found = [PRESENT | {"Name": "d10"}, PRESENT | {"Name": "d9"}, ABSENT | {"Name": "d1"}]
    client.counts = {"d10": COUNTS, "d9": COUNTS}
    frame = await sampler_of(client).sample()
    assert [(device.name, rates) for device, rates in frame.rows] == [("d9", None), ("d10", None)]


async def test_sampler_does_not_compare_a_device_that_comes_back_with_its_former_counters() -> None:
    client, found = FakeClient(), []
    client.found = [PRESENT | {"Name": "a"}]
    sampler = sampler_of(client)
    for counts in ({"a": COUNTS}, {}, {"a": later(reads=10)}, {"a": later(reads=30)}):
        client.now += 1
        client.counts = counts
        rates = (await sampler.sample()).rows[0][1]
        found.append(rates.reads if rates is not None else None)
    assert found == [None, None, None, 20.0]


async def test_sampler_waits_for_a_restart_of_nbdd_but_not_for_ever() -> None:
    client = FakeClient()
    sampler = sampler_of(client)
    client.error = NbddError("nbdd is\nnot running.")
    with pytest.raises(NbddError):
        await sampler.sample()
    client.error = None
    await sampler.sample()
    client.error = NbddError("nbdd is\nnot running.")
    client.now = PATIENCE
    assert (await sampler.sample()).sum() == "nbdd is not running."
    client.now += 1
    with pytest.raises(NbddError):
        await sampler.sample()


def test_top_without_a_terminal_prints_a_table_for_each_update(fake: FakeManager, run: Run) -> None:
    fake.replies["GetStatistics"] = ("a{st}", [COUNTS])
    status, out, err = run("top", "-n", "2", "-d", "0.1")
    assert (status, err) == (0, "")
    assert {call.flags for call in fake.calls} == {MessageFlag.NO_AUTOSTART}
    first, second, rest = out.split("\n\n")
    assert rest == ""
    for text in (first, second):
        summary, head, row = text.splitlines()
        assert summary.endswith("  1 attached, reading 0.0 MB/s, writing 0.0 MB/s")
        assert head.split("  ")[0] == "NAME"
        assert row.split() == ["backup", "/dev/nbd0", "attached", "1/1", "0.0", "0.0", "0", "0", "-", "-", "3", "0%"]


def test_top_as_json_prints_an_object_per_line(fake: FakeManager, run: Run) -> None:
    fake.replies["GetStatistics"] = ("a{st}", [COUNTS])
    status, out, _ = run("top", "--json", "-n", "1", "-d", "0.1")
    [device] = json.loads(out)["devices"]
    assert status == 0
    assert device == {
        "name": "backup", "node": "/dev/nbd0", "state": "attached", "connections": 1, "live-connections": 1,
        "read-bytes": 0.0, "written-bytes": 0.0, "reads": 0.0, "writes": 0.0, "read-latency": None,
        "write-latency": None, "in-flight": 3, "busy": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_top_on_a_terminal_fits_and_ends_with_ctrl_c(fake: FakeManager, environment: dict[str, str]) -> None:
    fake.replies["GetStatistics"] = ("a{st}", [COUNTS])
    fake.devices["evil[red]"] = PRESENT | {"Name": "evil[red]", "State": "reconnecting"}
    with Terminal("top", "-d", "0.1", **environment) as terminal:
        terminal.wait_for("w_await")
        terminal.wait_for("evil[red]")
        terminal.process.send_signal(signal.SIGINT)
        status, text = terminal.finish()
    assert status == 0
    assert "Traceback" not in text
    assert "backup" in text
    assert ("\x1b[?1049h" in text) == ("TERM" not in environment)
    assert ("\x1b[33mreconnecting" in text) == (not environment)
    assert "…" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_top_restores_the_terminal_however_it_ends(fake: FakeManager, number: signal.Signals) -> None:
    fake.replies["GetStatistics"] = ("a{st}", [COUNTS])
    with Terminal("top", "-d", "0.1") as terminal:
        terminal.wait_for("w_await")
        terminal.process.send_signal(number)
        status, text = terminal.finish()
    assert (status, text.rpartition("\x1b[?1049")[2][:1], "Traceback" in text) == (128 + number, "l", False)


def test_frame_says_that_nothing_is_attached() -> None:
    assert Frame(1.0).sum() == "nothing is attached, reading 0.0 MB/s, writing 0.0 MB/s"
    assert list(Frame(1.0).cells()) == []
    assert len(HEAD) == len(set(HEAD))


@pytest.mark.parametrize("arguments", ["-d 0", "-d soon", "-d inf", "-d nan", "-n 0", "-n -1", "-d 3601"])
def test_top_with_a_senseless_delay_or_count_is_a_usage_error(run: Run, arguments: str) -> None:
    assert run("top", *arguments.split())[0] == 2


@pytest.mark.usefixtures("no_service")
def test_top_starts_no_service(run: Run) -> None:
    status, out, err = run("top", "-n", "1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "nbdd is not running" in err


def test_top_loads_rich_for_its_screen_only(fake: FakeManager) -> None:
    fake.replies["GetStatistics"] = ("a{st}", [COUNTS])
    command = [sys.executable, "-X", "importtime", *NBDCTL[1:], "top", "-n", "1", "-d", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " rich" not in done.stderr
