# SPDX-License-Identifier: MIT
"""The AppArmor profile is one, and allows what the unit does; tests/system/test_apparmor.py lives with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdd.server.fingerprint import _BLKID

TREE = Path(__file__).resolve().parents[3]
PROFILE = TREE / "config/apparmor/usr.bin.nbdd"
PARSER = shutil.which("apparmor_parser", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(PARSER is None, reason="apparmor_parser is not installed")
def test_profile_is_read_by_apparmor() -> None:
    assert PARSER is not None
    command = [PARSER, "--skip-kernel-load", "--skip-read-cache", "--skip-cache", str(PROFILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    # What the kernel of this machine lacks is said, too, and is no fault of the profile's.
    assert (done.returncode, str(PROFILE) in done.stderr) == (0, False), done.stderr


def test_profile_allows_the_capabilities_of_the_unit_and_no_others() -> None:
    unit = (TREE / "systemd/nbdd.service").read_text()
    [granted] = re.findall(r"^CapabilityBoundingSet=(.+)$", unit, re.MULTILINE)
    allowed = re.findall(r"^  capability (\w+),$", PROFILE.read_text(), re.MULTILINE)
    assert {f"CAP_{name.upper()}" for name in allowed} == set(granted.split())


def test_profile_is_for_the_program_of_the_unit_and_allows_the_one_it_runs() -> None:
    unit = (TREE / "systemd/nbdd.service").read_text()
    [program] = re.findall(r"^ExecStart=(\S+)$", unit, re.MULTILINE)
    profile = PROFILE.read_text()
    assert f"\nprofile nbdd {program} " in profile
    assert PROFILE.name == program.strip("/").replace("/", ".")
    assert f"  {_BLKID} ix,\n" in profile
