# SPDX-License-Identifier: MIT
"""What a desktop reads of nbdd agrees with itself, with the programs, and with the tools that check such files."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from nbdd import __version__
from nbdd.desktop.notifications import DESKTOP_ENTRY

TREE = Path(__file__).resolve().parents[3]
DESKTOP = TREE / "desktop"
ENTRIES = ("org.nbdd1.open.desktop", "nbdd-notify.desktop")
METAINFO = "org.nbdd1.open.metainfo.xml"
LINKS = {"x-scheme-handler/nbd", "x-scheme-handler/nbds"}


def entry(name: str, section: str = "Desktop Entry") -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DESKTOP / name)
    return parser[section]


def project() -> dict[str, Any]:
    return tomllib.loads((TREE / "pyproject.toml").read_text())


def shared() -> dict[str, str]:
    found: dict[str, str] = project()["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    return found


def checked(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "desktop-file-validate" not in command or not done.stdout + done.stderr


@pytest.mark.parametrize("name", ENTRIES)
def test_desktop_entries_are_valid(name: str) -> None:
    checked("desktop-file-validate", str(DESKTOP / name))


def test_metainfo_is_valid() -> None:
    checked("appstreamcli", "validate", "--no-net", "--pedantic", str(DESKTOP / METAINFO))


def test_user_unit_is_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None or not Path("/usr/lib/systemd/user").is_dir():
        pytest.skip("needs systemd-analyze and its units")
    text = (DESKTOP / "nbdd-notify.service").read_text()
    # A user's units can't be checked below another root, so the program has to be one that is there.
    unit = tmp_path / "nbdd-notify.service"
    unit.write_text(text.replace("/usr/bin/nbdd-notify", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "nbdd" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


def test_desktop_entry_starts_the_program_with_the_uri() -> None:
    opener = entry("org.nbdd1.open.desktop")
    assert set(opener["MimeType"].strip(";").split(";")) == LINKS
    assert opener["Exec"] == "nbdd-open %u"
    assert entry("org.nbdd1.open.desktop", "Desktop Action detach")["Exec"] == "nbdd-open --detach"


def test_desktop_entries_start_only_programs_of_the_project() -> None:
    scripts = project()["project"]["scripts"].keys()
    for name in ENTRIES:
        assert entry(name)["TryExec"] == entry(name)["Exec"].split()[0]
        assert entry(name)["TryExec"] in scripts
    assert "ExecStart=/usr/bin/nbdd-notify\n" in (DESKTOP / "nbdd-notify.service").read_text()
    provided = {element.text for element in ET.parse(DESKTOP / METAINFO).getroot().iterfind("provides/binary")}
    assert provided == {"nbdd-open", "nbdd-notify"} <= scripts


def test_notifier_is_started_once_by_systemd_or_by_the_session() -> None:
    autostart = entry("nbdd-notify.desktop")
    assert autostart["X-systemd-skip"] == autostart["X-GNOME-HiddenUnderSystemd"] == "true"
    assert "WantedBy=graphical-session.target\n" in (DESKTOP / "nbdd-notify.service").read_text()


def test_desktop_names_are_the_same_in_all_files() -> None:
    root = ET.parse(DESKTOP / METAINFO).getroot()
    assert root.findtext("id") == DESKTOP_ENTRY
    assert root.findtext("launchable") == f"{DESKTOP_ENTRY}.desktop" == ENTRIES[0]
    assert root.findtext("name") == entry(ENTRIES[0])["Name"]
    assert {element.text for element in root.iterfind("provides/mediatype")} == LINKS
    icons = {root.findtext("icon"), *(entry(name)["Icon"] for name in ENTRIES)}
    assert icons == {"org.nbdd1"}
    releases = [release.attrib["version"] for release in root.iterfind("releases/release")]
    assert __version__ in releases


def test_desktop_files_are_installed_where_desktops_look() -> None:
    places = {
        "nbdd-notify.service": "lib/systemd/user/nbdd-notify.service",
        "org.nbdd1.open.desktop": "share/applications/org.nbdd1.open.desktop",
        METAINFO: f"share/metainfo/{METAINFO}",
        "org.nbdd1.rules": "share/polkit-1/rules.d/org.nbdd1.rules",
        "org.nbdd1.svg": "share/icons/hicolor/scalable/apps/org.nbdd1.svg",
    }
    installed = {Path(source).name: place for source, place in shared().items() if source.startswith("desktop/")}
    assert installed == places
    # /etc is not under the prefix of a wheel.
    assert "desktop/nbdd-notify.desktop etc/xdg/autostart\n" in (TREE / "debian/nbdd.install").read_text()
    examples = {"60-nbdd-group.rules"}
    assert {path.name for path in DESKTOP.iterdir()} == {*places, "nbdd-notify.desktop"} | examples


def test_icon_is_one_that_every_desktop_can_draw() -> None:
    root = ET.parse(DESKTOP / "org.nbdd1.svg").getroot()
    assert root.attrib["viewBox"] == "0 0 128 128"
    assert not [
        element.tag for element in root.iter() if element.tag.endswith(("}text", "}image", "}script", "}style"))
    ]


def test_package_requires_nothing_that_only_a_desktop_needs() -> None:
    control = (TREE / "debian/control").read_text()
    needed = control[control.index("\nDepends:") : control.index("\nSuggests:")]
    for package in ("udisks2", "xdg-utils", "libnotify", "desktop", "session-bus", "icon"):
        assert package not in needed
    assert " udisks2,\n" in control[control.index("\nSuggests:") :]


def test_screenshots_are_those_that_the_documentation_shows() -> None:
    docs = TREE / "docs"
    shown = set(re.findall(r"\]\((screenshots/[^)]+)\)", (docs / "desktop.md").read_text()))
    assert shown == {f"screenshots/{path.name}" for path in (docs / "screenshots").iterdir()}
    assert all((docs / path).stat().st_size < 40_000 for path in shown)
