# SPDX-License-Identifier: MIT
"""--host: an option of nbdctl itself and of each of its commands."""

from __future__ import annotations

import click

_KEY = __name__


def _take(context: click.Context, _parameter: click.Parameter, host: str | None) -> None:
    if host is None:
        return
    if not host.strip() or not host.isprintable() or host.startswith("-"):
        raise click.BadParameter("it is the name of a machine, as ssh takes it.")
    # Shared by the contexts of nbdctl and of the command. The command's own option is read later, and so wins.
    context.meta[_KEY] = host


option = click.option(
    "-H",
    "--host",
    metavar="[USER@]HOST",
    expose_value=False,
    callback=_take,
    help="Control nbdd on another machine, with ssh.",
)


def host(context: click.Context) -> str | None:
    """The machine that --host names; None for this one."""
    found: str | None = context.meta.get(_KEY)
    return found
