# SPDX-License-Identifier: MIT
"""Tables and texts about devices. All of it returns strings; nothing here prints.

Names, descriptions and errors may come from a hostile NBD server. `printable` escapes whatever could move a terminal's
cursor, ring its bell or turn its text around, so show them only through it.
"""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import click

from nbdd.bus.caller.device import DeviceView
from nbdd.text import duration, printable, size

if TYPE_CHECKING:
    from nbdd.ctl.users import Users

_COLOURS = {
    "attached": "green",
    "connecting": "yellow",
    "degraded": "yellow",
    "reconnecting": "yellow",
    "detaching": "yellow",
    "failed": "red",
}

MODEST = 16
"""Columns in which a name or a server can still be distinguished."""
_LEAST = 4

# Transmission flags, "NBD protocol: Transmission flags": bit 0 says that the others mean something.
_HAS_FLAGS = 1 << 0
_READ_ONLY = 1 << 1
_CAN_MULTI_CONN = 1 << 8


@dataclass(frozen=True, slots=True)
class Look:
    """What the place that text goes to can show."""

    colour: bool = False
    width: int | None = None
    """Columns, or None for lines of any length."""
    terminal: bool = False

    @classmethod
    def of(cls, stream: IO[str] | None) -> Look:
        """What `stream` can show: no colour and no limit unless it is a terminal. NO_COLOR is respected."""
        if stream is None or not stream.isatty():
            return cls()
        try:
            width: int | None = os.get_terminal_size(stream.fileno()).columns or None
        except OSError:
            width = None
        return cls(not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb", width, terminal=True)

    def paint(self, text: str, **style: Any) -> str:
        """The text in a style of click.style, or plain."""
        return click.style(text, **style) if self.colour and text else text

    def coloured(self, text: str, state: str) -> str:
        """The text in the colour of a device's state."""
        colour = _COLOURS.get(state)
        return self.paint(text, fg=colour) if colour else text


def width(text: str) -> int:
    """Columns that the text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def fit(text: str, columns: int | None) -> str:
    """The text, cut to so many columns; the last one becomes an ellipsis then."""
    if columns is None or width(text) <= columns:
        return text
    while text and width(text) >= columns:
        text = text[:-1]
    return text + "…"


def squeeze(text: str, columns: int) -> str:
    """The text, cut in its middle to so many columns: both ends of a URI matter."""
    if width(text) <= columns:
        return text
    end = text[len(text) - columns // 2 :]
    while width(end) > columns // 2:
        end = end[1:]
    return fit(text, columns - width(end)) + end


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    look: Look,
    *,
    right: Sequence[str] = (),
    flexible: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> str:
    """Aligned columns, two spaces apart; an empty cell is "-", so that a script finds each column in its place.

    On a terminal it is made to fit: columns that are `spare` go, the first one first, until the `flexible` ones have
    MODEST columns each, and those are cut, a SERVER in its middle. `right` names the columns that are aligned to the
    right. The column STATE has its colours.
    """
    lines = [list(head), *([cell or "-" for cell in row] for row in rows)]
    widths = {name: max(width(line[column]) for line in lines) for column, name in enumerate(head)}
    if look.width is not None:
        _narrow(widths, look.width, flexible, spare)
    out = []
    for number, line in enumerate(lines):
        cells = []
        for name, cell in zip(head, line, strict=True):
            if name not in widths:
                continue
            shown = (squeeze if name == "SERVER" else fit)(cell, widths[name])
            padding = " " * (widths[name] - width(shown))
            painted = look.paint(shown, bold=True) if number == 0 else _painted(name, shown, look)
            cells.append(padding + painted if name in right else painted + padding)
        out.append("  ".join(cells).rstrip(" "))
    return "\n".join(out)


def _narrow(widths: dict[str, int], room: int, flexible: Sequence[str], spare: Sequence[str]) -> None:
    """Make columns go and shrink until all of them fit into `room`, or nothing more can be done."""

    def excess(floor: int) -> int:
        least = sum(min(taken, floor) if name in flexible else taken for name, taken in widths.items())
        return least + 2 * (len(widths) - 1) - room

    for name in spare:
        if excess(MODEST) <= 0:
            break
        del widths[name]
    over = excess(max(widths.values()))
    while over > 0:
        widest = max((name for name in flexible if name in widths), key=lambda name: widths[name], default="")
        if not widest or widths[widest] <= _LEAST:
            break
        widths[widest] -= 1
        over -= 1


def _painted(column: str, cell: str, look: Look) -> str:
    return state(cell, look) if column == "STATE" else cell


def state(word: str, look: Look) -> str:
    """A state in its colour; what is at rest is dim."""
    colour = _COLOURS.get(word)
    return look.paint(word, fg=colour) if colour else look.paint(word, dim=True)


def devices(found: Iterable[DeviceView], claims: Mapping[str, Sequence[str]] | None, look: Look) -> str:
    """The table of `nbdctl list`; on a terminal, below it, what went wrong with those that are not well.

    `claims` are sentences about who uses a device, by its node; None if that is not known.
    """
    known = list(found)
    rows = [
        (
            printable(device.name),
            printable(device.node),
            printable(device.state),
            size(device.size) if device.size else "",
            "ro" if device.read_only else "rw",
            f"{device.live_connections}/{device.connections}",
            printable(device.uri),
            printable(_uses(device, claims)),
        )
        for device in known
    ]
    used = any(row[-1] for row in rows)
    text = table(
        ("NAME", "NODE", "STATE", "SIZE", "MODE", "CONNS", "SERVER", "USE"),
        rows,
        look,
        right=("SIZE",),
        flexible=("NAME", "SERVER", "USE"),
        spare=("CONNS", "MODE", "SIZE") if claims and used else ("USE", "CONNS", "MODE", "SIZE"),
    )
    if look.terminal:
        ill = [device for device in known if device.last_error and device.state not in {"attached", "detached"}]
        notes = [printable(f"{device.name}: {device.last_error.message}") for device in ill if device.last_error]
        text = "\n".join([text, "", *notes] if notes else [text])
    return text


def _uses(device: DeviceView, claims: Mapping[str, Sequence[str]] | None) -> str:
    """What uses a device, for the table."""
    if claims is None:
        return "?" if device.node else ""
    return ", ".join(_use(claim) for claim in claims.get(device.node, ()))


def _use(claim: str) -> str:
    """A claim in a few words: "/dev/nbd0p1 is mounted on /srv" without the node, which the table has."""
    return claim.partition(" is ")[2] or claim


def exports(found: Iterable[Mapping[str, Any]], look: Look) -> str:
    """The table of `nbdctl exports`. The default export, whose name is empty, is shown as ""."""
    rows = []
    known = list(found)
    for export in known:
        flags = export.get("flags", 0)
        meant = flags if flags & _HAS_FLAGS else 0
        rows.append(
            (
                printable(export.get("name", "")) or '""',
                # Unknown is not 0.
                size(export["size"]) if export.get("size") or not export.get("problem") else "?",
                "ro" if meant & _READ_ONLY else "rw",
                "many" if meant & _CAN_MULTI_CONN else "1",
                printable(export.get("description", "")),
            )
        )
    text = table(
        ("NAME", "SIZE", "MODE", "CONNS", "DESCRIPTION"), rows, look, right=("SIZE",), flexible=("NAME", "DESCRIPTION")
    )
    problems = dict.fromkeys(printable(export["problem"]) for export in known if export.get("problem"))
    return "\n".join([text, "", *problems]) if problems and look.terminal else text


def attached(device: DeviceView) -> str:
    """One sentence about a device that is attached."""
    mode = ", read-only" if device.read_only else ""
    return printable(f"{device.name} is {device.node}, {size(device.size)}{mode}, from {device.uri}")


def status(device: DeviceView, statistics: Mapping[str, int] | None, users: Users | None, look: Look) -> str:
    """All about one device, a line for each thing."""
    lines: dict[str, str | list[str]] = {"State": state(printable(device.state), look)}
    if device.fails_at:
        left = int(device.fails_at / 1e6 - time.time())
        lines["I/O"] = (
            f"waits for a connection, and fails in {duration(left)}"
            if left > 0
            else "fails until there is a connection"
        )
    if device.attached_since:
        # A number, as the name may be that of another machine's user.
        by = f", by user {device.attached_by}" if device.attached_by else ""
        lines["Attached"] = _since(device.attached_since / 1e6) + by
    if device.node:
        lines["Node"] = device.node
        lines["Size"] = f"{size(device.size)} ({device.size} bytes, blocks of {device.block_size})"
    if users is not None:
        lines["Used by"] = _used(users)
    lines["Server"] = [device.uri, *(f"or {other}" for other in device.servers if other != device.uri)]
    lines["Mode"] = "read-only" if device.read_only else "read and write"
    replaced = f", {device.reconnects} replaced" if device.reconnects else ""
    lines["Connections"] = f"{device.live_connections} of {device.connections}{replaced}"
    timeout = f"{device.timeout} s" if device.timeout else "none"
    lines["Timeout"] = f"{timeout}; without any connection I/O fails after {device.dead_timeout} s"
    lines["Encryption"] = device.encryption
    lines["Worker"] = f"PID {device.worker_pid}" if device.worker_pid else "none"
    lines["Defined"] = "in the configuration" if device.configured else "ad hoc, until it is detached"
    if statistics:
        lines |= _traffic(statistics)
    if device.last_error:
        mended = "; mended since" if device.state == "attached" else ""
        lines["Last error"] = f"{device.last_error.message} ({device.last_error.name}){mended}"
    longest = max(map(len, lines))
    out = [look.paint(printable(device.name), bold=True)]
    for label, texts in lines.items():
        first, *more = [texts] if isinstance(texts, str) else texts
        # The state carries colours of ours and was cleaned before it got them.
        out.append(f"  {label:>{longest}}: {first if label == 'State' else printable(first)}")
        out += [f"  {'':>{longest}}  {printable(text)}" for text in more]
    return "\n".join(out)


def _used(users: Users) -> list[str]:
    if users.complete:
        return list(users.found) or ["nothing"]
    return [*(users.found or ["nothing that you may see"]), "(the processes of other users are shown to root only)"]


def _since(start: float) -> str:
    ago = max(int(time.time() - start), 0)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(start))}, {duration(ago)} ago"


def _traffic(counts: Mapping[str, int]) -> dict[str, str]:
    lines: dict[str, str] = {}
    for label, requests, amount in (
        ("Read", "reads", "read-bytes"),
        ("Written", "writes", "written-bytes"),
        ("Discarded", "discards", "discarded-bytes"),
    ):
        if counts.get(requests):
            lines[label] = f"{size(counts.get(amount, 0))} in {counts[requests]} requests"
    if counts.get("flushes"):
        lines["Flushed"] = f"{counts['flushes']} times"
    if counts.get("in-flight"):
        lines["In flight"] = f"{counts['in-flight']} requests"
    return lines
