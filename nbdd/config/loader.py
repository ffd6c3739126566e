# SPDX-License-Identifier: MIT
"""YAML files, or the options of a call, to frozen definitions; all faults at once, each with its place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from nbdd.config.definition import Attach, Definition, Desktop, check_name
from nbdd.config.schema import TLS_REFUSED, Fault, Schema
from nbdd.config.source import Source
from nbdd.config.values import Mark, Problem
from nbdd.errors import InvalidArgs, InvalidConfig, InvalidURI, TLSFailed
from nbdd.text import plural, printable, quoted
from nbdd.uri import URI

DIRECTORY = Path("/etc/nbdd")
"""Where the daemon's configuration is."""

MAX_PROBLEMS = 1000
"""More of them help nobody, and come from a file that is not a configuration at all."""


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
    problem of every file, each as "file:line:column: device 'x': key 'y': what is wrong.". Where no line was read,
    the place is the file alone.
    """
    return _Loader(directory).load(must_exist=must_exist)


def check(directory: Path, out: TextIO) -> int:
    """Read `directory` as the daemon would and write what was found to `out`; 0 if all is well, 1 if not."""
    try:
        configuration = load(directory, must_exist=True)
    except InvalidConfig as error:
        print(error, file=out)
        print(plural(len(error.problems), "problem") + ".", file=out)
        return 1
    devices, files = len(configuration.devices), len(configuration.files)
    print(f"{_path(directory)}: {plural(devices, 'device')} in {plural(files, 'file')}, all well.", file=out)
    return 0


def definition_from_options(
    name: str, options: Mapping[str, object], defaults: Mapping[str, object] = MappingProxyType({})
) -> Definition:
    """The definition of a device that no file names, from the YAML keys with plain values; `uri` is needed.

    `defaults` (of `Configuration`) hold where `options` say nothing, but for `attach`, which is for files only.
    Raises `InvalidArgs`, `InvalidURI`, or `TLSFailed` where encryption was asked for.
    """
    check_name(name)
    schema = Schema()
    uris = _checked(schema, options, set(schema.device_keys) - {"attach"}, required=("uri",))
    settings = {key: value for key, value in defaults.items() if key != "attach"} | dict(options)
    return Definition(name=name, uri=uris, **_fields(settings))


def options_with(definition: Definition, options: Mapping[str, object]) -> Definition:
    """The definition with what a call wants otherwise, this once; `uri`, `attach` and `desktop` can't be changed so.

    Raises `InvalidArgs`.
    """
    schema = Schema()
    _checked(schema, options, set(schema.device_keys) - {"uri", "attach", "desktop"})
    return replace(definition, **_fields(options))


def _checked(
    schema: Schema, options: Mapping[str, object], allowed: set[str], required: tuple[str, ...] = ()
) -> tuple[URI, ...]:
    """The URIs of valid options; every fault of others, as one error of the first one's class."""
    uris, uri_faults = _uris(options.get("uri"), ())
    faults = list(schema.option_faults(dict(options), allowed, required))
    if any(fault.tls for fault in [*faults, *uri_faults]):
        raise TLSFailed(TLS_REFUSED)
    if faults:
        raise InvalidArgs(" ".join(f"Option {_key(fault.path)} {fault.sentence}" for fault in faults))
    if uri_faults:
        raise InvalidURI(" ".join(fault.sentence for fault in uri_faults))
    return uris


def _uris(value: object, path: tuple[str | int, ...]) -> tuple[tuple[URI, ...], list[Fault]]:
    """The URIs in the value of a key `uri`, and what is wrong with those that are text."""
    found: list[URI] = []
    faults: list[Fault] = []
    several = isinstance(value, list)
    for index, text in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(text, str):
            continue  # the schema says so
        where = (*path, index) if several else path
        try:
            uri = URI.parse(text)
        except InvalidURI as error:
            faults.append(Fault(where, str(error)))
            continue
        if uri.tls:
            faults.append(Fault(where, TLS_REFUSED, tls=True))
        found.append(uri)
    return tuple(found), faults


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Valid settings as the fields of a Definition, without name and uri."""
    fields: dict[str, Any] = {}
    for key, value in settings.items():
        match key:
            case "attach":
                fields["attach"] = Attach(value)
            case "device":
                fields["device"] = None if value == "auto" else int(value.rpartition("nbd")[2])
            case "read-only":
                fields["read_only"] = bool(value)
            case "block-size":
                fields["block_size"] = None if value == "auto" else int(value)
            case "desktop":
                fields["desktop"] = Desktop.of(value)
            case "connections" | "timeout" | "dead-timeout" | "network-timeout":
                # JSON schema takes 30.0 for an integer, and so do editors.
                fields[key.replace("-", "_")] = int(value)
    return fields


class _Loader:
    """One reading of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.schema = Schema()
        self.problems: list[str] = []
        self.defaults: dict[str, Any] = {}
        self.devices: dict[str, Definition] = {}
        self.places: dict[str, tuple[Path, Mark]] = {}
        """Device name to where it is defined."""
        self.nodes: dict[str, str] = {}
        """/dev/nbdX to the name of the device that has it."""

    def load(self, *, must_exist: bool) -> Configuration:
        files: list[Path] = []
        for path in self.paths(must_exist=must_exist):
            if path.suffix == ".yml":
                # Passed over in silence, the reason would be searched for long.
                self.problems.append(f"{_path(path)}: the name must end in .yaml; rename the file.")
                continue
            files.append(path)
            reading = _File(self, path, main=len(path.parts) == len(self.directory.parts) + 1)
            reading.read()
            self.problems += reading.told()
            if len(self.problems) > MAX_PROBLEMS:
                self.problems[MAX_PROBLEMS:] = [
                    f"{_path(path)}: there are more problems; these are the first {MAX_PROBLEMS}."
                ]
                break
        if self.problems:
            raise InvalidConfig(*self.problems)
        return Configuration(MappingProxyType(self.devices), MappingProxyType(self.defaults), tuple(files))

    def paths(self, *, must_exist: bool) -> Iterator[Path]:
        """The files to read, and those that somebody may think are read."""
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

    def told(self) -> list[str]:
        """The problems as lines, in the order of the file."""
        where = _path(self.path)
        lines = []
        for mark, path, sentence in sorted(self.problems, key=_order):
            place = f"{where}:{mark}" if mark is not None else where
            lines.append(f"{place}: {_subject(path)}{sentence}")
        return lines

    def read(self) -> None:
        top = self.source.value
        faults = self.loader.schema.file_faults(top, lambda path: self.source.entry(path).written)
        self.tell(faults)
        if not isinstance(top, dict):
            return
        defaults, devices = top.get("defaults"), top.get("devices")
        if not self.main and "defaults" in top:
            self.tell([Fault(("defaults",), "belongs into nbdd.yaml, and holds for all files there.", on_key=True)])
        elif isinstance(defaults, dict) and not any(path[0] == "defaults" for path in self.faulty if path):
            self.loader.defaults = dict(defaults)
        if isinstance(devices, dict):
            sound = devices.keys() - {path[1] for path in self.faulty if path[:1] == ("devices",) and len(path) > 1}
            for name, settings in devices.items():
                self.device(name, settings, sound=name in sound)

    def tell(self, faults: Iterable[Fault]) -> None:
        # What the source had to say of a place comes first; the schema's view of it would only confuse.
        spoken_for = {problem.mark for problem in self.source.problems}
        for fault in faults:
            self.faulty.add(fault.path)
            entry = self.source.entry(fault.path)
            mark = entry.key if fault.on_key else entry.value
            if mark not in spoken_for:
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
            sentence = f"is defined already at {_path(first[0])}:{first[1]}; a name stands for one device."
            faults.append(Fault(path, sentence, on_key=True))
        if isinstance(settings, dict):
            uris, uri_faults = _uris(settings.get("uri"), (*path, "uri"))
            faults += uri_faults
            node = settings.get("device")
            if isinstance(node, str) and node != "auto" and (*path, "device") not in self.faulty:
                owner = self.loader.nodes.setdefault(node, name)
                if owner != name:
                    sentence = f"{node} is given to the device {quoted(owner)} already; choose another, or auto."
                    faults.append(Fault((*path, "device"), sentence))
            if sound and not faults:
                fields = _fields(self.loader.defaults | settings)
                self.loader.devices[name] = Definition(name=name, uri=uris, **fields)
        if faults:
            self.tell(faults)


def _order(problem: Problem) -> tuple[Mark, list[str]]:
    """By place; where one place serves several devices, by their names, since jsonschema keeps no order."""
    return problem.mark or Mark(0, 0), [str(step) for step in problem.path]


def _subject(path: tuple[str | int, ...]) -> str:
    """What a problem is about, before its sentence."""
    subject = ""
    if path[:1] == ("devices",) and len(path) > 1 and isinstance(path[1], str):
        subject, path = f"device {quoted(path[1])}: ", path[2:]
    elif path[:1] == ("defaults",) and len(path) > 1:
        subject, path = "defaults: ", path[1:]
    return f"{subject}key {_key(path)}: " if path and isinstance(path[0], str) else subject


def _key(path: tuple[str | int, ...]) -> str:
    """A key of a device, as 'uri' or 'desktop.icon'; which item of a list is meant, the place tells."""
    return quoted(".".join(step for step in path if isinstance(step, str)))


def _path(path: Path) -> str:
    """The path as text that can be printed, whatever bytes it is made of."""
    return printable(str(path))
