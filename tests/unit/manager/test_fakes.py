# SPDX-License-Identifier: MIT
"""The fakes of tests/fakes/worker.py: called as what they stand for, and speaking JSON as that does."""

from __future__ import annotations

from typing import Any

import pytest

from nbdd.manager.slot import Spawner
from nbdd.manager.supervisor import Supervisor, WorkerProcess
from tests.fakes.asserts import refused
from tests.fakes.signatures import differences, parameters
from tests.fakes.worker import FakeSpawner, FakeWorker


def test_fake_worker_has_signatures_of_worker_process() -> None:
    assert differences(FakeWorker, WorkerProcess) == ["end", "say"], "these two are the test's own"
    assert differences(WorkerProcess, FakeWorker) == []


def test_fake_spawner_has_signatures_of_supervisor() -> None:
    assert differences(FakeSpawner, Supervisor) == ["names", "work"], "these two are the test's own"
    assert differences(Supervisor, FakeSpawner) == ["start"], "the daemon alone calls that"


def test_spawner_protocol_has_signature_of_supervisor() -> None:
    assert parameters(Spawner.spawn) == parameters(Supervisor.spawn)


async def test_fake_worker_has_attributes_of_worker_process() -> None:
    worker = await FakeSpawner().spawn("disk", lambda _message, _fds: None)
    assert (worker.name, worker.pid, worker.ended.done()) == ("disk", 1000, False)


async def test_fake_worker_takes_and_sends_nothing_but_json() -> None:
    heard: list[dict[str, Any]] = []
    spawner = FakeSpawner()
    worker = await spawner.spawn("disk", lambda message, _fds: heard.append(message))
    spawner.worker.say("info", message=("a", "tuple"))
    assert heard == [{"event": "info", "message": ["a", "tuple"]}]
    with pytest.raises(TypeError, match="JSON"):
        spawner.worker.say("info", message=object())
    with pytest.raises(TypeError, match="JSON"):
        await worker.request("set-timeout", deadline=1, seconds=object())
    await refused(worker.request("set-timeout", deadline=1, seconds=(1, 2)))
    assert spawner.orders == [("set-timeout", {"seconds": [1, 2]})]
    await worker.close()
