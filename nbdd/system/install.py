# SPDX-License-Identifier: MIT
"""``python3 -m nbdd.system.install``: sets up the service after ``pip install``; the Debian package does not need it.

A wheel can put files below its own prefix only, where systemd, udev, D-Bus and polkit do not look. This command copies
them to where they do, and starts nothing. They go to /usr/local, which is the administrator's (FHS 3.0, section 4.9),
unless the program that reads a file looks in one other place only.
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
    # zsh searches Debian's name for this folder below /usr/share only.
    "share/zsh/vendor-completions": "usr/local/share/zsh/site-functions",
    "share/polkit-1/rules.d": "etc/polkit-1/rules.d",
    # Before release 124, which Debian 12 does not have, polkit reads actions only here.
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
        description="Set up the service of an nbdd that was installed as a wheel: copy its units, rules and policies "
        "to where systemd, udev, D-Bus and polkit look. Nothing is started.",
    )
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="the system's root (default: /)")
    parser.add_argument("--remove", action="store_true", help="remove the files again; /etc/nbdd stays")
    given = parser.parse_args(arguments)
    os.umask(0o022)  # everybody may read the copies
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
    """Copy the files below `root`, the units with the paths of this wheel's programs; returns the new paths."""
    if (root / _OF_THE_PACKAGE).exists():
        raise NbddError(f"{root / _OF_THE_PACKAGE} exists: the package nbdd is installed, and nothing more is needed.")
    programs = {name: _program(name) for name in PROGRAMS}
    if root == Path("/"):
        for program in programs.values():
            _insist_on_root(program)
    done = []
    for source, target in _files(root):
        text = re.sub(r"/usr/bin/(nbd[-a-z]+)", lambda found: str(programs[found[1]]), source.read_text())
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside it, then renamed: it may be read at any time.
        new = target.with_name(f".{target.name}.new")
        new.write_text(text)
        new.replace(target)
        done.append(target)
    (root / "etc/nbdd/devices.d").mkdir(parents=True, exist_ok=True)
    return done


def remove(root: Path) -> list[Path]:
    """Remove the files that `install` copied; returns the paths of those that existed."""
    if (root / _ENABLED).is_symlink():
        raise NbddError("The service is still enabled; first: systemctl disable --now nbdd")
    found = [target for _, target in _files(root) if target.exists()]
    for target in found:
        target.unlink()
    return found


def _files(root: Path) -> Iterator[tuple[Path, Path]]:
    """Each file of the wheel that is copied: its path and the path of the copy."""
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
    """The paths of all files that pip installed with nbdd."""
    try:
        found = metadata.files("nbdd") or []
    except metadata.PackageNotFoundError:
        raise NbddError("This nbdd was not installed as a wheel; in a source tree there is `make deb`.") from None
    # Not resolve(): a unit names the program as pip does; `_insist_on_root` checks where a link leads.
    return [Path(os.path.normpath(path.locate())) for path in found]


def _insist_on_root(program: Path) -> None:
    """Raise NbddError if others than root can change the program, or a folder above it: the service runs as root."""
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
