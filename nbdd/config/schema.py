# SPDX-License-Identifier: MIT
"""The JSON schema of the configuration, and its faults in sentences.

nbdd.schema.json is the one place that knows keys, types and ranges: it validates here and completes in editors. Its
`errorMessage` keywords, which editors show too, are the first half of our sentences.

jsonschema is imported where it is used, because it costs 6 MB and most of the time nothing is validated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from nbdd import data
from nbdd.errors import InvalidURI
from nbdd.text import quoted as quote
from nbdd.uri import URI

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

Path = tuple[str | int, ...]

TLS_REFUSED = (
    "TLS is not supported by this version of nbdd, which never connects in the clear where encryption was asked for; "
    "if the network may see the data, write nbd:// and no TLS settings."
)

_NOT_TEXT = ("yes", "no", "true", "false", "on", "off")

_SEARCHED = 100
"""How many unknown keys of one mapping get the name of a known one beside them."""


class Fault(NamedTuple):
    """One thing that is wrong at `path`, by the schema or by a check beyond it."""

    path: Path
    sentence: str
    on_key: bool = False
    """Whether the key itself is wrong, not its value."""
    tls: bool = False
    """Whether the fault is that encryption was asked for."""


class Schema:
    """The schema that nbdd ships. It checks whole files, and the options of one device; see `shipped`."""

    def __init__(self) -> None:
        self._whole: dict[str, Any] = _inlined(json.loads(data.read("nbdd.schema.json")))
        self._device: dict[str, Any] = self._whole["definitions"]["device"]
        self.device_keys = tuple(self._device["properties"])

    def file_faults(self, value: object, written: Callable[[Path], str | None]) -> Iterator[Fault]:
        """What is wrong with the content of one file; `written` gives the text of a scalar at a path."""
        return self._faults(self._whole, value, written)

    def option_faults(self, options: object, allowed: Collection[str], required: Collection[str]) -> Iterator[Fault]:
        """What is wrong with the options of a call about one device."""
        properties = {key: rule for key, rule in self._device["properties"].items() if key in allowed}
        rules = self._device | {"properties": properties, "required": list(required)}
        return self._faults(rules, options, lambda _: None)

    def _faults(self, rules: dict[str, Any], value: object, written: Callable[[Path], str | None]) -> Iterator[Fault]:
        from jsonschema import Draft7Validator  # noqa: PLC0415 - see the module's docstring

        seen: set[Path] = set()
        for error in Draft7Validator(rules).iter_errors(value):
            path: Path = tuple(error.absolute_path)
            if "propertyNames" in error.absolute_schema_path:
                continue  # check_name of nbdd.config.definition explains it better
            if error.validator == "additionalProperties":
                yield from self._unknown(error, path)
            elif error.validator == "required":
                for key in set(_rules(error)["required"]) - cast("dict[str, Any]", error.instance).keys():
                    if (*path, key) not in seen:
                        seen.add((*path, key))
                        yield Fault((*path, key), "is missing; write for example nbd://server.example/export.")
            elif path not in seen:
                seen.add(path)
                yield Fault(path, f"{_expected(error)}, but {_found(error, written(path))}.")

    def _unknown(self, error: ValidationError, path: Path) -> Iterator[Fault]:
        known = list(_rules(error)["properties"])
        unknown = [key for key in cast("dict[str, Any]", error.instance) if key not in known]
        for number, key in enumerate(unknown):
            # A search costs 0.1 ms, and a file has room for half a million keys.
            near = _near(key, known) if number < _SEARCHED else None
            if key == "tls":
                yield Fault((*path, key), TLS_REFUSED, on_key=True, tls=True)
                continue
            if near is not None:
                sentence = f"is not known; did you mean {near}?"
            elif "devices" in known:
                sentence = "is not known here; devices go below 'devices:', indented."
            elif key in self.device_keys and path[:1] in ((), ("defaults",)):
                sentence = "can't have a default; give it to each device." if path else "can't be set here."
            else:
                sentence = f"is not known; known are {', '.join(known)}."
            yield Fault((*path, key), sentence, on_key=True)


def parse_uris(value: object, path: tuple[str | int, ...]) -> tuple[tuple[URI, ...], list[Fault]]:
    """The URIs in the value of the key `uri`, and what is wrong with them; what is not text is for the schema."""
    found: list[URI] = []
    faults: list[Fault] = []
    several = isinstance(value, list)
    for index, text in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(text, str):
            continue  # the schema reports it
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


def key_of(path: tuple[str | int, ...]) -> str:
    """A key of a device, as 'uri' or 'desktop.icon'; the place says which item of a list."""
    return quote(".".join(step for step in path if isinstance(step, str)))


@cache
def shipped() -> Schema:
    """The schema that nbdd ships, read once."""
    return Schema()


def _near(key: str, known: list[str]) -> str | None:
    """The known key that was probably meant."""
    return next(iter(get_close_matches(key.lower().replace("_", "-")[:64], known, n=1)), None)


def _inlined(rules: dict[str, Any]) -> dict[str, Any]:
    """The schema with each "$ref" replaced by what it refers to, which halves the time to validate."""
    definitions: dict[str, Any] = rules["definitions"]

    def walk(part: Any) -> Any:
        if isinstance(part, list):
            return [walk(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return walk(definitions[part["$ref"].removeprefix("#/definitions/")])
        return {key: walk(item) for key, item in part.items()}

    inlined: dict[str, Any] = walk(rules)
    return inlined


def _rules(error: ValidationError) -> dict[str, Any]:
    """The part of the schema that `error` is about."""
    return cast("dict[str, Any]", error.schema)


def _expected(error: ValidationError) -> str:
    return str(_rules(error)["errorMessage"])


def _found(error: ValidationError, written: str | None) -> str:
    """What was found instead of what was expected."""
    value = error.instance
    wrong_type = error.validator == "type"
    if value is None:
        return "it has no value"
    if isinstance(value, bool):
        meaning = "true" if value else "false"
        return f"{quote(written)} means {meaning} in YAML" if written not in (None, meaning) else f"it is {meaning}"
    if isinstance(value, int | float):
        text = quote(written if written is not None else str(value))[1:-1]
        return f"{text} is a number" if wrong_type and "number" not in _expected(error) else f"it is {text}"
    if isinstance(value, str):
        # Written without quotes, these would not have become text.
        quoted = written is not None and (value.isdecimal() or value.lower() in _NOT_TEXT)
        if wrong_type or quoted:
            return f"{quote(value)} is text" + ("; leave the quotes out" if quoted else "")
        return f"it is {quote(value)}"
    if isinstance(value, list):
        if wrong_type:
            return "it is a list"
        return f"the list has {len(value)} items" if value else "the list is empty"
    return "it is a mapping" if isinstance(value, dict) else f"it is of type {type(value).__name__}"
