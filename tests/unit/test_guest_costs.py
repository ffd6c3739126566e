# SPDX-License-Identifier: MIT
"""The table of what tests in guests took."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.guest import costs


@dataclass
class Report:
    nodeid: str
    when: str
    duration: float
    user_properties: list[tuple[str, object]] = field(default_factory=list)


def _test(name: str, setup: float, call: float, teardown: float) -> list[Report]:
    phases = {"setup": setup, "call": call, "teardown": teardown}
    return [Report(name, when, seconds) for when, seconds in phases.items()]


def test_each_release_file_and_test_has_a_row_and_the_dearest_is_first() -> None:
    reports = [
        *_test("tests/system/test_a.py::test_one[debian12]@test_a-debian12", 1, 2, 3),
        *_test("tests/system/test_a.py::test_two[debian12-x]@test_a-debian12", 0, 30, 0),
        *_test("tests/system/test_b.py::test_three[debian13]", 0, 10, 0),
        *_test("tests/unit/test_c.py::test_without_a_guest", 100, 100, 100),
    ]
    rows = [line.split(None, 5) for line in costs.table(reports)[3:] if line]
    assert rows == [
        ["36.0", "1.0", "32.0", "3.0", "2", "debian12"],
        ["10.0", "0.0", "10.0", "0.0", "1", "debian13"],
        ["36.0", "1.0", "32.0", "3.0", "2", "tests/system/test_a.py debian12"],
        ["10.0", "0.0", "10.0", "0.0", "1", "tests/system/test_b.py debian13"],
        ["30.0", "0.0", "30.0", "0.0", "1", "tests/system/test_a.py::test_two[debian12-x]"],
        ["10.0", "0.0", "10.0", "0.0", "1", "tests/system/test_b.py::test_three[debian13]"],
        ["6.0", "1.0", "2.0", "3.0", "1", "tests/system/test_a.py::test_one[debian12]"],
    ]


def test_only_the_dearest_tests_have_a_row() -> None:
    reports = [report for number in range(100) for report in _test(f"a.py::t{number}[debian12]", 0, number, 0)]
    lines = costs.table(reports)
    assert sum("::t" in line for line in lines) == costs.DEAREST
    assert any(line.endswith("::t99[debian12]") for line in lines)


def test_what_guests_took_is_summed_also_where_it_crossed_processes_as_lists() -> None:
    first, *others = _test("a.py::t[debian12]", 1, 1, 1)
    first.user_properties = [(costs.CAME_UP, ["restoring", 1.0]), (costs.CAME_UP, ("booting", 9)), ("other", "x")]
    again = _test("a.py::u[debian12]", 1, 1, 1)
    again[0].user_properties = [(costs.CAME_UP, ["restoring", 2.5])]
    told = costs.table([first, first, *others, *again])[-2:]
    assert [line.strip() for line in told] == [
        "9.0  booting guests: 1 times, 9.0 s at most",
        "3.5  restoring guests: 2 times, 2.5 s at most",
    ]


def test_a_run_without_guests_has_no_table() -> None:
    assert costs.table(_test("tests/unit/test_c.py::test_without_a_guest", 1, 1, 1)) == []
