# SPDX-License-Identifier: MIT
"""YAML text to plain values that remember where they were written.

The values are composed from PyYAML's events, and not by its composer, which knows less than is needed here and has no
bounds. Every value gets its line and column, an alias those of its own. A key that is given twice is a problem. So is a
number that YAML 1.1 reads otherwise than people do (1:30 as 90, 010 as 8). And PyYAML's C composer recurses without
bound: a file of 100,000 brackets ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import yaml

from nbdd.text import quoted

MAX_DEPTH = 32
"""How deep mappings and lists may be nested. The schema uses 4 levels; the process's stack has room for some 300."""

MAX_VALUES = 500_000
"""Values in one file, each alias counted as what it stands for, so that a few lines can't become a billion values."""

_TOO_DEEP = f"mappings and lists are nested more than {MAX_DEPTH} deep."

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL_FRACTION = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"
_TRUE = ("yes", "true", "on")
_FALSE = ("no", "false", "off")

_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml if PyYAML was built with it (it is on Debian): ten times as fast."""

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
    """A mapping whose `entries` say where each key was written. Keys are taken as text: 'on' and 7 are names."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, Entry] = {}


class LocatedList(list[Any]):
    """A list whose `entries` say where each item was written."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []


class Problem(NamedTuple):
    """One fault of a file; `sentence` goes after the names of what it is about."""

    mark: Mark | None
    """None if no line of the file was read."""
    path: tuple[str | int, ...]
    """The keys and list positions that lead to the fault from the top of the file."""
    sentence: str


_TOP = Entry(Mark(1, 1), Mark(1, 1), None)


class Unusable(Exception):
    """The file as a whole can't be used: not read, no YAML, or out of bounds."""

    def __init__(self, mark: Mark | None, sentence: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(sentence)
        self.problem = Problem(mark, path, sentence)


def compose(text: str) -> tuple[Any, Entry, list[Problem]]:
    """The value of the one document in `text`, where it begins, and all that is wrong in it."""
    composer = _Composer(text)
    try:
        value, entry = composer.document()
    except Unusable as error:
        value, entry = None, _TOP
        composer.problems.append(error.problem)
    return value, entry, composer.problems


class _Composer:
    """Makes located values of the events of one document, by recursive descent."""

    def __init__(self, text: str) -> None:
        self.problems: list[Problem] = []
        self._text = text
        self._loader = _LOADER(text)
        self._events = self._parse()
        self._path: list[str | int] = []
        self._open: list[Mark] = []
        """Where the mappings and lists begin that are being composed, the outermost first."""
        self._anchors: dict[str, tuple[Any, Entry, int] | None] = {}
        """Value, place and number of values of what has an anchor; None until it is complete."""
        self._values = 0

    def _parse(self) -> Iterator[yaml.Event]:
        while True:
            try:
                event = self._loader.get_event()  # type: ignore[no-untyped-call]
            except yaml.MarkedYAMLError as error:
                raise _syntax_error(error, self._text, self._open) from None
            except yaml.YAMLError:
                raise Unusable(Mark(1, 1), "the file can't be read as YAML.") from None
            if event is None:
                return
            yield event

    def document(self) -> tuple[Any, Entry]:
        value, entry = None, _TOP
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise Unusable(_mark(event), "a second YAML document begins here ('---'); one file holds one.")
            elif isinstance(event, yaml.NodeEvent):
                value, entry = self._node(event)
        return value, entry

    def _node(self, event: yaml.Event) -> tuple[Any, Entry]:
        """The value of the node that begins with `event`, and where it was written."""
        mark = _mark(event)
        before = self._values
        self._count(1, mark)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), mark)
        anchor: str | None = getattr(event, "anchor", None)
        if anchor is not None:
            self._anchors[anchor] = None
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value, entry = self._scalar(event, mark), Entry(mark, mark, event.value)
        else:
            value, entry = self._collection(event, mark), Entry(mark, mark, None)
        if anchor is not None:
            self._anchors[anchor] = value, entry, self._values - before
        return value, entry

    def _count(self, values: int, mark: Mark) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            sentence = f"the file holds more than {MAX_VALUES} values, aliases counted as what they stand for."
            self._fail(mark, sentence)

    def _alias(self, name: str, mark: Mark) -> tuple[Any, Entry]:
        if name not in self._anchors:
            self._fail(mark, f"'*{name}' refers to nothing; '&{name}' must come before it.")
        complete = self._anchors[name]
        if complete is None:
            self._fail(mark, f"'*{name}' stands inside of what it refers to.")
        value, entry, size = complete
        self._count(size, mark)
        return value, Entry(mark, mark, entry.written)

    def _collection(self, event: yaml.Event, mark: Mark) -> LocatedDict | LocatedList:
        if len(self._open) >= MAX_DEPTH:
            self._fail(mark, _TOO_DEEP)
        mapping = isinstance(event, yaml.MappingStartEvent)
        tag: str | None = getattr(event, "tag", None)
        if tag not in (None, "!", _TAG + ("map" if mapping else "seq")):
            self._problem(mark, _unknown_tag(tag))
        self._open.append(mark)
        value = self._mapping() if mapping else self._sequence()
        self._open.pop()
        return value

    def _sequence(self) -> LocatedList:
        items = LocatedList()
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            self._path.append(len(items))
            value, entry = self._node(event)
            self._path.pop()
            items.append(value)
            items.entries.append(entry)
        return items

    def _mapping(self) -> LocatedDict:
        found = LocatedDict()
        merged: list[LocatedDict] = []
        merge: Mark | None = None
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            mark = _mark(event)
            if not isinstance(event, yaml.ScalarEvent):
                self._problem(mark, "a key must be plain text.")
                self._skip(event)
                self._skip(next(self._events))
                continue
            key: str = event.value
            self._path.append(key)
            value, entry = self._node(next(self._events))
            if key == "<<" and event.implicit[0]:
                if merge is not None:
                    self._problem(mark, f"is given twice, first in line {merge.line}; one takes a list of mappings.")
                else:
                    merge = mark
                    merged = self._merged(value, entry.value)
            elif key in found:
                self._problem(mark, f"is given twice, first in line {found.entries[key].key.line}; remove one.")
            else:
                found[key] = value
                found.entries[key] = Entry(mark, entry.value, entry.written)
            self._path.pop()
        for source in merged:
            for key in source:
                if key not in found:
                    found[key] = source[key]
                    found.entries[key] = source.entries[key]
        return found

    def _merged(self, value: Any, mark: Mark) -> list[LocatedDict]:
        """The mappings that a merge key ('<<') takes entries from, the strongest first."""
        sources = value if isinstance(value, LocatedList) else [value]
        if all(isinstance(source, LocatedDict) for source in sources):
            return list(sources)
        self._problem(mark, "must be a mapping, or a list of mappings, to take over.")
        return []

    def _skip(self, event: yaml.Event) -> None:
        """Read a node and drop its value and its problems; the bounds hold for it too."""
        known = len(self.problems)
        try:
            self._node(event)
        finally:
            del self.problems[known:]

    def _scalar(self, event: yaml.ScalarEvent, mark: Mark) -> Any:
        text: str = event.value
        tag: str | None = event.tag
        if tag is None or tag == "!":
            tag = self._loader.resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call]
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
                self._problem(mark, _number_problem(text))
                return None
        self._problem(mark, _unknown_tag(tag))
        return None

    def _problem(self, mark: Mark, sentence: str) -> None:
        self.problems.append(Problem(mark, tuple(self._path), sentence))

    def _fail(self, mark: Mark, sentence: str) -> NoReturn:
        raise Unusable(mark, sentence, tuple(self._path))


def _mark(event: yaml.Event) -> Mark:
    at = event.start_mark
    if at is None:  # PyYAML's types allow it; its parsers always give one
        return Mark(1, 1)
    return Mark(at.line + 1, at.column + 1)


def _unknown_tag(tag: str | None) -> str:
    return f"the tag {quoted(str(tag))} means nothing to nbdd; leave it out."


def _syntax_error(error: yaml.MarkedYAMLError, text: str, composing: list[Mark]) -> Unusable:
    """What the parser says, in words for the person who wrote the file."""
    said = error.problem or "unreadable"
    at = error.problem_mark
    if at is None:
        return Unusable(None, f"the file can't be read as YAML: {said}.")
    place = Mark(at.line + 1, at.column + 1)
    if "nesting depth" in said:  # since 6.0.4, PyYAML has a limit of its own for what it reads ahead
        return Unusable(place, _TOO_DEEP)
    lines = text.split("\n")
    line = lines[at.line] if at.line < len(lines) else ""
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent and at.column <= len(indent):
        return Unusable(Mark(at.line + 1, indent.index("\t") + 1), "the line is indented with a tab; use spaces.")
    if (at.line, at.column) >= (len(lines) - 1, len(line)) and "expected ':'" not in said:
        # Where it was opened is of more use than where the file ends.
        context = error.context_mark
        opened = Mark(context.line + 1, context.column + 1) if context is not None else place
        place = composing[-1] if opened >= place and composing else opened
        said = "what begins here is never closed"
    hint = next((hint for part, hint in _HINTS if part in said), said)
    return Unusable(place, f"the file can't be read as YAML: {hint}.")


def _number_problem(text: str) -> str:
    """Why a number is refused that YAML 1.1 reads otherwise than people do."""
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
