# SPDX-License-Identifier: MIT
"""``python3 -m nbdd.system.install``: makes a service of a wheel; the Debian package does without.

A wheel can carry files to its own prefix only, and those who read them look elsewhere: systemd, udev, D-Bus and polkit.
This copies them there and starts nothing. All goes to /usr/local, which is the administrator's (FHS 3.0, section 4.9),
but for what is read in one other place alone.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from nbdd.errors import NbddError

PLACES = {
    "lib/systemd/system": "usr/local/lib/systemd/system",
    "lib/udev/rules.d": "usr/local/lib/udev/rules.d",
    "lib/modules-load.d": "usr/local/lib/modules-load.d",
    "lib/sysusers.d": "usr/local/lib/sysusers.d",
    "lib/systemd/user": "usr/local/lib/systemd/user",
    "share/dbus-1/interfaces": "usr/local/share/dbus-1/interfaces",
    "share/dbus-1/system-services": "usr/local/share/dbus-1/system-services",
    # dbus-daemon(1): policies are read in /usr/share and in /etc, and in no /usr/local.
    "share/dbus-1/system.d": "etc/dbus-1/system.d",
    "share/applications": "usr/local/share/applications",
    "share/icons/hicolor/scalable/apps": "usr/local/share/icons/hicolor/scalable/apps",
    "share/metainfo": "usr/local/share/metainfo",
    "share/bash-completion/completions": "usr/local/share/bash-completion/completions",
    "share/fish/vendor_completions.d": "usr/local/share/fish/vendor_completions.d",
    # Debian's own name for it is searched below /usr/share alone.
    "share/zsh/vendor-completions": "usr/local/share/zsh/site-functions",
    "share/polkit-1/rules.d": "etc/polkit-1/rules.d",
    # polkit reads actions here alone until release 124, which Debian 12 does not have.
    "share/polkit-1/actions": "usr/share/polkit-1/actions",
}
"""Folder below the wheel's prefix to folder below the root."""

PROGRAMS = ("nbdd", "nbdctl", "nbdd-metrics", "nbdd-notify", "nbdd-open")

_OF_THE_PACKAGE = "usr/lib/systemd/system/nbdd.service"
_ENABLED = "etc/systemd/system/multi-user.target.wants/nbdd.service"

_BEGIN = """\
Now start it:
  systemd-sysusers
  systemctl daemon-reload
  systemctl reload dbus
  udevadm control --reload
  systemctl enable --now nbdd"""
_END = """\
Now make it known:
  systemctl daemon-reload
  systemctl reload dbus
  udevadm control --reload"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Copy or remove the files; return the exit status: 0 done, 1 failed, 2 wrong usage (argparse exits)."""
    parser = argparse.ArgumentParser(
        prog="python3 -m nbdd.system.install",
        description="Make a service of an nbdd that came as a wheel: copy its units, rules and policies to where "
        "systemd, udev, D-Bus and polkit look. Nothing is started.",
    )
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="the system's root (default: /)")
    parser.add_argument("--remove", action="store_true", help="remove the files again; /etc/nbdd stays")
    given = parser.parse_args(arguments)
    os.umask(0o022)  # what is copied is for everyone to read
    try:
        changed = remove(given.root) if given.remove else install(given.root)
    except NbddError as error:
        print(f"nbdd.system.install: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        why = "only root may" if isinstance(error, PermissionError) else error.strerror
        print(f"nbdd.system.install: {error.filename} can't be changed: {why}.", file=sys.stderr)
        return 1
    for path in changed:
        print(path)
    if given.root == Path("/"):
        print(_END if given.remove else _BEGIN)
    return 0


def install(root: Path) -> list[Path]:
    """Copy the files below `root`, the units with the programs of this wheel in them; return where they are now."""
    if (root / _OF_THE_PACKAGE).exists():
        raise NbddError(
            f"{root / _OF_THE_PACKAGE} is there: the package nbdd is installed, which is all that is needed."
        )
    programs = {name: _program(name) for name in PROGRAMS}
    if root == Path("/"):
        for program in programs.values():
            _insist_on_root(program)
    done = []
    for source, target in _files(root):
        text = re.sub(r"/usr/bin/(nbd[-a-z]+)", lambda found: str(programs[found[1]]), source.read_text())
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and then in its place: a reader may come at any time.
        new = target.with_name(f".{target.name}.new")
        new.write_text(text)
        new.replace(target)
        done.append(target)
    (root / "etc/nbdd/devices.d").mkdir(parents=True, exist_ok=True)
    return done


def remove(root: Path) -> list[Path]:
    """Remove what `install` copied; return what was there."""
    if (root / _ENABLED).is_symlink():
        raise NbddError("The service is still enabled; first: systemctl disable --now nbdd")
    there = [target for _, target in _files(root) if target.exists()]
    for target in there:
        target.unlink()
    return there


def _files(root: Path) -> Iterator[tuple[Path, Path]]:
    """Each file of the wheel that others read: where it is, and where it goes."""
    for path in _wheel():
        for folder, place in PLACES.items():
            if path.parent.as_posix().endswith(f"/{folder}"):
                yield path, root / place / path.name


def _program(name: str) -> Path:
    for path in _wheel():
        if path.name == name and path.parent.name == "bin":
            return path
    raise NbddError(f"The wheel has no program {name}: install it again with pip.")


def _wheel() -> list[Path]:
    """All that pip installed with nbdd."""
    try:
        found = metadata.files("nbdd") or []
    except metadata.PackageNotFoundError:
        raise NbddError("This nbdd was not installed as a wheel; in a source tree there is `make deb`.") from None
    # Not resolve(): a unit names the program as pip does, and what that may lead to is looked at below.
    return [Path(os.path.normpath(path.locate())) for path in found]


def _insist_on_root(program: Path) -> None:
    """The service runs as root: who may change its program, or a folder above it, is root."""
    for path in (program, *program.parents, *program.resolve().parents):
        found = path.stat()
        anyone = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if found.st_uid != 0 or anyone:
            raise NbddError(
                f"{path} can be changed by others than root, and the service would run {program} as root: "
                "install the wheel as root, into a folder of root's, such as /opt/nbdd."
            )


if __name__ == "__main__":
    sys.exit(main())
