# SPDX-License-Identifier: MIT
"""How often a promise is put to the test: often enough to see it broken, or as often as it is promised.

`make test` runs the quick numbers, `make prove` the full ones. What is asserted is the same.
"""

from __future__ import annotations

import os

VARIABLE = "NBDD_TESTS"
"""In the environment: `quick`, which is also meant where it is missing, or `full`."""


def times(quick: int, full: int) -> int:
    """The number that belongs to this run; raises ValueError for one that is neither quick nor full."""
    scale = os.environ.get(VARIABLE) or "quick"
    if scale not in ("quick", "full"):
        raise ValueError(f"{VARIABLE} is {scale!r}; it can be quick or full.")
    return full if scale == "full" else quick
