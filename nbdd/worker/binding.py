# SPDX-License-Identifier: MIT
"""What a bound device is: all that its worker, the manager's record and the worker's successor know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbdd.kernel.node_name import node_path
from nbdd.protocol.export import Export


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """The part of a binding that changes, as the worker reports it whenever it does."""

    live: int
    """How many connections live, as far as anybody has seen."""
    reconnects: int
    """How many connections were made since the attach in place of others."""
    uri: str
    """The server that they lead to, or led to last."""
    size: int
    """Bytes of the device."""
    export: Export
    """What the server says of its export, which a connection that is made later must match."""
    lost: float
    """When the last connection died, in seconds of the monotonic clock; 0 while one lives. I/O waits since then."""
    failing: bool
    """Whether I/O has waited for as long as it may, and fails until a server is back."""

    def to_wire(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "live": self.live,
            "reconnects": self.reconnects,
            "uri": self.uri,
            "size": self.size,
            "export": self.export.to_wire(),
            "lost": self.lost,
            "failing": self.failing,
        }

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> ConnectionState:
        """The inverse of `to_wire`; keys that it does not know are passed over."""
        return ConnectionState(
            live=int(wire["live"]),
            reconnects=int(wire["reconnects"]),
            uri=str(wire["uri"]),
            size=int(wire["size"]),
            export=Export.from_wire(wire["export"]),
            lost=float(wire["lost"]),
            failing=bool(wire["failing"]),
        )


@dataclass(frozen=True, slots=True)
class Binding:
    """A device that the kernel has bound for us.

    `index`, `diskseq` and `pid` tell it from every other device, so that nothing is ever done to one that was bound in
    its place. The manager keeps it in a record in /run (see nbdd/manager/records.py), where an nbdd of another version
    may read it: keys may be added, and none may change its meaning.
    """

    index: int
    """X of /dev/nbdX. The kernel uses it again for another device when this one is free."""
    uri: str
    """The server that the connections lead to, or led to last."""
    export: Export
    """What the server says of its export, which a connection that is made later must match."""
    connections: int
    """How many connections the device has, dead ones among them; the kernel never changes their number."""
    live: int
    """How many of them live, as far as anybody has seen."""
    reconnects: int = 0
    """How many connections were made since the attach in place of others."""
    lost: float = 0
    """When the last connection died, in seconds of the monotonic clock; 0 while one lives. I/O waits since then."""
    node: str = ""
    """The path of the device node."""
    size: int = 0
    """Bytes of the device; 0 if an early nbdd did not say; so for `block_size`."""
    block_size: int = 0
    """Bytes."""
    read_only: bool = False
    diskseq: int = 0
    """The kernel's number of this very disk; 0 if the kernel is too old to have one."""
    pid: int = 0
    """The process that bound it, as the kernel says; 0 if it does not say."""
    baseline: Mapping[str, int] | None = None
    """The kernel's counters when it was bound: they count from when it made the node. None before they were read."""

    @property
    def missing(self) -> int:
        """How many connections are dead."""
        return self.connections - self.live

    def connection_state(self, *, failing: bool) -> ConnectionState:
        """The part that changes, for a report."""
        return ConnectionState(self.live, self.reconnects, self.uri, self.size, self.export, self.lost, failing)

    def with_state(self, state: ConnectionState) -> Binding:
        """The same device, with what was reported last."""
        return replace(
            self,
            live=state.live,
            reconnects=state.reconnects,
            uri=state.uri,
            size=state.size,
            export=state.export,
            lost=state.lost,
        )

    def to_wire(self) -> dict[str, Any]:
        """A JSON object."""
        wire = {
            "index": self.index,
            "uri": self.uri,
            "export": self.export.to_wire(),
            "connections": self.connections,
            "live": self.live,
            "reconnects": self.reconnects,
            "lost": self.lost,
            "node": self.node,
            "size": self.size,
            "block-size": self.block_size,
            "read-only": self.read_only,
            "diskseq": self.diskseq,
            "pid": self.pid,
        }
        return wire if self.baseline is None else {**wire, "baseline": dict(self.baseline)}

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> Binding:
        """The inverse of `to_wire`; keys that it does not know are passed over.

        Raises LookupError, TypeError if one that every nbdd wrote is missing or of another type.
        """
        if not all(isinstance(wire[key], kind) for key, kind in _REQUIRED.items()):
            raise TypeError("the binding is not what a worker writes")
        baseline = wire.get("baseline")
        return Binding(
            index=wire["index"],
            uri=wire["uri"],
            export=Export.from_wire(wire["export"]),
            connections=wire["connections"],
            live=wire["live"],
            reconnects=wire["reconnects"],
            lost=wire.get("lost") or 0,
            node=wire.get("node") or node_path(wire["index"]),
            size=wire.get("size", 0),
            block_size=wire.get("block-size", 0),
            read_only=bool(wire.get("read-only")),
            diskseq=wire.get("diskseq") or 0,
            pid=wire.get("pid") or 0,
            baseline=None if baseline is None else dict(baseline),
        )


_REQUIRED: dict[str, type] = {
    "index": int, "live": int, "connections": int, "reconnects": int, "uri": str, "export": dict
}  # fmt: skip
