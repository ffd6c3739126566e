# SPDX-License-Identifier: MIT
"""From nbd-client's nbdtab(5) to nbdd.yaml(5).

A line is `device host export [option,option...]`, its fields apart by blanks, with `#` before a comment. Of two lines
for one device nbd-client takes the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nbdd.config.options import definition_from_options
from nbdd.errors import InvalidConfig, InvalidURI, NbddError
from nbdd.text import printable
from nbdd.uri import DEFAULT_PORT, URI

_DEVICE = re.compile(r"(?:/dev/)?(nbd(?:0|[1-9][0-9]{0,4}))")

_BLANKS = re.compile(r"[ \t\r\v\f]+")
"""What separates fields; a no-break space does not."""

_KEYS = {"bs": "block-size", "conns": "connections", "timeout": "timeout", "dead-timeout": "dead-timeout"}
"""Options with a number that nbdd has, too, and its names for them."""

_NEEDLESS = {
    "persist": "nbdd always connects again; dead-timeout says for how long I/O waits meanwhile",
    "swap": "nbdd needs no memory of its own on the way of the data; the kernel serves the device by itself",
    "no_optgo": "nbdd finds out by itself what an old server does not know",
    "sdp": "the Socket Direct Protocol is gone from Linux, and from nbd-client",
}

_NO_HOST = frozenset("/?#@[]")
"""Characters that would end the host in a URI."""

_TLS = frozenset({"tls", "certfile", "keyfile", "cacertfile", "tlshostname", "priority"})


@dataclass(slots=True)
class NbdtabEntry:
    """One device of the file."""

    line: int
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """As nbdd.yaml has them, `uri` first."""
    remarks: dict[str, str] = field(default_factory=dict)
    """Options that have no place there, as they were written, and why."""
    left_out: str = ""
    """Why the line gives no device; then it becomes a comment."""
    lost: bool = False
    """Whether nbd-client makes a device of it, and nbdd can't."""


def read(text: str, place: str) -> list[NbdtabEntry]:
    """The devices in the text of an nbdtab; raises InvalidConfig with each fault, as "PLACE:LINE: what is wrong"."""
    entries: list[NbdtabEntry] = []
    problems: list[str] = []
    known: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        fields = [field for field in _BLANKS.split(line.partition("#")[0]) if field]
        if not fields:
            continue
        try:
            entry = _entry(number, fields)
        except NbddError as error:
            problems.append(f"{printable(place)}:{number}: {error}")
            continue
        first = known.setdefault(entry.name, number)
        if first != number:
            entry.left_out = f"line {first} has {entry.name} already, and nbd-client takes the first"
            entry.lost = False
        entries.append(entry)
    if problems:
        raise InvalidConfig(*problems)
    return entries


def _entry(line: int, fields: list[str]) -> NbdtabEntry:
    if len(fields) not in {3, 4}:
        raise InvalidConfig(
            f"a line has 3 or 4 fields (device, host, export and, without blanks, options), not {len(fields)}."
        )
    device, host, export, *rest = fields
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise InvalidConfig(f"{printable(device)!r} is no device such as nbd0.")
    entry = NbdtabEntry(line, found[1])
    options = list(_options(rest[0] if rest else ""))
    entry.settings["uri"] = str(_uri(host, export, options))
    entry.settings["device"] = f"/dev/{entry.name}"
    for option, value in options:
        _apply(entry, option, value)
    definition_from_options(entry.name, entry.settings)
    return entry


def _options(text: str) -> Iterator[tuple[str, str | None]]:
    for item in text.split(",") if text else ():
        option, equals, value = item.partition("=")
        if not option or (equals and not value):
            raise InvalidConfig(
                f"the options {printable(text)!r} have an empty place; they are option or option=value."
            )
        yield option, value if equals else None


def _uri(host: str, export: str, options: Iterable[tuple[str, str | None]]) -> URI:
    """The server and export of a line, checked as a URI is."""
    given = dict(options)
    if "unix" in given:
        return URI.parse(str(URI(tls=False, host=None, port=DEFAULT_PORT, socket=host, export=export)))
    if not _NO_HOST.isdisjoint(host):
        raise InvalidURI(f"{printable(host)!r} is no host.")
    port = given.get("port") or str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and len(port) < 10 and 0 < int(port) < 65536):
        raise InvalidURI(f"the port must be a number from 1 to 65535, not {printable(port)!r}.")
    return URI.parse(str(URI(tls=False, host=host, port=int(port), socket=None, export=export)))


def _apply(entry: NbdtabEntry, option: str, value: str | None) -> None:
    """Make a setting of an option, or a remark."""
    written = option if value is None else f"{option}={value}"
    if option in {"unix", "port"} and (value is not None) == (option == "port"):
        return  # a part of the URI
    if option in _TLS:
        entry.left_out = f"{written} asks for encryption, and nbdd, which does not have that yet, never goes without"
        entry.lost = True
    elif option == "preinit":
        entry.left_out = "preinit skips the negotiation, and nbdd never does"
        entry.lost = True
    elif option.startswith("_"):
        entry.remarks[written] = "nbd-client leaves names with _ to others; nbdd does not know it"
    elif value is None and option in _NEEDLESS:
        entry.remarks[written] = _NEEDLESS[option]
    elif value is not None and option in _KEYS:
        _number(entry, _KEYS[option], written, value)
    else:
        entry.remarks[written] = "nbd-client does not know it either"


def _number(entry: NbdtabEntry, key: str, written: str, value: str) -> None:
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        entry.remarks[written] = "it is no number"
        return
    try:
        definition_from_options(entry.name, {"uri": entry.settings["uri"], key: int(value)})
    except NbddError as error:
        entry.remarks[written] = f"in nbdd, {key} {str(error).partition(' ')[2].partition(' ')[2].rstrip('.')}"
        return
    entry.settings[key] = int(value)


def yaml(entries: Iterable[NbdtabEntry], place: str) -> str:
    """The devices as a file for /etc/nbdd/devices.d, with a comment for everything that has no place there."""
    lines = [
        f"# From {printable(place)}, by nbdctl import.",
        "# Without any connection I/O waits for dead-timeout seconds, 300 by default; nbd-client lets it fail at once.",
        "# With attach: boot, a device is attached when nbdd starts.",
        "",
    ]
    found = list(entries)
    lines.append("devices:" if any(not entry.left_out for entry in found) else "devices: {}")
    for entry in found:
        lines += _block(entry)
    return "\n".join(lines)


def _block(entry: NbdtabEntry) -> Iterator[str]:
    mark = "#" if entry.left_out else " "
    if entry.left_out:
        yield printable(f"# line {entry.line}, left out: {entry.left_out}.")
    yield f"{mark} {entry.name}:"
    for key, value in entry.settings.items():
        yield f"{mark}   {key}: {_scalar(value)}"
    for option, reason in entry.remarks.items():
        yield printable(f"{mark}   # {option}: {reason}.")


def _scalar(value: str | int) -> str:
    # A URI has none of YAML's signs in it, but may end with one.
    return json.dumps(value) if isinstance(value, str) and value.endswith(":") else str(value)
