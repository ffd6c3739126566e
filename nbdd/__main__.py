# SPDX-License-Identifier: MIT
"""The nbdd command: argv to the daemon or to ``--check``; the only place that ends the process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from nbdd import __version__
from nbdd.errors import InvalidConfig, NbddError

DEFAULT_DIRECTORY = Path("/etc/nbdd")

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: starting again will not help, nbdd.service does not try."""


def main() -> None:
    """Run nbdd; exit 0 done, 1 failed, 2 usage, 78 bad configuration."""
    sys.exit(_run(arguments().parse_args()))


def arguments() -> argparse.ArgumentParser:
    """The parser of the command line; the manual is made from it, too."""
    parser = argparse.ArgumentParser(
        prog="nbdd",
        description="Keep remote disks attached: read device definitions, attach them as /dev/nbdX, serve org.nbdd1.",
    )
    parser.add_argument("--version", action="version", version=f"nbdd {__version__}", help="print the version")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check the configuration: print each fault with file, line and column, or how many devices there are",
    )
    parser.add_argument("--debug", action="store_true", help="log more")
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help=f"where nbdd.yaml and devices.d are (default: {DEFAULT_DIRECTORY})",
    )
    return parser


def _run(given: argparse.Namespace) -> int:
    if given.check:
        from nbdd.config.loader import check  # noqa: PLC0415 - without the daemon's parts

        return check(given.directory, sys.stdout)
    # Here, not above, so that --check and --version need neither a bus nor its library.
    from nbdd.daemon import run  # noqa: PLC0415
    from nbdd.system.journal import log_to_journal  # noqa: PLC0415

    log_to_journal(logging.DEBUG if given.debug else logging.INFO)
    try:
        return asyncio.run(run(given.directory))
    except InvalidConfig as error:
        print(f"nbdd: the configuration is bad, nothing was started:\n{error}", file=sys.stderr)
        return EXIT_CONFIG
    except NbddError as error:
        print(f"nbdd: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
