# SPDX-License-Identifier: MIT
"""What an administrator without the Debian package may rely on: nbdd.system.install makes a service of a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from nbdd.system.install import PLACES, PROGRAMS, main

TREE = Path(__file__).resolve().parents[3]
HOST_UNITS = Path("/usr/lib/systemd/system")

FILES = {
    "etc/dbus-1/system.d/org.nbdd1.conf",
    "usr/local/lib/modules-load.d/nbdd.conf",
    "usr/local/lib/systemd/system/nbdd-metrics.service",
    "usr/local/lib/systemd/system/nbdd-metrics.socket",
    "usr/local/lib/systemd/user/nbdd-notify.service",
    "usr/local/lib/sysusers.d/nbdd.conf",
    "usr/local/share/applications/org.nbdd1.open.desktop",
    "usr/local/share/icons/hicolor/scalable/apps/org.nbdd1.svg",
    "usr/local/share/metainfo/org.nbdd1.open.metainfo.xml",
    "usr/local/share/bash-completion/completions/nbdctl",
    "usr/local/share/fish/vendor_completions.d/nbdctl.fish",
    "usr/local/share/zsh/site-functions/_nbdctl",
    "usr/local/lib/systemd/system/nbdd-attach@.service",
    "usr/local/lib/systemd/system/nbdd.service",
    "usr/local/lib/udev/rules.d/60-nbdd.rules",
    "usr/local/share/dbus-1/interfaces/org.nbdd1.Device.xml",
    "usr/local/share/dbus-1/interfaces/org.nbdd1.Manager.xml",
    "usr/local/share/dbus-1/system-services/org.nbdd1.service",
    "usr/share/polkit-1/actions/org.nbdd1.policy",
    "etc/polkit-1/rules.d/org.nbdd1.rules",
}

Run = Callable[..., tuple[int, str, str]]


class Installed:
    """A file of a wheel as importlib.metadata gives it; relative to a folder of Python's, with ".." to the prefix."""

    def __init__(self, packages: Path, path: Path) -> None:
        self._path = packages / os.path.relpath(path, packages)

    def locate(self) -> Path:
        return self._path


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that pip puts there, as the wheel's own table says, and this Python finding nbdd there."""
    prefix = tmp_path / "opt/nbdd"
    packages = prefix / "lib/python3.11/site-packages"
    table = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for kind, start in (("shared-data", prefix), ("force-include", packages)):
        for source, target in table[kind].items():
            (start / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TREE / source, start / target)
    programs = [prefix / "bin" / name for name in PROGRAMS]
    for program in programs:
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    shipped = sorted({path for path in prefix.rglob("*") if path.is_file()})
    monkeypatch.setattr(metadata, "files", lambda _: [Installed(packages, path) for path in shipped])
    return prefix


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], root: Path) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        umask = os.umask(0o077)
        try:
            status = main(arguments or ("--root", str(root)))
        finally:
            os.umask(umask)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


@pytest.mark.usefixtures("prefix")
def test_install_copies_every_file_to_where_its_reader_looks(run: Run, root: Path) -> None:
    status, out, err = run()
    assert (status, set(out.splitlines()), err) == (0, {str(root / place) for place in FILES}, "")
    assert files(root) == FILES
    assert (root / "etc/nbdd/devices.d").is_dir()
    assert {(root / place).stat().st_mode & 0o777 for place in FILES} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_dir()} == {0o755}


def test_install_puts_programs_of_the_wheel_into_units_and_changes_nothing_else(
    run: Run, root: Path, prefix: Path
) -> None:
    run()
    for source in (TREE / "systemd").glob("*.service"):
        text = re.sub(r"/usr/bin/(?=nbd)", f"{prefix}/bin/", source.read_text())
        assert (root / "usr/local/lib/systemd/system" / source.name).read_text() == text
        assert "/usr/bin/nbd" not in text
    policy = "org.nbdd1.policy"
    assert (root / "usr/share/polkit-1/actions" / policy).read_bytes() == (TREE / "dbus" / policy).read_bytes()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None or not HOST_UNITS.is_dir(), reason="needs systemd's units")
def test_installed_units_and_programs_are_found_by_systemd(run: Run, root: Path, prefix: Path) -> None:
    run()
    shutil.copytree(HOST_UNITS, root / "usr/lib/systemd/system", symlinks=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "usr/bin").mkdir()
    shutil.copy(prefix / "bin/nbdd", root / "usr/bin/busctl")
    (root / prefix.relative_to("/")).parent.mkdir(parents=True)
    shutil.copytree(prefix, root / prefix.relative_to("/"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", "nbdd.service", "nbdd-attach@x.service"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "nbdd" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.usefixtures("prefix")
def test_install_again_renews_files_and_remove_leaves_only_configuration(run: Run, root: Path) -> None:
    run()
    unit = root / "usr/local/lib/systemd/system/nbdd.service"
    new = unit.read_text()
    unit.write_text("of an older release\n")
    (root / "etc/nbdd/devices.d/mine.yaml").write_text("devices: {}\n")
    assert run()[0] == 0
    assert unit.read_text() == new
    status, out, _ = run("--root", str(root), "--remove")
    assert (status, len(out.splitlines())) == (0, len(FILES))
    assert files(root) == {"etc/nbdd/devices.d/mine.yaml"}
    assert run("--root", str(root), "--remove") == (0, "", "")


@pytest.mark.usefixtures("prefix")
def test_remove_of_enabled_service_is_refused(run: Run, root: Path) -> None:
    run()
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "nbdd.service").symlink_to("/usr/local/lib/systemd/system/nbdd.service")
    said = "nbdd.system.install: The service is still enabled; first: systemctl disable --now nbdd\n"
    assert run("--root", str(root), "--remove") == (1, "", said)
    assert files(root) > FILES


@pytest.mark.usefixtures("prefix")
def test_install_beside_debian_package_is_refused(run: Run, root: Path) -> None:
    unit = root / "usr/lib/systemd/system/nbdd.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    status, out, err = run()
    assert (status, out, files(root)) == (1, "", {"usr/lib/systemd/system/nbdd.service"})
    assert "the package nbdd is installed" in err


def test_install_of_program_that_others_can_change_is_refused(
    run: Run, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nothing(_path: Path, _text: str) -> None:
        pytest.fail("it wrote to the system")

    monkeypatch.setattr(Path, "write_text", write_nothing)
    if os.geteuid() == 0:
        os.chown(prefix / "bin/nbdd", 65534, 65534)
    status, out, err = run("--root", "/")
    assert (status, out) == (1, "")
    assert err.startswith(f"nbdd.system.install: {prefix / 'bin/nbdd'} can be changed by others than root, and ")


@pytest.mark.usefixtures("prefix")
def test_install_to_unwritable_root_fails_with_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, out, err = run("--root", str(tmp_path / "file"))
    assert (status, out) == (1, "")
    assert err.startswith(f"nbdd.system.install: {tmp_path}/file/")
    assert err.endswith(" can't be changed: Not a directory.\n")


def test_install_has_place_for_every_file_of_the_wheel_and_manual_names_it() -> None:
    table = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folders = {str(Path(target).parent) for target in table["shared-data"].values()}
    # For editors, Prometheus and Grafana, which are given the files by name.
    assert folders == PLACES.keys() | {"share/nbdd", "share/nbdd/prometheus", "share/nbdd/grafana"}
    told = re.findall(r"^\| `/(\S+)` \|", (TREE / "docs/wheel.md").read_text(), re.MULTILINE)
    assert set(told) == set(PLACES.values())


def test_install_from_source_tree_names_make_deb(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", not_installed)
    said = "nbdd.system.install: This nbdd was not installed as a wheel; in a source tree there is `make deb`.\n"
    assert run() == (1, "", said)
