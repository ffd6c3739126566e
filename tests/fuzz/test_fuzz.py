# SPDX-License-Identifier: MIT
"""Some fuzzing. Not a fast test: the inputs that are kept are judged in tests/unit/test_any_server.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scale import times

SECONDS = times(20, 60)
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_fuzzer_finds_no_server_that_breaks_a_promise() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(SECONDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    executions = re.match(r"(\d+) executions in", done.stdout)
    # Even where other tests take most of the machine.
    assert executions is not None
    assert int(executions[1]) > 300 * SECONDS
