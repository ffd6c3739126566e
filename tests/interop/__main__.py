# SPDX-License-Identifier: MIT
"""Run the matrix in a guest of each release and write docs/interop.md: `.venv/bin/python -m tests.interop`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.guest import RELEASES, Guest, GuestError, deb
from tests.interop.report import DOCUMENT, document, run_in


def main() -> int:
    """Write it and return 0, or say on stderr what does not agree and return 1."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.interop", description=__doc__)
    parser.add_argument(
        "--deb", type=Path, metavar="FILE", help="the package to install (default: the newest in dist/)"
    )
    package = parser.parse_args().deb
    results = []
    try:
        for release in RELEASES:
            with Guest(release) as guest:
                guest.install(package or deb.required())
                results.append(run_in(guest))
                print(results[-1]["system"]["release"], results[-1]["seconds"])
    except GuestError as error:
        print(error, file=sys.stderr)
        return 1
    faults = {fault for result in results for row in result["rows"] for fault in row["faults"]}
    if faults:
        print("\n".join(sorted(faults)), file=sys.stderr)
        return 1
    DOCUMENT.write_text(document(results))
    print(f"{DOCUMENT} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
