# SPDX-License-Identifier: MIT
"""The files that nbdd ships beside its code: the schema of the YAML files and the D-Bus interfaces."""

from __future__ import annotations

from pathlib import Path

from nbdd.errors import NbddError

_PACKAGE = Path(__file__).resolve().parent
_SOURCES = {
    "nbdd.schema.json": "config",
    "org.nbdd1.Manager.xml": "dbus",
    "org.nbdd1.Device.xml": "dbus",
}
"""Name to its directory in a checkout. A wheel and a Debian package hold all of them in nbdd/_data."""


def read(name: str) -> str:
    """The text of one shipped file; `NbddError` if `name` is none of them or its file is gone."""
    if name not in _SOURCES:
        raise NbddError(f"{name!r} is no file that nbdd ships; there are {', '.join(_SOURCES)}.")
    for path in (_PACKAGE / "_data" / name, _PACKAGE.parent / _SOURCES[name] / name):
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
    raise NbddError(f"{name} is missing from the installation in {_PACKAGE}; install nbdd again.")
