# SPDX-License-Identifier: MIT
"""What Debian's autopkgtest runs on the installed package passes here too, in a guest and without autopkgtest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.lab import Lab

pytestmark = pytest.mark.quick_on("debian12")

TESTS = Path(__file__).parents[2] / "debian" / "tests"


def test_autopkgtest_main_job_passes(lab: Lab) -> None:
    lab.guest.write("/root/main-job", (TESTS / "main-job").read_text(), mode=0o755)
    done = lab.guest.run("mkdir /root/tmp && AUTOPKGTEST_TMP=/root/tmp /root/main-job; e=$?; rm -r /root/tmp; exit $e")
    assert done.stdout.count("== ") == 6
    assert lab.bound() == []


def test_autopkgtest_superficial_test_passes(lab: Lab) -> None:
    control = (TESTS / "control").read_text().splitlines()
    [command] = [line.removeprefix("Test-Command: ") for line in control if line.startswith("Test-Command: ")]
    lab.guest.run(command)
