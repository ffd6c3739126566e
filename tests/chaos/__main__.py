# SPDX-License-Identifier: MIT
"""`python -m tests.chaos`: see the package."""

from __future__ import annotations

import argparse
import json
import secrets
import sys

from tests.chaos.driver import campaign
from tests.guest import Guest
from tests.guest.deb import required


def main() -> int:
    """Boot a guest, run the campaign in it, print what came of it; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--guest", default="debian13", choices=("debian12", "debian13"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if arguments.seed is None else arguments.seed
    print(f"{arguments.guest}, {arguments.minutes:g} minutes, seed {seed}", flush=True)
    with Guest(arguments.guest) as guest:
        guest.install(required())
        told = campaign(guest, arguments.minutes * 60, seed)
        if told["wrong"]:
            print(guest.journal(lines=1000))
    print(json.dumps(told, indent=2))
    return 1 if told["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
