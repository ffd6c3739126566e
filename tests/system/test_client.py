# SPDX-License-Identifier: MIT
"""`nbdd.Client` on a real kernel, as root and without the daemon: every method, every end, and hundreds of rounds.

The checks themselves are scripts that run in the guest, many with one start of Python: client_checks.py for the
methods of the manual, client_ends.py for how a service ends, client_rounds.py for endurance, client_examples.py for
docs/client.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Show
from tests.guest import Guest
from tests.scale import times
from tests.system.in_guest import client_checks, client_ends
from tests.system.lab import Lab

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "tests/__init__.py",
    "tests/system/__init__.py",
    "tests/system/in_guest/__init__.py",
    *(f"tests/system/in_guest/client_{name}.py" for name in ("rig", "checks", "ends", "rounds", "examples")),
    "tests/system/in_guest/data_server.py",
    "docs/client.md",
)

ROUNDS = times(40, 500)
KILLS = times(10, 40)

Run = Callable[..., Any]
Found = dict[str, tuple[float, str]]


@pytest.fixture(scope="module")
def lab(guest: Guest) -> Iterator[Lab]:
    """One for all tests here; the scripts look for themselves what each check leaves behind."""
    lab = Lab(guest)
    lab.mark()
    for script in SCRIPTS:
        guest.write(f"/root/lab/{script}", (ROOT / script).read_text())
    yield lab
    lab.cleanup()


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    """Run one of the scripts in the guest; what it prints is JSON."""

    def in_guest(script: str, *arguments: object, seconds: float = 300) -> Any:
        words = " ".join(str(argument) for argument in arguments)
        # A script that hangs is asked where, and then killed.
        module = f"tests.system.in_guest.client_{script}"
        command = f"timeout --signal=USR1 --kill-after=5 {seconds:.0f} python3 -m {module} {words}"
        done = lab.guest.run(f"cd /root/lab && {command}", check=False, timeout=seconds + 60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return in_guest


@pytest.fixture(scope="module")
def methods(run: Run) -> Found:
    """What came of each check of the methods."""
    found: Found = run("checks")
    return found


@pytest.fixture(scope="module")
def ends(run: Run) -> Found:
    """What came of each check of the ends."""
    found: Found = run("ends")
    return found


@pytest.mark.parametrize("promise", client_checks.CHECKS)
def test_client_methods_of_the_manual_work_on_a_real_device(methods: Found, promise: str) -> None:
    problem = methods[promise][1]
    assert problem == "", problem


@pytest.mark.parametrize("promise", client_ends.CHECKS)
def test_client_service_ends_as_it_should_and_leaves_nothing_behind(ends: Found, promise: str) -> None:
    problem = ends[promise][1]
    assert problem == "", problem


def test_client_examples_of_the_documentation_work_and_print_what_it_says(lab: Lab, run: Run) -> None:
    lab.guest.run("grep -q storage.example /etc/hosts || echo 127.0.0.1 storage.example >>/etc/hosts")
    server = lab.serve(
        "nbdkit -f -i 127.0.0.1 -p 10809 memory 64M",
        "nbd://127.0.0.1:10809",
        ready="ss -ltnH sport = :10809 | grep -q .",
    )
    try:
        found = run("examples", "docs/client.md")
    finally:
        lab.stop(server)
        lab.guest.run("sed -i /storage.example/d /etc/hosts")
    assert {heading: problem for heading, problem in found.items() if problem} == {}


@pytest.mark.quick_on("debian12")
def test_client_rounds_of_run_async_and_kill_async_leave_nothing(run: Run, show: Show, release: str) -> None:
    found = run("rounds", "rounds", ROUNDS, seconds=ROUNDS * 1.5 + 60)
    seconds = found["seconds"]
    assert len(seconds) == ROUNDS
    before, after = found["before"], found["after"]
    show(
        f"{release}: {ROUNDS} rounds of run_async and kill_async in {sum(seconds):.0f} s,"
        f" {sorted(seconds)[ROUNDS // 2]:.2f} s each (median), {max(seconds):.2f} s at most;"
        f" resident memory {before['resident'] * 4} KiB before, {after['resident'] * 4} KiB after"
    )
    for kept in ("descriptors", "children", "threads", "bound"):
        assert after[kept] == before[kept], kept
    assert after["bound"] == {}
    assert after["resident"] <= before["resident"] * 1.05, "pages of memory"
    assert found["log"] == [], "what the kernel said beyond the ordinary"


@pytest.mark.quick_on("debian13")
def test_client_service_killed_at_any_moment_leaves_a_usable_device(run: Run, show: Show, release: str) -> None:
    found = run("rounds", "kills", KILLS)
    outcomes = found["outcomes"]
    early = sum(outcome != "killed later" for outcome in outcomes)
    show(f"{release}: {KILLS} services killed, {early} of them before their device could be used")
    assert len(outcomes) == KILLS
    assert set(outcomes) <= {"WorkerFailed", "killed later"}
    # Both kinds must have been there, or the moments are not spread as they should be.
    assert 0 < early < KILLS
    assert found["after"] == {**found["before"], "resident": found["after"]["resident"]}
    assert found["log"] == [], "what the kernel said beyond the ordinary"


def test_package_is_typed_for_type_checkers(guest: Guest) -> None:
    guest.run("test -e /usr/lib/python3/dist-packages/nbdd/py.typed")
