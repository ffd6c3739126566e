# SPDX-License-Identifier: MIT
"""The bounds that the program checks are those that the configuration's schema names."""

from __future__ import annotations

import json
from pathlib import Path

from nbdd.limits import BLK_MAX_BLOCK_SIZE, MAX_CONNECTIONS, MAX_TIMEOUT, MIN_BLOCK_SIZE

TREE = Path(__file__).resolve().parents[2]


def test_limits_are_those_of_the_configuration_schema() -> None:
    keys = json.loads((TREE / "config/nbdd.schema.json").read_text())["definitions"]
    assert keys["timeout"]["maximum"] == keys["dead-timeout"]["maximum"] == MAX_TIMEOUT
    assert keys["connections"]["maximum"] == MAX_CONNECTIONS
    sizes = [size for size in keys["block-size"]["enum"] if isinstance(size, int)]
    assert (min(sizes), max(sizes)) == (MIN_BLOCK_SIZE, BLK_MAX_BLOCK_SIZE)
