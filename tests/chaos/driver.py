# SPDX-License-Identifier: MIT
"""Runs the campaign in a guest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.guest import Guest

MORE_SECONDS = 900
"""Beside the faults: setting up, becoming whole again, and comparing, in an emulated guest."""


def campaign(guest: Guest, seconds: float, seed: int) -> dict[str, Any]:
    """Play so many seconds of faults; what was done, and what went "wrong"."""
    guest.put(Path(__file__).with_name("campaign.py"), "/run/campaign.py")
    done = guest.run(
        f'python3 /run/campaign.py {seconds:g} {seed} "$(ls /var/tmp/nbdd_*_all.deb)"',
        check=False,
        timeout=seconds + MORE_SECONDS,
    )
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        return {"seed": seed, "wrong": [f"the campaign itself failed: {done.stdout}{done.stderr}"]}
    told: dict[str, Any] = json.loads(lines[-1])
    return told
