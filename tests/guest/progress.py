# SPDX-License-Identifier: MIT
"""Say on stderr what is being done and how long it took, one line a stage."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Print `what` when it begins, and its seconds when it ends.

    On a terminal both share a line; elsewhere (a CI log) each has its own, so that a long stage is seen to run.
    """
    terminal = sys.stderr.isatty()
    start = time.monotonic()
    print(f"guest: {what} ...", end="" if terminal else "\n", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(f"{'' if terminal else f'guest: {what}:'} failed after {time.monotonic() - start:.1f} s", file=sys.stderr)
        raise
    print(f"{'' if terminal else f'guest: {what}:'} {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print one line."""
    print(f"guest: {text}", file=sys.stderr, flush=True)
