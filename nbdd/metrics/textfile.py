# SPDX-License-Identifier: MIT
"""A file for the textfile collector of Prometheus' node exporter: written completely, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from nbdd.errors import NbddError

SUFFIX = ".prom"
"""The collector reads only files with this name, so it never reads the unfinished one."""


def write(path: Path, content: bytes) -> None:
    """Replace the file at `path` by one with `content`. On NbddError the old file is still there."""
    if path.suffix != SUFFIX:
        raise NbddError(f"{path} does not end in {SUFFIX}; the node exporter reads no other files.")
    unfinished = ""
    try:
        # Beside it, as only within one filesystem a rename is all or nothing.
        fd, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(fd, 0o644)  # the node exporter is another user
            os.fsync(fd)
        os.replace(unfinished, path)
    except OSError as error:
        if unfinished:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
        raise NbddError(f"{path} can't be written: {error.strerror or error}.") from None
