# SPDX-License-Identifier: MIT
"""Directories of configuration files, and the problems in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbdd.config.loader import load
from nbdd.errors import InvalidConfig

Write = Callable[..., Path]


def problems(directory: Path) -> list[str]:
    """What is wrong in `directory`, with the places relative to it."""
    with pytest.raises(InvalidConfig) as caught:
        load(directory)
    for problem in caught.value.problems:
        assert problem.isprintable(), problem
        assert problem.endswith((".", "?")), problem
    return [problem.replace(f"{directory}/", "") for problem in caught.value.problems]


def device(**settings: str) -> str:
    """A file with the device 'a', its settings from line 3, the URI in front."""
    lines = {"uri": "nbd://h/x"} | {key.replace("_", "-"): value for key, value in settings.items()}
    return "devices:\n  a:\n" + "".join(f"    {key}: {value}\n" for key, value in lines.items())
