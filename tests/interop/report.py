# SPDX-License-Identifier: MIT
"""The matrix for people: a table, and docs/interop.md, which is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nbdd.ctl.show import width
from tests.guest import Guest
from tests.interop.cells import TRANSPORTS, Caveat

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "interop.md"
WRITE = ".venv/bin/python -m tests.interop"
"""The command that writes it."""

SECONDS = 500
"""For all cells, on a busy machine; a quiet one needs 70."""

_HEAD = ("server", "what is special", "export", "size", "flags", "block sizes", *TRANSPORTS)

_ABOUT = f"""\
# Negotiation with other people's servers

Made by `{WRITE}`; a test holds it against what the servers of both Debians say.

Each row is an export. A cell says `agrees` where nbdd tells the same name, size, flags, block sizes and description as
`nbdinfo --json`: in the D-Bus call that `nbdctl exports --json` prints, in its library, in the command itself (of some
servers), and once more where the export is opened, as for an attach (NBD_OPT_GO). A small number is a footnote.

Sizes are in bytes. Flags are the transmission flags of the NBD protocol as nbdd is told them, or nbdinfo where nbdd
refuses. Block sizes are minimum, preferred and maximum.

"""


def run_in(guest: Guest) -> dict[str, Any]:
    """Run the matrix in a guest where nbdd is installed; see `tests.interop.matrix` for what it prints."""
    for module in ("__init__", "cells", "servers", "matrix"):
        guest.put(Path(__file__).with_name(f"{module}.py"), f"/root/interop/tests/interop/{module}.py")
    try:
        done = guest.run("cd /root/interop && python3 -m tests.interop.matrix", timeout=SECONDS)
    finally:
        guest.run("rm -r /root/interop")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def versions(result: Mapping[str, Any]) -> str:
    """Of what the matrix ran with, on one line."""
    return ", ".join(f"{name} {version}" for name, version in result["system"].items() if name != "release")


def table(result: Mapping[str, Any]) -> str:
    """All rows of one release, aligned, as Markdown."""
    lines = [_HEAD, *(_line(row) for row in result["rows"])]
    widths = [max(width(line[column]) for line in lines) for column in range(len(_HEAD))]
    rule = ["-" * columns for columns in widths]
    return "\n".join(
        "| "
        + " | ".join(cell + " " * (columns - width(cell)) for cell, columns in zip(line, widths, strict=True))
        + " |"
        for line in (lines[0], rule, *lines[1:])
    )


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    blocks = " ".join("-" if bound is None else str(bound) for bound in row["blocks"])
    told = (f"`{row['export']}`", str(row["size"]), row["flags"], "-" if blocks == "- - -" else blocks)
    return (row["peer"], row["about"], *told, *map(_cell, row["cells"].values()))


def _cell(cell: Mapping[str, Any]) -> str:
    return ("refused" if cell["refused"] else "agrees") + " ".join(map(_raised, cell["notes"]))


def _raised(number: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(number))


def section(result: Mapping[str, Any]) -> str:
    """One release of the document."""
    return f"## {result['system']['release']}\n\n{versions(result)}\n\n{table(result)}\n"


def document(results: Iterable[Mapping[str, Any]]) -> str:
    """The whole of it."""
    notes = "".join(f"- {_raised(caveat.number)} {caveat.value}\n" for caveat in Caveat)
    return _ABOUT + notes + "\n" + "\n".join(section(result) for result in results)


def written(release: str) -> list[str]:
    """The lines of the table of one release, such as "Debian 12", as the document has them now."""
    _, _, rest = DOCUMENT.read_text().partition(f"## {release}\n")
    text, _, _ = rest.partition("\n## ")
    return [line for line in text.splitlines() if line.startswith("|")]
