# SPDX-License-Identifier: MIT
"""One file of the configuration: reads its text, within bounds, and has `nbdd.config.values` make values of it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from nbdd.config.values import Entry, LocatedDict, LocatedList, Mark, Problem, Unusable, compose
from nbdd.text import quoted

MAX_BYTES = 16 * 1024 * 1024
"""The largest file that is read; 10,000 devices with every key fit into 4 MiB."""

# The complement of YAML 1.1's c-printable (section 5.1), but for the surrogates, which UTF-8 excludes anyway.
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ufeff\uff00-\ufffd\U00010000-\U0010ffff]")


class Source:
    """The content of one file: its `value`, and the `problems` found in reading it. It raises for neither."""

    def __init__(self, path: Path) -> None:
        self.value: Any = None
        self.root = Entry(Mark(1, 1), Mark(1, 1), None)
        self.problems: list[Problem]
        try:
            self.value, self.root, self.problems = compose(_read_text(path))
        except Unusable as error:
            self.problems = [error.problem]

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
                # It is missing: point to the key of the mapping that lacks it.
                return entry._replace(value=entry.key, written=None)
            value, entry = value[step], inside
        return entry


def _read_text(path: Path) -> str:
    try:
        # Without O_NONBLOCK, the open of a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
                raise Unusable(None, f"can't be read: it is {kind}, not a regular file.")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            target = quoted(os.fsencode(path.readlink()).decode(errors="backslashreplace"))
            raise Unusable(None, f"can't be read: it is a link to {target}, which does not exist.") from None
        why = (error.strerror or str(error)).lower()
        raise Unusable(None, f"can't be read: {why}.") from None
    if len(data) > MAX_BYTES:
        raise Unusable(None, f"is larger than {MAX_BYTES // 2**20} MiB; divide it into several files.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        sentence = f"the byte 0x{data[error.start]:02X} is not UTF-8; save the file as UTF-8."
        raise Unusable(_end_of(before), sentence) from None
    bad = _NOT_PRINTABLE.search(text)
    if bad is not None:
        character = "the NUL character" if bad[0] == "\0" else f"the control character {bad[0]!r}"
        raise Unusable(_end_of(text[: bad.start()]), f"{character} must not stand in a YAML file.")
    return text


def _end_of(text: str) -> Mark:
    return Mark(text.count("\n") + 1, len(text) - text.rfind("\n"))
