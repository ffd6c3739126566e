# SPDX-License-Identifier: MIT
"""The files that make nbdd part of a system agree with each other and with the tools that read them."""

from __future__ import annotations

import configparser
import fnmatch
import itertools
import re
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from nbdd import __version__

TREE = Path(__file__).resolve().parents[3]
SYSTEMD = TREE / "systemd"
DBUS = TREE / "dbus"
HOST_UNITS = Path("/usr/lib/systemd/system")

HIGHEST_EXPOSURE = {"nbdd.service": 3.0, "nbdd-metrics.service": 1.0}
ACTIONS = {
    "attach",
    "attach-uri",
    "detach",
    "force-detach",
    "set-timeout",
    "reconnect",
    "resize",
    "reload",
    "list-exports",
}

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or not HOST_UNITS.is_dir(), reason="needs systemd-analyze and its units"
)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((TREE / "pyproject.toml").read_text())


def unit(name: str) -> configparser.ConfigParser:
    """A unit file's sections; of a key that stands there twice, the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.read_string((SYSTEMD / name).read_text())
    return parser


def wheel_files() -> dict[str, str]:
    """Source to destination, under the prefix, of what others than nbdd read."""
    wheel = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]
    shared: dict[str, str] = wheel["shared-data"]
    return shared


@pytest.fixture
def installed_units(tmp_path: Path) -> Path:
    """A root directory with the host's units, ours beside them, and programs where our units look for them."""
    units = tmp_path / "usr/lib/systemd/system"
    shutil.copytree(HOST_UNITS, units, symlinks=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    for path in [*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.socket")]:
        shutil.copy(path, units)
    programs = tmp_path / "usr/bin"
    programs.mkdir(parents=True)
    for name in ("nbdd", "nbdctl", "nbdd-metrics", "busctl"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    return tmp_path


@needs_systemd_analyze
def test_units_pass_systemd_analyze_verify(installed_units: Path) -> None:
    names = ["nbdd.service", "nbdd-attach@my-disk.service", "nbdd-metrics.socket", "nbdd-metrics.service"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={installed_units}", *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    # An unknown key is a warning only, with exit code 0: silence is what counts.
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "nbdd" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@needs_systemd_analyze
@pytest.mark.parametrize("name", HIGHEST_EXPOSURE)
def test_units_are_exposed_no_more_than_promised(name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", str(SYSTEMD / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    found = re.search(rf"exposure level for {re.escape(name)}: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= HIGHEST_EXPOSURE[name]


def test_wheel_has_every_file_for_the_system() -> None:
    present = {path.relative_to(TREE).as_posix() for folder in (SYSTEMD, DBUS) for path in folder.iterdir()}
    assert present <= wheel_files().keys()
    assert all((TREE / source).is_file() for source in wheel_files())


def test_wheel_installs_files_where_their_readers_look() -> None:
    places = {
        "systemd/*.service": "lib/systemd/system/{name}",
        "systemd/*.socket": "lib/systemd/system/{name}",
        "systemd/*.rules": "lib/udev/rules.d/{name}",
        "dbus/*.conf": "share/dbus-1/system.d/{name}",
        "dbus/*.service": "share/dbus-1/system-services/{name}",
        "dbus/*.xml": "share/dbus-1/interfaces/{name}",
        "dbus/*.policy": "share/polkit-1/actions/{name}",
    }
    for source, destination in wheel_files().items():
        for pattern, place in places.items():
            if fnmatch.fnmatch(source, pattern):
                assert destination == place.format(name=Path(source).name)


def test_wheel_has_what_the_program_reads_at_run_time() -> None:
    inside = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    wanted = {path.relative_to(TREE).as_posix() for path in DBUS.glob("*.xml")} | {"config/nbdd.schema.json"}
    assert inside == {source: f"nbdd/_data/{Path(source).name}" for source in wanted}


def test_version_and_whether_it_is_released_are_the_same_everywhere() -> None:
    debian = (TREE / "debian/changelog").read_text()
    version, distribution = re.findall(r"^nbdd \((.+)\) (.+); urgency=", debian, re.MULTILINE)[0]
    assert version == __version__
    assert pyproject()["tool"]["hatch"]["version"]["path"] == "nbdd/__init__.py"
    title, when = re.findall(r"^## (\S+), (.+)$", (TREE / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert title == version
    if distribution == "UNRELEASED":
        assert when == "not released yet"
    else:
        signed = re.findall(r"^ -- .*>  (.+)$", debian, re.MULTILINE)[0]
        assert when == parsedate_to_datetime(signed).date().isoformat()


def test_release_recipe_names_what_there_is() -> None:
    recipe = (TREE / "docs/releasing.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", (TREE / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", recipe)) <= targets
    for place in ("nbdd/__init__.py", "CHANGELOG.md", "debian/changelog"):
        assert f"`{place}`" in recipe


def test_bus_starts_the_daemon_through_systemd() -> None:
    activation = configparser.ConfigParser(interpolation=None)
    activation.read(DBUS / "org.nbdd1.service")
    section = activation["D-BUS Service"]
    assert section["Name"] == unit("nbdd.service")["Service"]["BusName"] == "org.nbdd1"
    assert section["SystemdService"] == "nbdd.service"
    assert section["User"] == "root"


def test_bus_policy_lets_only_root_own_the_name_and_everyone_call() -> None:
    policies = ET.parse(DBUS / "org.nbdd1.conf").getroot().findall("policy")
    rules = [(dict(policy.attrib), [(rule.tag, dict(rule.attrib)) for rule in policy]) for policy in policies]
    assert rules == [
        ({"user": "root"}, [("allow", {"own": "org.nbdd1"})]),
        ({"context": "default"}, [("allow", {"send_destination": "org.nbdd1"})]),
    ]


def test_polkit_has_every_action_and_each_asks() -> None:
    actions = ET.parse(DBUS / "org.nbdd1.policy").getroot().findall("action")
    assert {action.attrib["id"] for action in actions} == {f"org.nbdd1.{name}" for name in ACTIONS}
    for action in actions:
        defaults = {answer.tag: answer.text for answer in action.iterfind("defaults/*")}
        assert defaults == {"allow_any": "no", "allow_inactive": "no", "allow_active": "auth_admin_keep"}
        message = action.findtext("message") or ""
        assert message.startswith("Authentication is required to ")
        assert message.endswith(".")


def test_attach_unit_is_named_as_the_device() -> None:
    lines = (SYSTEMD / "nbdd-attach@.service").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    assert "%i" in text
    assert "%I" not in text  # it would turn the "-" of a name into "/"


def test_attach_unit_is_not_restarted_with_the_daemon() -> None:
    section = unit("nbdd-attach@.service")["Unit"]
    passing_on = {"requires", "requisite", "bindsto", "partof", "stoppropagatedfrom"}
    assert not passing_on & set(section)  # configparser writes keys small
    assert section["Wants"] == section["After"] == "nbdd.service"


def test_upgrade_restarts_the_daemon_alone() -> None:
    rules = (TREE / "debian/rules").read_text()
    assert "dh_installsystemd --restart-after-upgrade nbdd.service\n" in rules
    assert "nbdd-attach" not in "".join((TREE / f"debian/nbdd.{name}").read_text() for name in ("postinst", "prerm"))


def test_metrics_are_off_by_default_and_for_this_machine_only() -> None:
    rules = (TREE / "debian/rules").read_text()
    assert (
        "dh_installsystemd --no-enable --no-start --restart-after-upgrade nbdd-metrics.socket nbdd-metrics.service\n"
        in rules
    )
    assert unit("nbdd-metrics.socket")["Socket"]["ListenStream"].startswith("127.0.0.1:")


def test_metrics_user_is_made_when_the_package_is_installed() -> None:
    user = unit("nbdd-metrics.service")["Service"]["User"]
    assert f"\nu {user} - " in (SYSTEMD / "sysusers.conf").read_text()
    assert "\n\tdh_installsysusers\n" in (TREE / "debian/rules").read_text()


def test_metrics_unit_does_not_start_the_daemon() -> None:
    section = unit("nbdd-metrics.service")["Unit"]
    assert "nbdd.service" not in " ".join(section.values()).split()


def link_patterns() -> list[tuple[bool, str]]:
    """The patterns on `backend` in the udev rules: (whether a name has to match, pattern)."""
    rules = (SYSTEMD / "60-nbdd.rules").read_text()
    return [(op == "==", pattern) for op, pattern in re.findall(r'ATTRS?\{backend\}(==|!=)"([^"]*)"', rules)]


@pytest.mark.parametrize("name", ["backup", "a", "9-lives", "vm.disk_1:0-x", "A" * 63])
def test_udev_makes_a_symlink_for_every_name_that_a_device_may_have(name: str) -> None:
    assert all(fnmatch.fnmatchcase(name, pattern) is wanted for wanted, pattern in link_patterns())


@pytest.mark.parametrize("name", ["", "..", "-x", ".hidden", "a/b", "a b", "a\\x2f", "$env{x}", "caf\u00e9", "a\nb"])
def test_udev_makes_no_symlink_for_a_name_that_nbdd_would_refuse(name: str) -> None:
    assert link_patterns()
    assert not all(fnmatch.fnmatchcase(name, pattern) is wanted for wanted, pattern in link_patterns())


def test_readme_python_is_that_of_the_reference_which_a_test_runs() -> None:
    def code(text: str, start: str) -> list[str]:
        lines = text[text.index(start) :].splitlines()
        found = list(itertools.takewhile(lambda line: not line.strip() or line[0] not in "`#", lines))
        # Without comments, and without the process id that only one of them keeps.
        return [re.sub(r"^pid = ", "", line.split("#")[0].strip()) for line in found if line.split("#")[0].strip()]

    readme = code((TREE / "README.md").read_text(), "    from nbdd import Client, connect")
    reference = code((TREE / "docs" / "client.md").read_text(), "from nbdd import Client, connect")
    assert len(readme) == 6
    assert readme == reference


def test_reliability_names_tests_that_exist() -> None:
    told = (TREE / "docs" / "reliability.md").read_text()
    tests = {path.name: path.read_text() for path in (TREE / "tests" / "system").glob("test_*.py")}
    files = set(re.findall(r"`(test_\w+\.py)`", told))
    names = re.findall(r"`(\w+)…`", told)
    assert files <= set(tests)
    assert len(names) >= 4
    for name in names:
        assert any(f"def test_{name}" in text for text in tests.values()), name
