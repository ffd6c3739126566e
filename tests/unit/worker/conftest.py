# SPDX-License-Identifier: MIT
"""Fixtures: a fork server for each module, and what starts workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbdd.ipc.channel import Message
from tests.fakes.kernel import FakeKernel
from tests.fakes.servers import Server
from tests.fakes.worker import open_fds
from tests.fakes.worker_process import (
    BindBefore,
    ForkServerProcess,
    WorkerDriver,
    wire,
    workers,
)


@pytest.fixture(scope="module")
def machine() -> Iterator[tuple[FakeKernel, ForkServerProcess]]:
    kernel = FakeKernel()
    fork_server = ForkServerProcess(kernel)
    yield kernel, fork_server
    fork_server.close()
    kernel.close()


@pytest.fixture
def kernel(machine: tuple[FakeKernel, ForkServerProcess]) -> FakeKernel:
    return machine[0]


@pytest.fixture
def start_worker(machine: tuple[FakeKernel, ForkServerProcess]) -> Iterator[Callable[[], WorkerDriver]]:
    """Starts workers, and proves that nothing is left of them in the end."""
    kernel, fork_server = machine
    before = open_fds()
    with workers(kernel, fork_server) as make:
        yield make
    assert open_fds() <= before


@pytest.fixture
def worker(start_worker: Callable[[], WorkerDriver]) -> WorkerDriver:
    return start_worker()


@pytest.fixture
def bind_before(start_worker: Callable[[], WorkerDriver], kernel: FakeKernel) -> BindBefore:
    """Makes a device that another worker bound, and returns its binding."""

    def make(server: Server, **changes: Any) -> Message:
        before, connections = start_worker(), changes.get("connections", 1)
        binding = before.order("attach", definition=wire(server, connections=connections), resume=False)
        before.disconnect()
        kernel.asked.clear()
        return {**binding, **changes}

    return make
