# SPDX-License-Identifier: MIT
"""What a server says about one export, checked."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from nbdd.errors import NegotiationFailed
from nbdd.limits import MAX_SIZE
from nbdd.protocol.constants import Flags, Info
from nbdd.protocol.text import decode

MAX_MINIMUM_BLOCK = 1 << 16
"""Bytes: "MUST NOT be larger than 2^16" (proto.md, Size constraints)."""

MIN_PREFERRED_BLOCK = 1 << 9
"""Bytes: the preferred size is at least "the maximum of the minimum block size and 2^9"."""

_EXPORT = struct.Struct(">QH")
_BLOCK_SIZE = struct.Struct(">III")


@dataclass(frozen=True, slots=True)
class Export:
    """One export as the server describes it. Sizes in bytes."""

    name: str
    """As the server calls it; may hold control characters and, as lone surrogates, bytes that are no UTF-8."""
    size: int
    """0 to 2^63-1. 0 is of no use for a device; in a list, it may also mean that the size is not known."""
    flags: Flags
    """The transmission flags with all the server's bits, those unknown to us included."""
    minimum: int | None = None
    """Minimum block size: a power of two, 1 to 65536; None if the server did not say."""
    preferred: int | None = None
    """Preferred block size: a power of two, at least `minimum` and 512."""
    maximum: int | None = None
    """Largest payload of a request, at least `preferred`; 0xffffffff is no limit."""
    description: str = ""
    """For people; not to be trusted, like the name."""
    problem: str = ""
    """In a list: the sentence why the size of this export is not known; without flags, nothing is."""

    def to_wire(self) -> dict[str, Any]:
        """A JSON object; strings are safe for json.dumps with its default of ASCII output."""
        return {
            "name": self.name,
            "size": self.size,
            "flags": int(self.flags),
            "minimum": self.minimum,
            "preferred": self.preferred,
            "maximum": self.maximum,
            "description": self.description,
            "problem": self.problem,
        }

    @staticmethod
    def from_wire(wire: dict[str, Any]) -> Export:
        """The inverse of `to_wire`."""
        return Export(
            name=wire["name"],
            size=wire["size"],
            flags=Flags(wire["flags"]),
            minimum=wire["minimum"],
            preferred=wire["preferred"],
            maximum=wire["maximum"],
            description=wire["description"],
            problem=wire["problem"],
        )


def parse_size_and_flags(payload: bytes) -> tuple[int, Flags]:
    """Read the size and the flags, ten bytes, which two options send in the same way; refuse a size above 2^63-1."""
    size, flags = _EXPORT.unpack(payload)
    if size > MAX_SIZE:
        raise NegotiationFailed(f"claims that the export has {size} bytes, more than any device can have ({MAX_SIZE}).")
    return size, Flags(flags)


class Infos:
    """Collects the NBD_REP_INFO replies to one option, in any order."""

    __slots__ = ("_blocks", "_description", "_name", "_seen", "_size_and_flags")

    def __init__(self) -> None:
        self._seen: dict[Info, bytes] = {}
        self._size_and_flags: tuple[int, Flags] | None = None
        self._blocks: tuple[int | None, int | None, int | None] = (None, None, None)
        self._name: str | None = None
        self._description = ""

    def add(self, reply: bytes) -> None:
        """Take one reply; unknown infos are skipped, faulty and contradictory ones raise `NegotiationFailed`."""
        if len(reply) < 2:
            raise NegotiationFailed("sent a piece of information about the export without its type.")
        number = int.from_bytes(reply[:2], "big")
        payload = reply[2:]
        try:
            info = Info(number)
        except ValueError:
            return
        if self._seen.setdefault(info, payload) != payload:
            raise NegotiationFailed(f"sent {info.name} twice for one export, with different content.")
        if info is Info.NBD_INFO_EXPORT:
            self._expect(info, payload, _EXPORT.size)
            self._size_and_flags = parse_size_and_flags(payload)
        elif info is Info.NBD_INFO_BLOCK_SIZE:
            self._expect(info, payload, _BLOCK_SIZE.size)
            self._blocks = _check_block_sizes(*_BLOCK_SIZE.unpack(payload))
        elif info is Info.NBD_INFO_NAME:
            self._name = decode(payload, "an export name")
        else:
            self._description = decode(payload, "a description")

    def export(self, asked: str) -> Export:
        """The export, after the server's last reply; its name is `asked` unless the server gave one."""
        if self._size_and_flags is None:
            raise NegotiationFailed("opened the export without saying its size (no NBD_INFO_EXPORT).")
        size, flags = self._size_and_flags
        name = asked if self._name is None else self._name
        return Export(name, size, flags, *self._blocks, description=self._description)

    @staticmethod
    def _expect(info: Info, payload: bytes, length: int) -> None:
        if len(payload) != length:
            raise NegotiationFailed(f"sent {info.name} with {len(payload)} bytes of payload; it must be {length}.")


def _check_block_sizes(minimum: int, preferred: int, maximum: int) -> tuple[int, int, int]:
    """Return the three as they are; raise `NegotiationFailed` with the rule that they break."""
    sizes = f"block sizes that break the protocol (minimum {minimum}, preferred {preferred}, maximum {maximum})"
    if not _power_of_two(minimum) or minimum > MAX_MINIMUM_BLOCK:
        raise NegotiationFailed(f"sent {sizes}: the minimum must be a power of two up to {MAX_MINIMUM_BLOCK}.")
    if not _power_of_two(preferred) or preferred < max(minimum, MIN_PREFERRED_BLOCK):
        raise NegotiationFailed(
            f"sent {sizes}: the preferred one must be a power of two, at least {MIN_PREFERRED_BLOCK} and the minimum."
        )
    if maximum < preferred:
        raise NegotiationFailed(f"sent {sizes}: the maximum must not be below the preferred one.")
    return minimum, preferred, maximum


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
