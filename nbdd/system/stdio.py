# SPDX-License-Identifier: MIT
"""Standard output and standard error of a command; either may be closed, full, or without a reader."""

from __future__ import annotations

import contextlib
import os
import sys


def complain(program: str, text: str) -> None:
    """Write one line to standard error, if there is one."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.write(f"{program}: {text}\n")
            sys.stderr.flush()


def discard_stdout() -> None:
    """Send what is left in the buffer to /dev/null, so that Python does not fail to write it once more at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
