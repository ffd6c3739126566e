# SPDX-License-Identifier: MIT
"""Guests for tests: `guest` is shared by all tests of a release, `clean_guest` boots one for a single test.

A test that asks for either runs once for each release, and is marked `guest`. With `-n 2 --dist loadgroup`
(pytest-xdist) all that use the shared guest of one release run in one process, so that both releases go side by side;
a test that boots a guest of its own is a group by itself, for whichever process is free.
`--guest-release debian12` (repeatable) runs those of one alone. A guest that does not come up is a failure, not a skip.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.guest import RELEASES, Guest, GuestError, deb
from tests.scale import is_full

FAILURES = Path(__file__).parent / "failures"
GUEST_TEST_SECONDS = 600
_LIVE = pytest.StashKey[list[Guest]]()

CleanGuest = Callable[..., Guest]
Show = Callable[[str], None]
_SHOWN = "shown"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--guest-release",
        action="append",
        choices=sorted(RELEASES),
        help="run the guest tests of this release only (repeatable; default: all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LIVE] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "release" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--guest-release") or list(RELEASES)
        metafunc.parametrize("release", chosen, scope="session", indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not is_full() and not config.getoption("--guest-release"):
        others = [item for item in items if item.get_closest_marker("prove_only") or _belongs_to_another_release(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    # Early enough for `-m guest` and `-m "not guest"`.
    for item in items:
        if "release" in getattr(item, "fixturenames", ()):
            item.add_marker("guest")
            callspec = getattr(item, "callspec", None)
            if callspec is not None:
                own = "clean_guest" in getattr(item, "fixturenames", ())
                item.add_marker(pytest.mark.xdist_group(f"own-{item.name}" if own else callspec.params["release"]))
            # The fixtures have deadlines of their own; what is timed here is the test.
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(GUEST_TEST_SECONDS, func_only=True))

    if hasattr(config, "workerinput"):
        # The long groups first: a process that begins with something else comes to them too late.
        items.sort(key=_length_of_group)


def _length_of_group(item: pytest.Item) -> int:
    """0 for those that share a guest, 1 for one with a guest of its own, 2 for one without a guest."""
    group = item.get_closest_marker("xdist_group")
    if group is None:
        return 2
    return 1 if str(group.args[0]).startswith("own-") else 0


def _belongs_to_another_release(item: pytest.Item) -> bool:
    """Whether a quick run of all releases does without it: see the mark `quick_on` in pyproject.toml."""
    mark, callspec = item.get_closest_marker("quick_on"), getattr(item, "callspec", None)
    return mark is not None and callspec is not None and callspec.params["release"] != mark.args[0]


def pytest_collection_finish(session: pytest.Session) -> None:
    # A pytest-xdist that does not know the groups would boot every guest in every process, and say nothing.
    if hasattr(session.config, "workerinput") and session.config.getoption("loadgroup", False):
        strays = [
            item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid
        ]
        if strays:
            raise pytest.UsageError(f"pytest-xdist does not group {strays[0]} and {len(strays) - 1} others")


@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Show:
    """Call it with figures that are to be seen, also where the test passes: they are printed at the end of the run."""

    def shown(text: str) -> None:
        record_property(_SHOWN, text)

    return shown


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # From the reports, as what a process of pytest-xdist prints is lost.
    for reports in (terminalreporter.stats.get(outcome, ()) for outcome in ("passed", "failed")):
        for name, text in (found for report in reports for found in report.user_properties):
            if name == _SHOWN:
                terminalreporter.write_line(f"\n{text}")


@pytest.fixture(scope="session")
def release(request: pytest.FixtureRequest) -> str:
    """`debian12` or `debian13`."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def nbdd_deb() -> Path:
    """The newest package in dist/."""
    try:
        return deb.required()
    except GuestError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def guest(release: str, nbdd_deb: Path, request: pytest.FixtureRequest) -> Guest:
    """A booted guest with nbdd installed, shared by all tests of the release: leave it as you found it."""
    return _make(request, release, nbdd_deb)


@pytest.fixture
def clean_guest(release: str, request: pytest.FixtureRequest) -> CleanGuest:
    """Call it for a freshly booted guest of the test's own: `clean_guest()`, or `clean_guest(bare=True)` without nbdd.

    Other keywords (`memory`, `cpus`, `sees_host`) go to `Guest`.
    """

    def make(*, bare: bool = False, **more: Any) -> Guest:
        package = None if bare else request.getfixturevalue("nbdd_deb")
        return _make(request, release, package, **more)

    return make


def _make(request: pytest.FixtureRequest, release: str, package: Path | None, **more: Any) -> Guest:
    live = request.config.stash[_LIVE]
    made = Guest(release, **more)

    def end() -> None:
        live.remove(made)
        made.close()

    # Before the boot: a guest that does not come up is there for its evidence until the test is torn down.
    live.append(made)
    request.addfinalizer(end)
    problem = ""
    try:
        made.boot()
        if package is not None:
            made.install(package)
    except GuestError as error:
        # Outside of here, or the report shows the same text twice.
        problem = str(error)
    if problem:
        pytest.fail(problem, pytrace=False)
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "setup":
        shutil.rmtree(_evidence(item), ignore_errors=True)
    if report.failed and "release" in getattr(item, "fixturenames", ()):
        for made in item.config.stash[_LIVE]:
            _keep(made, item, report)
    return report


def _keep(made: Guest, item: pytest.Item, report: pytest.TestReport) -> None:
    FAILURES.mkdir(exist_ok=True)
    (FAILURES / ".gitignore").write_text("*\n")
    directory = _evidence(item)
    made.save_evidence(directory)
    state = "it is up" if made.alive else "it is dead"
    report.sections.append((f"console of {made.release} ({state}; all of it in {directory})", made.console(40)))
    journal = next(iter(sorted(directory.glob(f"{made.name}-journal.log"))), None)
    if journal is not None:
        tail = journal.read_text(errors="replace").splitlines()[-40:]
        report.sections.append((f"journal of {made.release}", "\n".join(tail)))


def _evidence(item: pytest.Item) -> Path:
    return FAILURES / re.sub(r"[^A-Za-z0-9_.=-]+", "-", item.nodeid.removeprefix("tests/"))[:150].strip("-")
