# SPDX-License-Identifier: MIT
"""The process that fuzzes: atheris calls `fuzz` until libFuzzer's arguments (sys.argv) say that it is enough."""

from __future__ import annotations

import sys

import atheris

# What is imported here is watched for the branches that an input reaches.
with atheris.instrument_imports(include=["nbdd.protocol", "nbdd.server.connect"]):
    from tests.fuzz.script import judge_script, lower_limits


def fuzz(data: bytes) -> None:
    """Judge one input; what it raises ends the run."""
    judge_script(data)


if __name__ == "__main__":
    lower_limits()
    # To merge, libFuzzer starts itself again, by this name and through a shell.
    atheris.Setup([f"{sys.executable} -m {__spec__.name}", *sys.argv[1:]], fuzz)
    atheris.Fuzz()
