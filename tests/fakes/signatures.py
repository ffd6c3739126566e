# SPDX-License-Identifier: MIT
"""Holds a fake against the class that it stands for."""

from __future__ import annotations

import inspect
from typing import Any


def parameters(method: Any) -> list[tuple[str, inspect._ParameterKind, bool]]:
    """What a caller has to know of a method: names, kinds and what may be left out."""
    found = inspect.signature(method).parameters.values()
    return [(each.name.lstrip("_"), each.kind, each.default is not inspect.Parameter.empty) for each in found]


def differences(fake: type, real: type) -> list[str]:
    """The public methods of `fake` that `real` does not have in the same way."""
    methods = {name: found for name, found in vars(fake).items() if inspect.isfunction(found) and name[0] != "_"}
    return [
        name
        for name, method in methods.items()
        if not inspect.isfunction(there := getattr(real, name, None))
        or inspect.iscoroutinefunction(there) != inspect.iscoroutinefunction(method)
        or parameters(there) != parameters(method)
    ]
