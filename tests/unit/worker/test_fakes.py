# SPDX-License-Identifier: MIT
"""The fakes under a worker have the signatures of what they stand for: a call that passes here passes there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.sysfs import Node, find
from nbdd.kernel.usage import Usage
from nbdd.worker import operations, request
from tests.fakes import kernel
from tests.fakes.kernel import FAKES, MODULES

STANDS_FOR = (
    (kernel.FakeKernelDevice, KernelDevice),
    (kernel.FakeReports, LinkDeadMonitor),
    (kernel.FakeUsage, Usage),
    (kernel.FakeNode, Node),
)


def methods() -> list[Any]:
    found: list[Any] = [pytest.param(kernel.find, find, id="find")]
    for fake, real in STANDS_FOR:
        for name, method in vars(fake).items():
            # Reports are made by the device, and so of other arguments.
            made = name == "__init__" and fake is not kernel.FakeReports
            if inspect.isfunction(method) and (made or not name.startswith("_")):
                found.append(pytest.param(method, getattr(real, name), id=f"{fake.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("fake", "real"), methods())
def test_fake_takes_what_the_real_one_takes(fake: Callable[..., Any], real: Callable[..., Any]) -> None:
    known, needed = inspect.signature(fake).parameters, inspect.signature(real).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name, parameter in known.items():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            assert name in needed, "it takes an argument that the real one does not"
            assert parameter.kind is needed[name].kind
    for name, parameter in needed.items():
        if parameter.default is parameter.empty and not open_ended:
            assert name in known, "the real one needs an argument that it does not take"


def test_fake_node_says_what_a_node_says() -> None:
    said = vars(kernel.shown(kernel.node(0, 512, 512)))
    del said["counted"]
    assert [name for name in said if not hasattr(Node(0), name)] == []


@pytest.mark.parametrize("name", FAKES)
def test_fake_replaces_something(name: str) -> None:
    assert any(hasattr(module, name) for module in MODULES)


def test_lone_worker_replaces_what_there_is() -> None:
    assert all(hasattr(operations, name) for name in ("find", "KernelDevice", "CONNECT_SECONDS"))
    assert hasattr(request, "KernelDevice")
