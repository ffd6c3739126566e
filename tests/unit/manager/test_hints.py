# SPDX-License-Identifier: MIT
"""What desktops are told of a device: what the key says, before udev can ask, and never a word more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdd.config.definition import Definition, Desktop
from nbdd.config.options import definition_from_options
from nbdd.errors import InvalidArgs
from nbdd.manager.hints import properties
from nbdd.manager.records import Record, Records
from nbdd.uri import URI

TREE = Path(__file__).resolve().parents[3]
ODD = "Eve's photos (2026) = $env{HOME} %k #1"
ICONS = ("UDISKS_ICON_NAME", "UDISKS_SYMBOLIC_ICON_NAME")
SYSTEM = {"UDISKS_SYSTEM": "0", "UDISKS_AUTO": "0"}


def imported(text: str) -> dict[str, str]:
    """A file as udev's IMPORT{file} reads it (systemd, src/udev/udev-rules.c: get_property_from_string)."""
    found = {}
    for line in re.split("[\n\0]", text):
        key, equals, value = line.strip().partition("=")
        if not key or key.startswith("#"):
            continue
        assert equals, line
        if value[0] in "\"'":
            assert value[-1] == value[0], line
            value = value[1:-1]
        found[key] = value
    return found


def definition(desktop: Desktop | None, name: str = "disk") -> Definition:
    return Definition(name=name, uri=(URI.parse("nbd://h/x"),), desktop=desktop)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "run" / "devices")


@pytest.mark.parametrize(
    ("desktop", "expected"),
    [
        (Desktop(), SYSTEM),
        (Desktop(user_mountable=False), SYSTEM | {"UDISKS_SYSTEM": "1"}),
        (Desktop(ODD), SYSTEM | {"UDISKS_NAME": ODD}),
        (Desktop("写真"), SYSTEM | {"UDISKS_NAME": "写真"}),
        (Desktop(icon="a.b"), SYSTEM | {"UDISKS_ICON_NAME": "a.b", "UDISKS_SYMBOLIC_ICON_NAME": "a.b-symbolic"}),
        (Desktop(icon="b-symbolic"), SYSTEM | dict.fromkeys(ICONS, "b-symbolic")),
    ],
)
def test_hints_are_read_by_udev(desktop: Desktop, expected: dict[str, str]) -> None:
    assert imported(properties(desktop)) == expected


@given(name=st.text(max_size=70), icon=st.text(max_size=70))
def test_hints_of_any_valid_text_set_no_other_property(name: str, icon: str) -> None:
    for settings in ({"name": name}, {"icon": icon}):
        try:
            found = definition_from_options("a", {"uri": "nbd://h/x", "desktop": settings}).desktop
        except InvalidArgs:
            continue
        assert found is not None
        told = imported(properties(found))
        assert {key: value for key, value in told.items() if key not in {*SYSTEM, "UDISKS_SYMBOLIC_ICON_NAME"}} == {
            "UDISKS_NAME" if "name" in settings else "UDISKS_ICON_NAME": next(iter(settings.values()))
        }


@pytest.mark.parametrize(
    "name",
    ["a\nUDISKS_SYSTEM=0", "a\n", 'a"', "a\\", "a\r", "\0", "\x7f", "\x85", "\u2028", "\u202e", "\ud800", "x" * 65, ""],
)
def test_hints_reject_name_that_could_set_another_property(name: str) -> None:
    with pytest.raises(InvalidArgs, match=r"'desktop\.name' must be a text of 1 to 64 characters without quotes"):
        definition_from_options("a", {"uri": "nbd://h/x", "desktop": {"name": name}})


def test_hints_are_written_and_removed_with_the_record(records: Records, tmp_path: Path) -> None:
    path = tmp_path / "run" / "udev" / "disk.env"
    records.write(Record(definition(Desktop("Photos")), configured=True))
    assert imported(path.read_text())["UDISKS_NAME"] == "Photos"
    assert [entry.name for entry in path.parent.iterdir()] == ["disk.env"]
    records.remove("disk")
    assert not path.exists()


def test_hints_are_removed_if_desktop_key_is_gone(records: Records, tmp_path: Path) -> None:
    records.write(Record(definition(None), configured=True))
    assert not (tmp_path / "run" / "udev").exists()
    records.write(Record(definition(Desktop()), configured=True))
    records.write(Record(definition(None), configured=True))
    assert list((tmp_path / "run" / "udev").iterdir()) == []


def test_hints_are_written_before_the_record(records: Records, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "udev").write_text("in the way")
    with pytest.raises(Exception, match="can't be written"):
        records.write(Record(definition(Desktop()), configured=True))
    assert records.load() == []


def test_hints_are_restored_by_writing_the_record(records: Records, tmp_path: Path) -> None:
    desktop = Desktop("Photos", "folder-pictures", user_mountable=False)
    records.write(Record(definition(desktop), configured=True))
    (record,) = records.load()
    assert record.definition.desktop == desktop
    assert json.loads((tmp_path / "run" / "devices" / "disk.json").read_text())["definition"]["desktop"] is not None


def test_udev_rules_import_hints_after_checking_the_name() -> None:
    rules = (TREE / "systemd" / "60-nbdd.rules").read_text()
    check, skip, load, end = (
        rules.index(part)
        for part in (
            'ATTRS{backend}!="*[!a-zA-Z0-9._:-]*"',
            'ENV{NBDD_NAME}=="", GOTO="nbdd_end"',
            'IMPORT{file}="/run/nbdd/udev/$env{NBDD_NAME}.env"',
            'LABEL="nbdd_end"',
        )
    )
    assert check < skip < load < end
