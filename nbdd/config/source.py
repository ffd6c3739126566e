# SPDX-License-Identifier: MIT
"""One YAML file as plain values that remember where they were written.

The values are composed here from PyYAML's events, for four reasons. A key that stands twice must not pass in
silence. Every value needs its line and column. What YAML 1.1 reads in a way nobody expects (1:30 as 90, 010 as 8)
must be told. And PyYAML's own C composer recurses without bound: a file of 100,000 brackets ends the process.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from nbdd.text import quoted

MAX_BYTES = 16 * 1024 * 1024
"""Of one file; 10,000 devices with every key fit into 4 MiB."""

MAX_DEPTH = 32
"""Of mappings and lists in each other. The schema has use for 4; the stack of the process has room for some 300."""

_TOO_DEEP = f"mappings and lists are nested more than {MAX_DEPTH} deep."

MAX_VALUES = 500_000
"""Of one file with every alias counted as what it stands for, so that a few lines can't become a billion values."""

"""Characters of a value that an error repeats."""

# The complement of YAML 1.1's c-printable (section 5.1), but for the surrogates, which UTF-8 excludes anyway.
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ufeff\uff00-\ufffd\U00010000-\U0010ffff]")
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL_FRACTION = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"
_TRUE = ("yes", "true", "on")
_FALSE = ("no", "false", "off")

_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where PyYAML was built with it (it is on Debian): ten times as fast."""

_HINTS = (
    ("mapping values are not allowed", "a ': ' is out of place here; check the indentation, and quote text with ': '"),
    ("could not find expected ':'", "a line before this one has no ':' after its key"),
    ("did not find expected key", "the indentation fits no line above it"),
    ("expected <block end>", "the indentation fits no line above it"),
    ("did not find expected '-' indicator", "a list ends here without a change of indentation"),
    ("cannot start any token", "text that begins with this character must be in quotes"),
    ("did not find expected <document start>", "something follows the end of the document; one file holds one"),
)
"""A part of what the parser says, and what it means to the person who wrote the file."""


class Mark(NamedTuple):
    """A place in a file, both numbers counted from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


class Entry(NamedTuple):
    """Where one item of a mapping or list was written, and how."""

    key: Mark
    """The key; of an item of a list, the item."""
    value: Mark
    written: str | None
    """The text of a scalar before YAML gave it a type."""


class LocatedDict(dict[str, Any]):
    """A mapping whose `entries` tell where each key was written. Keys are taken as text: 'on' and 7 are names."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, Entry] = {}


class LocatedList(list[Any]):
    """A list whose `entries` tell where each item was written."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []


class Problem(NamedTuple):
    """One fault of a file; `sentence` goes after the names of what it is about."""

    mark: Mark | None
    """None where no line of the file was read."""
    path: tuple[str | int, ...]
    """The keys and list positions that lead to the fault from the top of the file."""
    sentence: str


class Source:
    """What one file holds: `value`, and the `problems` there were in reading it; it never raises for either."""

    def __init__(self, path: Path) -> None:
        self.value: Any = None
        self.root = Entry(Mark(1, 1), Mark(1, 1), None)
        self.problems: list[Problem] = []
        try:
            self.value, self.root = _Composer(_read_text(path), self.problems).document()
        except _Unusable as error:
            self.problems.append(Problem(error.mark, error.path, error.sentence))

    def entry(self, path: tuple[str | int, ...]) -> Entry:
        """Where the value at `path` was written, or the innermost one around it that was written at all."""
        value, entry = self.value, self.root
        for step in path:
            inside: Entry | None = None
            if isinstance(value, LocatedDict) and isinstance(step, str):
                inside = value.entries.get(step)
            elif isinstance(value, LocatedList) and isinstance(step, int):
                inside = value.entries[step]
            if inside is None:
                # Something is missing: the key of what it is missing from is the place to look.
                return entry._replace(value=entry.key, written=None)
            value, entry = value[step], inside
        return entry


class _Unusable(Exception):
    """The file as a whole can't be used."""

    def __init__(self, mark: Mark | None, sentence: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(sentence)
        self.mark = mark
        self.path = path
        self.sentence = sentence


def _read_text(path: Path) -> str:
    try:
        # Without O_NONBLOCK a FIFO would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
                raise _Unusable(None, f"can't be read: it is {kind}, not a regular file.")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            target = quoted(os.fsencode(path.readlink()).decode(errors="backslashreplace"))
            raise _Unusable(None, f"can't be read: it is a link to {target}, which does not exist.") from None
        why = (error.strerror or str(error)).lower()
        raise _Unusable(None, f"can't be read: {why}.") from None
    if len(data) > MAX_BYTES:
        raise _Unusable(None, f"is larger than {MAX_BYTES // 2**20} MiB; divide it into several files.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        sentence = f"the byte 0x{data[error.start]:02X} is not UTF-8; save the file as UTF-8."
        raise _Unusable(_end_of(before), sentence) from None
    bad = _NOT_PRINTABLE.search(text)
    if bad is not None:
        character = "the NUL character" if bad[0] == "\0" else f"the control character {bad[0]!r}"
        raise _Unusable(_end_of(text[: bad.start()]), f"{character} must not stand in a YAML file.")
    return text


def _end_of(text: str) -> Mark:
    return Mark(text.count("\n") + 1, len(text) - text.rfind("\n"))


class _Composer:
    """Events to located values; one document."""

    def __init__(self, text: str, problems: list[Problem]) -> None:
        self.text = text
        self.problems = problems
        self.loader = _LOADER(text)
        self.events = self.read()
        self.path: list[str | int] = []
        self.inside: list[Mark] = []
        """Where the mappings and lists begin that are being read, the outermost first."""
        self.anchors: dict[str, tuple[Any, Entry, int]] = {}
        self.open_anchors: set[str] = set()
        self.values = 0

    def read(self) -> Iterator[yaml.Event]:
        while True:
            try:
                event = self.loader.get_event()  # type: ignore[no-untyped-call]
            except yaml.MarkedYAMLError as error:
                raise self.syntax(error) from None
            except yaml.YAMLError:
                raise _Unusable(Mark(1, 1), "the file can't be read as YAML.") from None
            if event is None:
                return
            yield event

    def document(self) -> tuple[Any, Entry]:
        value, entry = None, Entry(Mark(1, 1), Mark(1, 1), None)
        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Unusable(_mark(event), "a second YAML document begins here ('---'); one file holds one.")
            elif isinstance(event, yaml.NodeEvent):
                value, entry = self.node(event)
        return value, entry

    def node(self, event: yaml.Event) -> tuple[Any, Entry]:
        mark = _mark(event)
        self.values += 1
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), mark)
        before = self.values
        anchor: str | None = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors.pop(anchor, None)
            self.open_anchors.add(anchor)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value, entry = self.scalar(event, mark), Entry(mark, mark, event.value)
        else:
            if len(self.inside) >= MAX_DEPTH:
                self.fail(mark, _TOO_DEEP)
            entry = Entry(mark, mark, None)
            kind = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
            if event.tag not in (None, "!", _TAG + kind):  # type: ignore[attr-defined]
                self.problem(mark, f"the tag {quoted(event.tag)} means nothing to nbdd; leave it out.")  # type: ignore[attr-defined]
            self.inside.append(mark)
            value = self.mapping() if kind == "map" else self.sequence()
            self.inside.pop()
        if self.values > MAX_VALUES:
            self.fail(mark, f"the file holds more than {MAX_VALUES} values, aliases counted as what they stand for.")
        if anchor is not None:
            self.open_anchors.discard(anchor)
            self.anchors[anchor] = (value, entry, self.values - before + 1)
        return value, entry

    def alias(self, name: str, mark: Mark) -> tuple[Any, Entry]:
        if name not in self.anchors:
            if name in self.open_anchors:
                self.fail(mark, f"'*{name}' stands inside of what it refers to.")
            self.fail(mark, f"'*{name}' refers to nothing; '&{name}' must come before it.")
        value, entry, size = self.anchors[name]
        self.values += size
        if self.values > MAX_VALUES:
            self.fail(mark, f"the file holds more than {MAX_VALUES} values, aliases counted as what they stand for.")
        return value, Entry(mark, mark, entry.written)

    def sequence(self) -> LocatedList:
        items = LocatedList()
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            self.path.append(len(items))
            value, entry = self.node(event)
            self.path.pop()
            items.append(value)
            items.entries.append(entry)
        return items

    def mapping(self) -> LocatedDict:
        found = LocatedDict()
        merged: list[LocatedDict] = []
        merges: Mark | None = None
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            mark = _mark(event)
            if not isinstance(event, yaml.ScalarEvent):
                self.problem(mark, "a key must be plain text.")
                self.skip(event)
                self.skip(next(self.events))
                continue
            key: str = event.value
            self.path.append(key)
            value, entry = self.node(next(self.events))
            if key == "<<" and event.implicit[0]:
                if merges is not None:
                    self.problem(mark, f"is given twice, first in line {merges.line}; one takes a list of mappings.")
                else:
                    merges = mark
                    merged = self.sources(value, entry.value)
            elif key in found:
                self.problem(mark, f"is given twice, first in line {found.entries[key].key.line}; remove one.")
            else:
                found[key] = value
                found.entries[key] = Entry(mark, entry.value, entry.written)
            self.path.pop()
        for source in merged:
            for key in source:
                if key not in found:
                    found[key] = source[key]
                    found.entries[key] = source.entries[key]
        return found

    def sources(self, value: Any, mark: Mark) -> list[LocatedDict]:
        """What a merge key ('<<') takes its entries from, the strongest first."""
        sources = value if isinstance(value, LocatedList) else [value]
        if all(isinstance(source, LocatedDict) for source in sources):
            return list(sources)
        self.problem(mark, "must be a mapping, or a list of mappings, to take over.")
        return []

    def skip(self, event: yaml.Event) -> None:
        """Read over a node whose place is unusable, with every bound in force."""
        known = len(self.problems)
        try:
            self.node(event)
        finally:
            del self.problems[known:]

    def scalar(self, event: yaml.ScalarEvent, mark: Mark) -> Any:
        text: str = event.value
        tag: str | None = event.tag
        if tag is None or tag == "!":
            tag = self.loader.resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call]
        match str(tag).removeprefix(_TAG):
            case "str" | "timestamp" | "value" | "merge":
                return text
            case "null":
                return None
            case "bool" if text.lower() in _TRUE + _FALSE:
                return text.lower() in _TRUE
            case "int" if _DECIMAL.fullmatch(text):
                # int() refuses thousands of digits; so many are out of any range in any case.
                return int(text[:40])
            case "float" if _DECIMAL_FRACTION.fullmatch(text):
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "int" | "float":
                self.problem(mark, _trap(text))
                return None
        self.problem(mark, f"the tag {quoted(str(tag))} means nothing to nbdd; leave it out.")
        return None

    def problem(self, mark: Mark, sentence: str) -> None:
        self.problems.append(Problem(mark, tuple(self.path), sentence))

    def fail(self, mark: Mark, sentence: str) -> NoReturn:
        raise _Unusable(mark, sentence, tuple(self.path))

    def syntax(self, error: yaml.MarkedYAMLError) -> _Unusable:
        """What the parser says, in words for the person who wrote the file."""
        said = error.problem or "unreadable"
        at = error.problem_mark
        if at is None:
            return _Unusable(None, f"the file can't be read as YAML: {said}.")
        if "nesting depth" in said:  # PyYAML has a limit of its own since 6.0.4, of what it reads ahead
            return _Unusable(Mark(at.line + 1, at.column + 1), _TOO_DEEP)
        lines = self.text.split("\n")
        line = lines[at.line] if at.line < len(lines) else ""
        indent = line[: len(line) - len(line.lstrip())]
        if "\t" in indent and at.column <= len(indent):
            return _Unusable(Mark(at.line + 1, indent.index("\t") + 1), "the line is indented with a tab; use spaces.")
        place = Mark(at.line + 1, at.column + 1)
        if (at.line, at.column) >= (len(lines) - 1, len(line)) and "expected ':'" not in said:
            # Where it was opened is of more use than where the file ends.
            context = error.context_mark
            opened = Mark(context.line + 1, context.column + 1) if context is not None else place
            place = self.inside[-1] if opened >= place and self.inside else opened
            said = "what begins here is never closed"
        hint = next((hint for part, hint in _HINTS if part in said), said)
        return _Unusable(place, f"the file can't be read as YAML: {hint}.")


def _mark(event: yaml.Event) -> Mark:
    at = event.start_mark
    if at is None:  # no event of a parser is without
        return Mark(1, 1)
    return Mark(at.line + 1, at.column + 1)


def _trap(text: str) -> str:
    """What to say of a number that YAML 1.1 reads, and a person doesn't."""
    if ":" in text:
        why = "YAML reads digits with colons between them as a number in base 60"
    elif "_" in text:
        why = "YAML reads digits with underscores between them as one number"
    elif text.lstrip("+-").startswith("0") and text.lstrip("+-").isdigit():
        why = "YAML reads a number that begins with 0 in base 8"
    elif text.lstrip("+-")[:2] in ("0x", "0b", "0o"):
        why = "YAML reads it in another base than ten"
    else:
        return f"{quoted(text)} is not a number."
    return f"{quoted(text)} is not taken, since {why}; write a plain decimal number, or put text in quotes."
