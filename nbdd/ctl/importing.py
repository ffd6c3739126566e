# SPDX-License-Identifier: MIT
"""`nbdctl import`: from the devices of nbd-client to definitions of nbdd."""

from __future__ import annotations

import sys
from typing import Any

import click

from nbdd.ctl.common import as_json_here, document, only_here, say
from nbdd.errors import InvalidConfig
from nbdd.text import printable

NBDTAB = "/etc/nbdtab"


@click.command("import", short_help="Turn an nbdtab of nbd-client into YAML.")
@click.argument("file", metavar="[FILE]", type=click.Path(), default=NBDTAB)
@as_json_here
def import_(file: str, as_json: bool) -> None:
    """Turn an nbdtab(5) of nbd-client into YAML that means the same, and print it.

    FILE is /etc/nbdtab by default, and - for standard input. What has no meaning for nbdd becomes a comment with the
    reason. A device that nbdd can't have, as one with encryption, becomes a comment as a whole, and the command ends
    with 1.

    \b
    nbdctl import > /etc/nbdd/devices.d/nbdtab.yaml
    nbdd --check && nbdctl reload
    """  # noqa: D301 - the backspace is click's sign to leave lines as they are
    only_here()
    from nbdd.ctl import nbdtab  # noqa: PLC0415 - brings YAML and JSON schema along

    entries = nbdtab.read(_text(file), file)
    if as_json:
        document({"devices": [_object(entry) for entry in entries]})
    else:
        print(nbdtab.yaml(entries, file))
    lost = [entry for entry in entries if entry.lost]
    for entry in lost:
        say(printable(f"{file}:{entry.line}: {entry.name} is left out: {entry.left_out}."))
    if lost:
        raise click.exceptions.Exit(1)


def _text(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.buffer.read().decode() if sys.stdin is not None else ""
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except OSError as error:
        raise InvalidConfig(f"{printable(file)} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InvalidConfig(f"{printable(file)}:{line}: it is not valid UTF-8.") from None


def _object(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "line": entry.line,
        "settings": entry.settings,
        "remarks": entry.remarks,
        "left-out": entry.left_out or None,
    }
