# SPDX-License-Identifier: MIT
"""The proving ground by hand: `python3 -m tests.guest build` and `python3 -m tests.guest shell debian13`."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from pathlib import Path

from tests.guest import deb
from tests.guest.errors import GuestError
from tests.guest.guest import Guest
from tests.guest.image import ensure
from tests.guest.progress import say
from tests.guest.recipe import RELEASES


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands and return the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.guest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the images that are missing")
    build.add_argument("release", nargs="*", metavar="RELEASE", help=f"{' or '.join(RELEASES)}; all if none is named")
    shell = commands.add_parser("shell", help="boot a guest with nbdd installed and open a shell in it")
    shell.add_argument("release", nargs="?", choices=sorted(RELEASES), default="debian13")
    shell.add_argument("--deb", type=Path, metavar="FILE", help="the package to install (default: the newest in dist/)")
    shell.add_argument("--bare", action="store_true", help="install nothing")
    shell.add_argument("-c", dest="line", metavar="COMMAND", help="run this instead of an interactive shell")
    options = parser.parse_args(argv)
    try:
        if options.command == "build":
            return _build(options.release or list(RELEASES))
        return _shell(options.release, None if options.bare else options.deb or deb.newest(), options.line)
    except GuestError as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _build(releases: list[str]) -> int:
    for release in releases:
        start = time.monotonic()
        image = ensure(release)
        say(f"{release}: {image.directory} ({time.monotonic() - start:.1f} s)")
    return 0


def _shell(release: str, package: Path | None, line: str | None) -> int:
    with contextlib.closing(Guest(release)) as guest:
        if package is None:
            say("no nbdd in this guest: `make deb` makes the package")
            guest.boot()
        else:
            guest.come_up(package)
        argv = guest.ssh_argv()
        if line is None:
            say(f"{release}: a shell as root; `exit` ends the guest, and all that was done in it is gone")
            argv.insert(1, "-t")
        else:
            argv += ["--", line]
        return subprocess.run(argv, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
