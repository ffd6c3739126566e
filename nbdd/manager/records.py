# SPDX-License-Identifier: MIT
"""Records: one small JSON file for each device that is, or may be, bound, for the next instance of nbdd.

A record is written before the kernel is asked for a device and deleted after the device is verified free, so a device
of ours is never without one. A device without a record is not ours and is never touched. The files are in /run: like
the devices, they do not outlive a reboot. Hints for udev are written and deleted with the record; see hints.py.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdd.config.definition import Definition, check_name
from nbdd.errors import NbddError
from nbdd.manager.hints import Hints
from nbdd.system.journal import DeviceLog
from nbdd.worker.binding import Binding

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One device, as it was last known to be bound."""

    definition: Definition
    """The definition, with what Attach, AttachURI and SetTimeout changed."""
    configured: bool
    """Whether a configuration file defines it."""
    binding: Binding | None = None
    """What the device is, for the next worker; None before the worker said that it is bound."""
    attached_since: int = 0
    """Microseconds since 1970."""
    attached_by: int = 0
    """The user id of the caller who attached it."""

    def to_wire(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "definition": self.definition.to_wire(),
            "configured": self.configured,
            "binding": None if self.binding is None else self.binding.to_wire(),
            "attached-since": self.attached_since,
            "attached-by": self.attached_by,
        }

    @staticmethod
    def from_wire(wire: dict[str, Any]) -> Record:
        """The inverse of `to_wire`."""
        binding = wire["binding"]
        definition = Definition.from_wire(wire["definition"])
        check_name(definition.name)
        if not definition.uri:
            raise ValueError("the definition names no server")
        return Record(
            definition=definition,
            configured=bool(wire["configured"]),
            binding=None if binding is None else Binding.from_wire(binding),
            attached_since=int(wire["attached-since"]),
            # An earlier version wrote none.
            attached_by=int(wire.get("attached-by", 0)),
        )


class Records:
    """The directory of records, by default /run/nbdd/devices, and that of udev's hints beside it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._hints = Hints(directory.with_name("udev"))

    def write(self, record: Record) -> None:
        """Write, or replace, the record of a device; whole or not at all.

        Raises NbddError if it can't be written: then nothing must be bound.
        """
        path = self._path(record.definition.name)
        try:
            self._hints.write(record.definition)
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            draft = path.with_suffix(".new")
            draft.write_text(json.dumps(record.to_wire()) + "\n")
            draft.replace(path)
        except OSError as error:
            raise NbddError(f"The record {path} can't be written: {error.strerror}.") from None

    def remove(self, name: str) -> None:
        """Delete the record of a device, if there is one."""
        try:
            self._path(name).unlink(missing_ok=True)
            self._hints.remove(name)
        except OSError as error:
            DeviceLog(log, name).warning("the record can't be removed: %s", error)

    def load(self) -> list[Record]:
        """Every record that can be read, in name order; one that can't is logged and left where it is."""
        found = []
        try:
            paths = sorted(path for path in self._directory.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return []
        except OSError as error:
            log.error("%s can't be read, its devices are left alone: %s", self._directory, error)
            return []
        for path in paths:
            try:
                record = Record.from_wire(json.loads(path.read_text()))
                if record.definition.name != path.stem:
                    raise ValueError(f"it is about {record.definition.name!r}")
                found.append(record)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, NbddError) as error:
                log.error("%s can't be read, its device is left alone: %s", path, error)
        return found

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def runtime_directory() -> Path:
    """Where records live: below $RUNTIME_DIRECTORY as systemd sets it, else /run/nbdd."""
    return Path(os.environ.get("RUNTIME_DIRECTORY", "/run/nbdd")) / "devices"
