# SPDX-License-Identifier: MIT
"""What the tests in guests took, as a table for the end of a run: each file, the dearest tests, and the guests."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

CAME_UP = "guest came up"
"""The name of a report's property; its value is what was done, and its seconds."""

DEAREST = 30
_PHASES = ("setup", "call", "teardown")
_RELEASE = re.compile(r"\[(debian\d+)")


class Report(Protocol):
    """What is read of pytest's report on one phase of one test."""

    nodeid: str
    duration: float
    user_properties: list[tuple[str, object]]

    @property
    def when(self) -> str | None:
        """The phase."""


@dataclass
class Cost:
    """Seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0.0))
    tests: int = 0

    @property
    def total(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())

    def add(self, report: Report) -> None:
        """Count one phase of a test."""
        self.seconds[str(report.when)] += report.duration
        self.tests += report.when == "setup"

    def line(self, name: str) -> str:
        """Return a row of the table."""
        phases = " ".join(f"{self.seconds[phase]:8.1f}" for phase in _PHASES)
        return f"{self.total:8.1f} {phases} {self.tests:6}  {name}"


def table(reports: Iterable[Report]) -> list[str]:
    """Return the lines of the table; none where no test had a guest."""
    files: defaultdict[str, Cost] = defaultdict(Cost)
    tests: defaultdict[str, Cost] = defaultdict(Cost)
    releases: defaultdict[str, Cost] = defaultdict(Cost)
    guests: defaultdict[str, list[float]] = defaultdict(list)
    # A failure in a teardown, and what was shown, may stand under more than one heading.
    for report in {(report.nodeid, report.when): report for report in reports}.values():
        for name, value in report.user_properties:
            if name == CAME_UP and isinstance(value, (list, tuple)):
                what, seconds = value
                guests[str(what)].append(float(seconds))
        release = _RELEASE.search(report.nodeid)
        if release is None or report.when not in _PHASES:
            continue
        # pytest-xdist appends the group.
        name = report.nodeid.rpartition("@")[0] or report.nodeid
        for costs, key in ((files, f"{name.partition('::')[0]} {release[1]}"), (tests, name), (releases, release[1])):
            costs[key].add(report)
    if not tests:
        return []
    lines = ["", "What the tests in guests took, in seconds:", _HEADING]
    for costs, most in ((releases, len(releases)), (files, len(files)), (tests, DEAREST)):
        dearest = sorted(costs.items(), key=lambda item: -item[1].total)[:most]
        lines += [*(cost.line(name) for name, cost in dearest), ""]
    lines += [
        f"{sum(found):8.1f}  {what} guests: {len(found)} times, {max(found):.1f} s at most"
        for what, found in sorted(guests.items())
    ]
    return lines


_HEADING = f"{'all':>8} {'setup':>8} {'call':>8} {'teardown':>8} {'tests':>6}"
