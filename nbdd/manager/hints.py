# SPDX-License-Identifier: MIT
"""Hints: properties for UDisks, and so for every desktop, that udev reads when a device appears.

One file for each device that has the key `desktop`, in /run/nbdd/udev; systemd/60-nbdd.rules imports it by the name of
the device. It is there before the kernel is asked for the device, as udev's first event can come at once, and for as
long as the device has a record. The names of the properties are UDisks' own (udisks(8), "DEVICE INFORMATION").
"""

from __future__ import annotations

from pathlib import Path

from nbdd.config.definition import Definition, Desktop


class Hints:
    """The directory of such files, by default /run/nbdd/udev."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, definition: Definition) -> None:
        """Write, or replace, the file of a device, or delete it if it should have none. Raises OSError."""
        path = self._path(definition.name)
        if definition.desktop is None:
            path.unlink(missing_ok=True)
            return
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        draft = path.with_suffix(".new")
        draft.write_text(properties(definition.desktop), encoding="utf-8")
        draft.replace(path)

    def remove(self, name: str) -> None:
        """Delete the file of a device, if there is one. Raises OSError."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.env"


def properties(desktop: Desktop) -> str:
    """The file: lines KEY="VALUE". udev knows no escapes there; the schema lets no quote and no line end in."""
    found = {
        # Shown as the person's own, and mounted without a password: desktop/org.nbdd1.rules.
        "UDISKS_SYSTEM": "0" if desktop.user_mountable else "1",
        # The first user to log in would own the mount, and wait for the server.
        "UDISKS_AUTO": "0",
    }
    if desktop.name:
        found["UDISKS_NAME"] = desktop.name
    if desktop.icon:
        found["UDISKS_ICON_NAME"] = desktop.icon
        found["UDISKS_SYMBOLIC_ICON_NAME"] = desktop.icon.removesuffix("-symbolic") + "-symbolic"
    return "".join(f'{key}="{value}"\n' for key, value in found.items())
