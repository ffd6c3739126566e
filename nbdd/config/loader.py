# SPDX-License-Identifier: MIT
"""The YAML files of one directory to frozen definitions; reports all faults at once, each with its place."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from nbdd.config.definition import Definition, check_name, fields_of
from nbdd.config.schema import Fault, key_of, parse_uris, shipped
from nbdd.config.source import Source
from nbdd.config.values import Mark, Problem
from nbdd.errors import InvalidArgs, InvalidConfig
from nbdd.text import plural, printable, quoted

log = logging.getLogger(__name__)

DIRECTORY = Path("/etc/nbdd")
"""Where the daemon's configuration is."""

MAX_PROBLEMS = 1000
"""How many are reported. A file with more is most likely no configuration at all."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the files of one directory say."""

    devices: Mapping[str, Definition] = field(default_factory=lambda: MappingProxyType({}))
    """By name, in the order they were written, defaults applied."""
    defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """The `defaults` of nbdd.yaml, as they stand there."""
    files: tuple[Path, ...] = ()
    """What was read, in the order it was read."""


def load(directory: Path = DIRECTORY, *, must_exist: bool = False) -> Configuration:
    """Read nbdd.yaml, then devices.d/*.yaml in name order; each may be missing.

    A directory that is missing is an empty configuration unless it `must_exist`. Raises `InvalidConfig` with every
    problem of every file, each as "file:line:column: device 'x': key 'y': what is wrong."; the place is the file alone
    if no line of it was read.
    """
    return _Loader(directory).load(must_exist=must_exist)


def check(directory: Path, out: TextIO) -> int:
    """Read `directory` as the daemon would and write the result to `out`; return 0 if all is well, 1 if not."""
    try:
        configuration = load(directory, must_exist=True)
    except InvalidConfig as error:
        print(error, file=out)
        print(plural(len(error.problems), "problem") + ".", file=out)
        return 1
    devices, files = len(configuration.devices), len(configuration.files)
    print(f"{_path(directory)}: {plural(devices, 'device')} in {plural(files, 'file')}, all well.", file=out)
    return 0


class _Loader:
    """One reading of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.schema = shipped()
        self.problems: list[str] = []
        self.defaults: dict[str, Any] = {}
        self.devices: dict[str, Definition] = {}
        self.places: dict[str, tuple[Path, Mark]] = {}
        """Device name to where it is defined."""
        self.nodes: dict[str, str] = {}
        """Fixed device node to the name of the device that has it."""

    def load(self, *, must_exist: bool) -> Configuration:
        files: list[Path] = []
        for path in self.paths(must_exist=must_exist):
            if path.suffix == ".yml":
                # Without a word about it, people search long for why the file has no effect.
                self.problems.append(f"{_path(path)}: the name must end in .yaml; rename the file.")
                continue
            files.append(path)
            reading = _File(self, path, main=len(path.parts) == len(self.directory.parts) + 1)
            reading.read()
            problems = reading.lines()
            self.problems += problems
            log.debug("%s: read, %s", _path(path), plural(len(problems), "problem"))
            if len(self.problems) > MAX_PROBLEMS:
                self.problems[MAX_PROBLEMS:] = [
                    f"{_path(path)}: there are more problems; these are the first {MAX_PROBLEMS}."
                ]
                break
        if self.problems:
            raise InvalidConfig(*self.problems)
        log.debug("%s: %s defined", _path(self.directory), plural(len(self.devices), "device"))
        return Configuration(MappingProxyType(self.devices), MappingProxyType(self.defaults), tuple(files))

    def paths(self, *, must_exist: bool) -> Iterator[Path]:
        """The files to read, and those with a name that is almost right."""
        below = self.names(self.directory, must_exist=must_exist)
        yield from (self.directory / name for name in below if name in ("nbdd.yaml", "nbdd.yml"))
        if "devices.d" in below:
            devices = self.directory / "devices.d"
            for name in self.names(devices, must_exist=True):
                if name.endswith((".yaml", ".yml")) and not name.startswith("."):
                    yield devices / name

    def names(self, directory: Path, *, must_exist: bool) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not must_exist and not directory.is_symlink():
                return []
            why = (error.strerror or str(error)).lower()
            self.problems.append(f"{_path(directory)}: the directory can't be read: {why}.")
            return []


class _File:
    """The reading of one file into a loader."""

    def __init__(self, loader: _Loader, path: Path, *, main: bool) -> None:
        self.loader = loader
        self.path = path
        self.main = main
        """Whether this is nbdd.yaml."""
        self.source = Source(path)
        self.problems = list(self.source.problems)
        self.faulty: set[tuple[str | int, ...]] = set()

    def lines(self) -> list[str]:
        """The problems as lines of text, in the order of the file."""
        where = _path(self.path)
        lines = []
        for mark, path, sentence in sorted(self.problems, key=_order):
            place = f"{where}:{mark}" if mark is not None else where
            lines.append(f"{place}: {_subject(path)}{sentence}")
        return lines

    def read(self) -> None:
        top = self.source.value
        faults = self.loader.schema.file_faults(top, lambda path: self.source.entry(path).written)
        self.add(faults)
        if not isinstance(top, dict):
            return
        defaults, devices = top.get("defaults"), top.get("devices")
        if not self.main and "defaults" in top:
            self.add([Fault(("defaults",), "belongs in nbdd.yaml, where it holds for all files.", on_key=True)])
        elif isinstance(defaults, dict) and not any(path[0] == "defaults" for path in self.faulty if path):
            self.loader.defaults = dict(defaults)
        if isinstance(devices, dict):
            sound = devices.keys() - {path[1] for path in self.faulty if path[:1] == ("devices",) and len(path) > 1}
            for name, settings in devices.items():
                self.device(name, settings, sound=name in sound)

    def add(self, faults: Iterable[Fault]) -> None:
        """Take the faults as problems, but for places that YAML itself has a problem with: that one explains more."""
        reported = {problem.mark for problem in self.source.problems}
        for fault in faults:
            self.faulty.add(fault.path)
            entry = self.source.entry(fault.path)
            mark = entry.key if fault.on_key else entry.value
            if mark not in reported:
                self.problems.append(Problem(mark, fault.path, fault.sentence))

    def device(self, name: str, settings: Any, *, sound: bool) -> None:
        path = ("devices", name)
        faults: list[Fault] = []
        try:
            check_name(name)
        except InvalidArgs as error:
            faults.append(Fault(path, str(error), on_key=True))
        first = self.loader.places.setdefault(name, (self.path, self.source.entry(path).key))
        if first[0] is not self.path:
            sentence = f"is already defined at {_path(first[0])}:{first[1]}; a name stands for one device."
            faults.append(Fault(path, sentence, on_key=True))
        if isinstance(settings, dict):
            uris, uri_faults = parse_uris(settings.get("uri"), (*path, "uri"))
            faults += uri_faults
            node = settings.get("device")
            if isinstance(node, str) and node != "auto" and (*path, "device") not in self.faulty:
                owner = self.loader.nodes.setdefault(node, name)
                if owner != name:
                    sentence = f"{node} is given to the device {quoted(owner)} already; choose another, or auto."
                    faults.append(Fault((*path, "device"), sentence))
            if sound and not faults:
                fields = fields_of(self.loader.defaults | settings)
                self.loader.devices[name] = Definition(name=name, uri=uris, **fields)
        if faults:
            self.add(faults)


def _order(problem: Problem) -> tuple[Mark, list[str]]:
    """By place; if one place serves several devices, by their names, since jsonschema keeps no order."""
    return problem.mark or Mark(0, 0), [str(step) for step in problem.path]


def _subject(path: tuple[str | int, ...]) -> str:
    """What a problem is about, before its sentence."""
    subject = ""
    if path[:1] == ("devices",) and len(path) > 1 and isinstance(path[1], str):
        subject, path = f"device {quoted(path[1])}: ", path[2:]
    elif path[:1] == ("defaults",) and len(path) > 1:
        subject, path = "defaults: ", path[1:]
    return f"{subject}key {key_of(path)}: " if path and isinstance(path[0], str) else subject


def _path(path: Path) -> str:
    """The path, safe to print whatever bytes it is made of."""
    return printable(str(path))
