# SPDX-License-Identifier: MIT
"""Text for people: what a stranger sent becomes fit to print, and numbers read well."""

from __future__ import annotations

QUOTED = 80
"""Characters of a text that a sentence repeats; more would bury the sentence around it."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(text: str) -> str:
    r"""The text on one line, with every character that does not print escaped as Python escapes it.

    Control characters, line separators and marks that turn the writing direction do not print. A lone surrogate, as
    ``surrogateescape`` makes of a byte that is not UTF-8, becomes that byte: \xff.
    """
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def quoted(text: bytes | str, limit: int = QUOTED) -> str:
    """The text in quotes and `printable`; of a longer one the first `limit` characters and an ellipsis."""
    if isinstance(text, bytes):
        # No character has more than four bytes.
        text = text[: 4 * limit + 4].decode("utf-8", "surrogateescape")
    cut = text[:limit]
    return f"'{printable(cut)}'" if cut == text else f"'{printable(cut)}...'"


def one_line(text: str, limit: int | None = None) -> str:
    """The text with one space for each run of white space or of what does not print, at most `limit` characters."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def clause(problem: object) -> str:
    """The sentences of an error on one line, without the last full stop: a part of another sentence."""
    return one_line(str(problem)).rstrip(".")


def plural(number: int, noun: str) -> str:
    """A number of things: "1 device", "2 devices"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(count: int) -> str:
    """Bytes in binary units: "512 B", "10 GiB", "1.5 TiB". A whole number is exact, a decimal is rounded."""
    unit = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    if round(count / (1 << 10 * unit), 1) >= 1024 and unit < len(_UNITS) - 1:
        unit += 1  # 1023.99 GiB is better called 1.0 TiB
    whole, rest = divmod(count, 1 << 10 * unit)
    return f"{whole} {_UNITS[unit]}" if not rest else f"{count / (1 << 10 * unit):.1f} {_UNITS[unit]}"


def duration(seconds: int) -> str:
    """About how long: "90 s", "12 min", "2 h 30 min", "3 d 4 h"."""
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    days, hours, minutes = seconds // 86400, seconds % 86400 // 3600, seconds % 3600 // 60
    parts = ((days, "d"), (hours, "h"), (minutes if not days else 0, "min"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
