# SPDX-License-Identifier: MIT
"""Guests for tests: `guest` is shared by tests of a release, `clean_guest` makes one for a single test.

A test that asks for either runs once for each release, and is marked `guest`. With `-n 2 --dist loadgroup
--no-loadscope-reorder` (pytest-xdist) the tests of a file with the shared guest of a release are a group, and a test
with a guest of its own is one by itself; each group runs in whichever process is free. A process has one shared guest,
and changes it when the next group is of the other release: a restore takes a second (tests/guest/snapshot.py).
`--guest-release debian12` (repeatable) runs those of one alone. A guest that does not come up is a failure, not a skip.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.guest import RELEASES, Guest, GuestError, costs, deb
from tests.scale import is_full

FAILURES = Path(__file__).parent / "failures"
GUEST_TEST_SECONDS = 600
_LIVE = pytest.StashKey[list[Guest]]()
_COSTS = pytest.StashKey[list[tuple[str, float]]]()
"""What guests took to come up, and no report has said yet."""

LONGEST = ("test_mending", "test_survival", "test_shutdown", "test_bad_input", "test_desktop", "test_client")
"""Files that take longest in a guest: they are begun first, or one of them is what all wait for at the end."""

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
    config.stash[_COSTS] = []


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
                name = item.name if own else f"{item.path.stem}-{callspec.params['release']}"
                item.add_marker(pytest.mark.xdist_group(name))
            # The fixtures have deadlines of their own; what is timed here is the test.
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(GUEST_TEST_SECONDS, func_only=True))

    if hasattr(config, "workerinput"):
        items.sort(key=_place_of_group)


def _place_of_group(item: pytest.Item) -> tuple[int, str]:
    """The long groups first; those without a guest last, for whichever process has nothing else left."""
    group = item.get_closest_marker("xdist_group")
    if group is None:
        return len(LONGEST) + 1, ""
    stem = item.path.stem
    return LONGEST.index(stem) if stem in LONGEST else len(LONGEST), str(group.args[0])


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
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for line in costs.table([report for report in reports if isinstance(report, pytest.TestReport)]):
        terminalreporter.write_line(line)


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
        if package is None:
            made.boot()
        else:
            made.come_up(package)
    except GuestError as error:
        # Outside of here, or the report shows the same text twice.
        problem = str(error)
    request.config.stash[_COSTS] += made.costs
    if problem:
        pytest.fail(problem, pytrace=False)
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # Whichever report comes first: a process of pytest-xdist has no other way to say it.
    report.user_properties += [(costs.CAME_UP, entry) for entry in item.config.stash[_COSTS]]
    item.config.stash[_COSTS].clear()
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
