# SPDX-License-Identifier: MIT
"""What holds for all fast tests, on whatever machine and under whatever load they run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from nbdd.ctl.__main__ import main
from tests.fakes.async_tests import pytest_pyfunc_call  # noqa: F401 - a hook
from tests.fakes.manager import PRESENT, FakeManager, private_bus
from tests.fakes.terminal import Run

# Property tests here are about what holds, not about how fast a busy machine shows it.
settings.register_profile("nbdd", deadline=None)
settings.load_profile("nbdd")

# A shell starts what it puts in the background with SIGINT ignored, programs inherit that, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# nbdctl, a private bus, and somebody there who answers like nbdd.


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with private_bus(tmp_path_factory.mktemp("bus")) as (address, _):
        yield address


@pytest.fixture
def no_service(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)


@pytest.fixture
def fake(address: str, no_service: None) -> Iterator[FakeManager]:  # noqa: ARG001
    with FakeManager(address) as manager:
        manager.devices["backup"] = PRESENT | {"Name": "backup"}
        yield manager


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def nbdctl(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return nbdctl
