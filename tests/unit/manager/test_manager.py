# SPDX-License-Identifier: MIT
"""All devices together: reload by its rules, names, adoption at the start, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest

import nbdd.manager.attachment
import nbdd.manager.device
import nbdd.manager.lifecycle
import nbdd.manager.manager
from nbdd.config.definition import Attach, Definition
from nbdd.config.loader import Configuration
from nbdd.errors import (
    AlreadyAttached,
    Busy,
    InvalidArgs,
    InvalidConfig,
    InvalidURI,
    NbddError,
    NoSuchDevice,
    NotAttached,
)
from nbdd.manager.device import Device
from nbdd.manager.manager import Changes, Manager
from nbdd.manager.records import Record, Records
from nbdd.manager.status import State, Status
from nbdd.manager.supervisor import Supervisor
from nbdd.uri import URI
from nbdd.worker.binding import Binding
from tests.fakes.asserts import refused
from tests.fakes.worker import DOWN, FakeSpawner, definition


def boot(name: str, **fields: Any) -> Definition:
    return definition(name, attach=Attach.BOOT, **fields)


class Desk:
    """A manager, what it reads, and what it tells."""

    def __init__(self, directory: Path) -> None:
        self.spawner = FakeSpawner()
        self.records = Records(directory)
        self.kept: dict[str, list[int]] = {}
        self.news: list[tuple[str, str]] = []
        self.wanted: Sequence[Definition] | NbddError = ()
        self.defaults: Mapping[str, object] = {}
        self.readable = threading.Event()
        self.readable.set()
        self._changed = asyncio.Event()
        self.manager = Manager(self._load, cast(Supervisor, self.spawner), self.records, self._keep, self)

    def _load(self) -> Configuration:
        assert self.readable.wait(10)
        if isinstance(self.wanted, NbddError):
            raise self.wanted
        devices = {wanted.name: wanted for wanted in self.wanted}
        return Configuration(MappingProxyType(devices), MappingProxyType(dict(self.defaults)))

    def _keep(self, name: str, fds: Sequence[int]) -> None:
        self.kept[name] = list(fds)

    def added(self, device: Device) -> None:
        self.news.append(("added", device.name))
        self._changed.set()

    def changed(self, device: Device, old: Status) -> None:
        assert device.status != old
        self._changed.set()

    def removed(self, device: Device) -> None:
        self.news.append(("removed", device.name))
        self._changed.set()

    def was_bound(self, made: Definition, *, configured: bool = True, binding: bool = True) -> None:
        """A predecessor bound this one."""
        self.spawner.bound[made.name] = len(self.spawner.bound)
        bound = Binding.from_wire(self.spawner._binding(made.name)) if binding else None
        self.records.write(Record(made, configured, bound, attached_since=1))

    async def start(self, *wanted: Definition, sockets: Mapping[str, list[int]] = MappingProxyType({})) -> None:
        self.wanted = wanted
        await self.manager.start(sockets)

    async def reload(self, *wanted: Definition) -> Changes:
        self.wanted = wanted
        return await self.manager.reload()

    async def until(self, wanted: Callable[[], bool]) -> None:
        while not wanted():
            self._changed.clear()
            await self._changed.wait()

    def state(self, name: str) -> State:
        return self.manager.device(name).status.state

    def names(self) -> list[str]:
        return list(self.manager.devices)


@contextlib.asynccontextmanager
async def desk(directory: Path) -> AsyncIterator[Desk]:
    it = Desk(directory)
    yield it
    await it.manager.stop(detach=False)


@pytest.fixture
def it(tmp_path: Path) -> contextlib.AbstractAsyncContextManager[Desk]:
    return desk(tmp_path / "run")


# Start


async def test_start_attaches_boot_devices_and_no_others(it: Desk) -> None:
    await it.start(boot("a"), definition("b"))
    await it.until(lambda: it.state("a") is State.ATTACHED)
    assert it.state("b") is State.DETACHED
    assert it.news == [("added", "a"), ("added", "b")]


async def test_start_does_not_wait_for_the_servers(it: Desk) -> None:
    it.spawner.before["attach"] = asyncio.Event()
    await it.start(boot("a"))
    assert it.state("a") is State.CONNECTING


async def test_start_with_bad_file_and_no_records_fails(it: Desk) -> None:
    it.wanted = InvalidConfig("nbdd.yaml:1:1: no.")
    assert isinstance(await refused(it.manager.start({})), InvalidConfig)


async def test_start_with_bad_file_still_adopts_bound_devices(it: Desk, caplog: pytest.LogCaptureFixture) -> None:
    it.was_bound(boot("a"))
    it.was_bound(definition("hand"), configured=False)
    it.wanted = InvalidConfig("nbdd.yaml:1:1: no.")
    await it.manager.start({})
    await it.until(lambda: all(it.state(name) is State.ATTACHED for name in ("a", "hand")))
    assert it.manager.device("a").status.configured
    assert not it.manager.device("hand").status.configured
    assert it.spawner.names() == ["adopt", "adopt"]
    assert "nbdd.yaml:1:1: no." in caplog.text


async def test_start_adopts_device_with_kept_sockets(it: Desk) -> None:
    it.was_bound(boot("a"))
    await it.start(boot("a"), sockets={"a": [os.dup(0), os.dup(0)], "stranger": [os.dup(0)]})
    await it.until(lambda: it.state("a") is State.ATTACHED)
    assert it.spawner.names() == ["adopt"]
    assert len(it.spawner.given["adopt"]) == 2
    assert it.kept["stranger"] == [], "and systemd lets go of them too"


async def test_start_keeps_old_definition_of_bound_device_until_detach(it: Desk) -> None:
    it.was_bound(definition("a", timeout=1))
    await it.start(definition("a", timeout=2))
    await it.until(lambda: it.state("a") is State.ATTACHED)
    assert it.manager.device("a").status.timeout == 1
    await it.manager.detach("a")
    assert it.manager.device("a").status.timeout == 2


async def test_start_detaches_idle_device_without_definition(it: Desk) -> None:
    it.was_bound(definition("a"))
    await it.start()
    await it.until(lambda: it.names() == [])
    assert it.spawner.bound == {}
    assert it.records.load() == []


async def test_start_keeps_device_in_use_without_definition(it: Desk, caplog: pytest.LogCaptureFixture) -> None:
    it.was_bound(boot("a"))
    it.spawner.used.add("a")
    await it.start()
    await it.until(lambda: it.state("a") is State.ATTACHED)
    assert not it.manager.device("a").status.configured
    assert not it.records.load()[0].configured
    assert "a stays attached: /dev/nbd0 is mounted on /mnt." in caplog.text


async def test_start_does_not_resume_attach_of_device_without_definition(it: Desk) -> None:
    it.was_bound(boot("a"), binding=False)
    await it.start()
    await it.until(lambda: it.names() == [])
    assert it.spawner.bound == {}


async def test_start_adopts_and_keeps_device_attached_by_hand(it: Desk) -> None:
    it.was_bound(definition("hand"), configured=False)
    await it.start(definition("a"))
    await it.until(lambda: it.state("hand") is State.ATTACHED)
    assert sorted(it.names()) == ["a", "hand"]
    await it.manager.detach("hand")
    assert it.names() == ["a"]


async def test_start_adopts_before_the_configuration_is_read(it: Desk) -> None:
    it.was_bound(definition("a"))
    it.readable.clear()
    starting = asyncio.create_task(it.start(definition("a", timeout=7), definition("b")))
    await it.until(lambda: "a" in it.names() and it.state("a") is State.ATTACHED)
    assert it.names() == ["a"]
    it.readable.set()
    await starting
    assert it.names() == ["a", "b"]
    # A definition that changed meanwhile is dealt with as by a reload: it holds from the next attach on.
    assert it.manager.device("a").definition.timeout == 7
    assert it.manager.device("a").status.timeout == 0


async def test_start_with_vanished_device_fails_it_if_manual_attaches_it_again_if_boot(it: Desk) -> None:
    it.was_bound(boot("a"))
    it.was_bound(definition("b"))
    it.spawner.bound.clear()
    await it.start(boot("a"), definition("b"))
    await it.until(lambda: it.state("a") is State.ATTACHED and it.state("b") is State.FAILED)


async def test_attach_of_same_export_twice_logs_warning(it: Desk, caplog: pytest.LogCaptureFixture) -> None:
    it.spawner.exports = {"a": "disk", "b": "disk"}
    await it.start(definition("a"), definition("b"))
    await it.manager.attach("a", {})
    assert "is attached as" not in caplog.text
    await it.manager.attach("b", {})
    assert "b: nbd://storage.example/disk is attached as a too" in caplog.text


async def test_attach_of_export_in_two_server_lists_logs_warning_with_its_name(
    it: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    shared, other = URI.parse("nbd://two.example/disk"), URI.parse("nbd://one.example/disk")
    await it.start(replace(definition("a"), uri=(other, shared)), replace(definition("b"), uri=(shared,)))
    await it.manager.attach("a", {})
    await it.manager.attach("b", {})
    assert "b: nbd://two.example/disk is attached as a too; mount it through one of them only" in caplog.text


# Names


async def test_device_name_invalid_and_unknown_are_different_errors(it: Desk) -> None:
    await it.start(definition("a"))
    for work in (it.manager.attach("b", {}), it.manager.detach("b"), it.manager.set_timeout("b", 1)):
        assert isinstance(await refused(work), NoSuchDevice)
    for name in ("", "a b", "a/b", "ä", "x" * 255, "-a", "a\n"):
        assert isinstance(await refused(it.manager.attach(name, {})), InvalidArgs)


async def test_attach_options_hold_until_detach(it: Desk) -> None:
    await it.start(definition("a"))
    await it.manager.attach("a", {"timeout": 9})
    assert it.manager.device("a").status.timeout == 9
    await it.manager.detach("a")
    assert isinstance(await refused(it.manager.attach("a", {"speed": 9})), InvalidArgs)
    assert it.state("a") is State.DETACHED


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("nbd://host/backup", "backup"),
        ("nbd://host/some%20odd/n%C3%A4me", "some-odd-n-me"),
        ("nbd://host", "host"),
        ("nbd://[::1]/", "1"),
        ("nbd://host/..", "nbd"),
        ("nbd+unix:///?socket=/run/s", "nbd"),
        ("nbd://host/" + "x" * 200, "x" * 56),
    ],
)
async def test_attach_uri_names_device_after_export_or_host(it: Desk, uri: str, name: str) -> None:
    await it.start()
    assert (await it.manager.attach_uri(uri, {})).name == name
    assert (await it.manager.attach_uri(uri, {})).name == f"{name}-2"
    assert (await it.manager.attach_uri(uri, {})).name == f"{name}-3"


async def test_attach_uri_with_name_in_use_is_refused(it: Desk) -> None:
    await it.start(definition("a"))
    uri = "nbd://host/x"
    assert "name of a configured device" in str(await refused(it.manager.attach_uri(uri, {"name": "a"})))
    await it.manager.attach_uri(uri, {"name": "b"})
    assert isinstance(await refused(it.manager.attach_uri(uri, {"name": "b"})), AlreadyAttached)
    assert isinstance(await refused(it.manager.attach_uri(uri, {"name": "a/b"})), InvalidArgs)
    assert isinstance(await refused(it.manager.attach_uri(uri, {"name": 5})), InvalidArgs)
    assert isinstance(await refused(it.manager.attach_uri("http://host/x", {})), InvalidURI)
    assert it.names() == ["a", "b"]


async def test_attach_uri_uses_configured_defaults(it: Desk) -> None:
    it.defaults = {"timeout": 7, "dead-timeout": 8}
    await it.start()
    status = (await it.manager.attach_uri("nbd://host/x", {"timeout": 9})).status
    assert (status.timeout, status.dead_timeout, status.configured) == (9, 8, False)


async def test_attach_uri_failed_removes_device(it: Desk) -> None:
    await it.start()
    it.spawner.outcomes["attach"] = [DOWN]
    assert await refused(it.manager.attach_uri("nbd://host/x", {})) is DOWN
    assert it.names() == []
    assert it.news == [("added", "x"), ("removed", "x")]


async def test_attach_uri_failed_keeps_device_that_may_be_bound_until_detach(it: Desk) -> None:
    await it.start()
    it.spawner.outcomes["attach"] = ["die late", DOWN]
    it.spawner.mounted.add("x")
    await refused(it.manager.attach_uri("nbd://host/x", {"name": "x"}))
    assert it.state("x") is State.FAILED
    assert isinstance(await refused(it.manager.attach_uri("nbd://host/x", {"name": "x"})), AlreadyAttached)
    assert isinstance(await refused(it.manager.detach("x")), Busy)
    it.spawner.mounted.clear()
    await it.manager.detach("x")
    assert it.names() == []
    assert it.spawner.bound == {}


async def test_attach_uri_replaces_failed_device_of_same_name(it: Desk) -> None:
    it.was_bound(definition("x"), configured=False)
    it.spawner.bound.clear()
    await it.start()
    await it.until(lambda: it.state("x") is State.FAILED)
    await it.manager.attach_uri("nbd://host/x", {"name": "x"})
    assert it.state("x") is State.ATTACHED


async def test_detach_during_attach_uri_removes_device_once(it: Desk) -> None:
    await it.start()
    it.spawner.before["attach"] = asyncio.Event()
    attach = asyncio.create_task(it.manager.attach_uri("nbd://host/x", {}))
    await it.spawner.arrived["attach"].wait()
    await it.manager.detach("x")
    (outcome,) = await asyncio.gather(attach, return_exceptions=True)
    assert isinstance(outcome, NotAttached)
    assert it.news == [("added", "x"), ("removed", "x")]


async def test_attach_uri_has_a_limit_of_devices(it: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.manager, "MAX_DEVICES", 2)
    await it.start(definition("a"))
    for _ in range(2):
        await it.manager.attach_uri("nbd://host/x", {})
    assert isinstance(await refused(it.manager.attach_uri("nbd://host/x", {})), Busy)
    assert it.names() == ["a", "x", "x-2"]


# Exports


async def test_list_exports_ends_its_worker_afterwards(it: Desk) -> None:
    await it.start()
    assert [export.name for export in await it.manager.list_exports("nbd://host")] == ["one", "two"]
    it.spawner.outcomes["list-exports"] = [DOWN]
    assert await refused(it.manager.list_exports("nbd://host")) is DOWN
    assert isinstance(await refused(it.manager.list_exports("ftp://host")), InvalidURI)
    assert it.spawner.living == []
    assert len(it.spawner.workers) == 2


# Reload


async def test_reload_keeps_the_equal_adds_the_new_and_stops_the_leftovers(it: Desk) -> None:
    await it.start(boot("same"), boot("other"), boot("left"), definition("idle"))
    await it.until(lambda: len(it.spawner.bound) == 3 and it.state("left") is State.ATTACHED)
    await it.until(lambda: it.state("other") is State.ATTACHED)
    workers = {worker.name: worker for worker in it.spawner.workers}
    changes = await it.reload(boot("same"), boot("other", timeout=3), boot("new"), definition("hand"))
    assert changes == Changes(added=("new", "hand"), changed=("other",), removed=("left", "idle"))
    assert it.names() == ["same", "other", "new", "hand"]
    await it.until(lambda: it.state("new") is State.ATTACHED)
    assert it.state("hand") is State.DETACHED
    assert workers["same"] in it.spawner.living
    assert workers["other"] in it.spawner.living, "what is attached stays so"
    assert it.manager.device("other").status.timeout == 0
    assert set(it.spawner.bound) == {"same", "other", "new"}
    await it.manager.detach("other")
    assert it.manager.device("other").status.timeout == 3


async def test_reload_of_the_same_changes_nothing(it: Desk) -> None:
    await it.start(boot("a"), definition("b"))
    await it.until(lambda: it.state("a") is State.ATTACHED)
    await it.manager.detach("a")
    news = list(it.news)
    assert await it.reload(boot("a"), definition("b")) == Changes((), (), ())
    assert it.state("a") is State.DETACHED, "what was detached by hand stays so"
    assert it.news == news


async def test_reload_with_a_bad_file_changes_nothing(it: Desk) -> None:
    it.defaults = {"timeout": 7}
    await it.start(boot("a"))
    await it.until(lambda: it.state("a") is State.ATTACHED)
    before = it.manager.device("a").status
    it.defaults = {"timeout": 8}
    it.wanted = InvalidConfig("nbdd.yaml:1:1: no.")
    assert isinstance(await refused(it.manager.reload()), InvalidConfig)
    assert it.manager.device("a").status == before
    assert it.names() == ["a"]
    assert (await it.manager.attach_uri("nbd://host/x", {})).status.timeout == 7
    assert (await it.reload(boot("a"))) == Changes((), (), ())


async def test_reload_keeps_leftover_in_use_until_it_is_detached(it: Desk, caplog: pytest.LogCaptureFixture) -> None:
    await it.start(boot("a"))
    await it.until(lambda: it.state("a") is State.ATTACHED)
    it.spawner.used.add("a")
    assert await it.reload() == Changes((), (), ("a",))
    assert it.state("a") is State.ATTACHED
    assert not it.manager.device("a").status.configured
    assert await it.reload() == Changes((), (), ())
    assert it.names() == ["a"]
    it.spawner.used.clear()
    await it.manager.detach("a")
    assert it.names() == []
    assert "a stays attached: /dev/nbd0 is mounted on /mnt." in caplog.text


async def test_reload_ends_leftover_that_still_attaches(it: Desk) -> None:
    it.spawner.outcomes["attach"] = [*[DOWN] * 1000]
    await it.start(boot("a"))
    await it.until(lambda: it.manager.device("a").status.last_error[0] != "")
    await it.reload()
    assert it.names() == []
    assert it.spawner.living == []


async def test_reload_gives_device_attached_by_hand_its_definition(it: Desk) -> None:
    await it.start()
    await it.manager.attach_uri("nbd://host/x", {"name": "x"})
    assert await it.reload(boot("x", timeout=5)) == Changes(("x",), (), ())
    assert it.state("x") is State.ATTACHED
    assert it.manager.device("x").status.configured
    assert it.records.load()[0].configured
    await it.manager.detach("x")
    assert it.names() == ["x"]
    assert it.manager.device("x").status.timeout == 5


async def test_reload_attaches_device_that_became_boot(it: Desk) -> None:
    await it.start(definition("a"))
    await it.reload(boot("a"))
    await it.until(lambda: it.state("a") is State.ATTACHED)


async def test_reload_waits_for_another_reload(it: Desk) -> None:
    await it.start()
    it.wanted = (boot("a"), boot("b"))
    changes = await asyncio.gather(it.manager.reload(), it.manager.reload())
    assert sorted(change.added for change in changes) == [(), ("a", "b")]


async def test_reload_adds_ten_thousand_devices(it: Desk) -> None:
    await it.start()
    changes = await it.reload(*(definition(f"disk{number}") for number in range(10_000)))
    assert len(changes.added) == 10_000
    assert len((await it.reload()).removed) == 10_000
    assert it.names() == []


# Stop


async def test_stop_without_detach_leaves_every_device_bound(it: Desk) -> None:
    await it.start(boot("a"), boot("b"))
    await it.until(lambda: all(it.state(name) is State.ATTACHED for name in "ab"))
    assert await it.manager.stop(detach=False) == []
    assert set(it.spawner.bound) == {"a", "b"}
    assert len(it.records.load()) == 2
    assert it.spawner.living == []


async def test_stop_with_detach_frees_idle_devices_and_returns_the_others(it: Desk) -> None:
    await it.start(boot("a"), boot("b"), definition("c"))
    await it.until(lambda: all(it.state(name) is State.ATTACHED for name in "ab"))
    it.spawner.used.add("b")
    node = it.manager.device("b").status.node
    assert await it.manager.stop(detach=True) == [f"b stays attached: {node} is mounted on /mnt."]
    assert set(it.spawner.bound) == {"b"}
    assert [record.definition.name for record in it.records.load()] == ["b"]
    assert it.spawner.living == []


@pytest.mark.parametrize("live", [0, 1])
async def test_stop_waits_for_users_of_disconnected_devices_only(
    it: Desk, live: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdd.manager.attachment, "MEND_INTERVAL", 0.01)
    await it.start(boot("a"), definition("idle"))
    await it.until(lambda: it.state("a") is State.ATTACHED)
    if not live:
        it.spawner.worker.say("connections", [], live=0, reconnects=0, uri="nbd://x/y", lost=1, failing=False)
    await it.manager.shorten_dead_timeouts(30)
    assert it.manager.device("a").status.dead_timeout == 30
    it.spawner.outcomes["detach"] = [Busy("in use")] * 3
    left = await it.manager.stop(detach=True, wait=60)
    assert left == (["a stays attached: in use"] if live else [])
    assert list(it.spawner.bound) == (["a"] if live else [])


async def test_stop_with_detach_right_after_start_keeps_devices_in_use(it: Desk) -> None:
    it.was_bound(boot("a"))
    it.was_bound(boot("gone"))
    it.spawner.used |= {"a", "gone"}
    await it.start(boot("a"))
    await it.manager.stop(detach=True)
    assert set(it.spawner.bound) == {"a", "gone"}
    assert len(it.records.load()) == 2


async def test_stop_ends_unfinished_work_of_start(it: Desk, caplog: pytest.LogCaptureFixture) -> None:
    it.was_bound(boot("gone"))
    it.spawner.before["detach"] = asyncio.Event()
    await it.start()
    await it.spawner.arrived["detach"].wait()
    await it.manager.stop(detach=False)
    assert set(it.spawner.bound) == {"gone"}
    assert len(it.records.load()) == 1
    assert it.spawner.living == []
    assert "stays attached" not in caplog.text


async def test_stop_ends_attach_under_way_with_error(it: Desk) -> None:
    it.spawner.before["attach"] = asyncio.Event()
    await it.start(definition("a"))
    attach = asyncio.create_task(it.manager.attach("a", {}))
    await it.spawner.arrived["attach"].wait()
    await it.manager.stop(detach=False)
    (outcome,) = await asyncio.gather(attach, return_exceptions=True)
    assert "stopping" in str(outcome)
    assert it.spawner.living == []


async def test_stop_cancelled_can_be_repeated_without_detach(it: Desk) -> None:
    await it.start(boot("a"))
    await it.until(lambda: it.state("a") is State.ATTACHED)
    it.spawner.before["detach"] = asyncio.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await it.manager.stop(detach=True)
    await it.manager.stop(detach=False)
    assert set(it.spawner.bound) == {"a"}
    assert len(it.records.load()) == 1
    assert it.spawner.living == []
