# SPDX-License-Identifier: MIT
"""`nbdctl top`: the I/O of the devices, live."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import click

from nbdd.ctl.common import as_json, call, count
from nbdd.text import printable

if TYPE_CHECKING:
    from nbdd.bus.caller.client import ManagerProxy

_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

LEAST_SECONDS, MOST_SECONDS = 0.1, 3600.0


def seconds(value: str | float) -> float:
    """The seconds between two samples, from the command line."""
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not LEAST_SECONDS <= found <= MOST_SECONDS:
        raise click.BadParameter(f"{printable(str(value))} is no number from {LEAST_SECONDS:g} to {MOST_SECONDS:g}.")
    return found


@click.command(short_help="Show the I/O of the devices, live.")
@click.option("-n", "--count", "frames", metavar="COUNT", type=count, help="End after so many updates.")
@click.option(
    "-d", "--delay", metavar="SECONDS", type=seconds, default=2.0, show_default=True, help="Time between two updates."
)
@as_json
def top(frames: int | None, delay: float, as_json: bool) -> None:
    """Show the I/O of the attached devices, live, until Ctrl-C.

    r is for reads, w for writes: megabytes in a second, requests in a second, and milliseconds that one took (await).
    INFLIGHT counts the requests under way, BUSY is the part of the time in which there were some. Without a terminal
    it prints a table for each update; with --json one object per line.
    """
    ended: list[int] = []

    async def action(client: ManagerProxy) -> None:
        import asyncio  # noqa: PLC0415 - comes with the bus

        watching = asyncio.ensure_future(_watch(client, frames, delay, as_json=as_json))

        def end(number: int) -> None:
            ended.append(number)
            watching.cancel()

        # On any of these signals the terminal is restored first.
        for number in _ENDS:
            asyncio.get_running_loop().add_signal_handler(number, end, number)
        try:
            await watching
        except asyncio.CancelledError:
            if not ended:
                raise
            raise click.exceptions.Exit(128 + ended[0]) from None

    try:
        # Watching does not start nbdd.
        call(action, activate=False)
    except KeyboardInterrupt:
        return


async def _watch(client: ManagerProxy, frames: int | None, delay: float, *, as_json: bool) -> None:
    import asyncio  # noqa: PLC0415 - comes with the bus

    from nbdd.ctl.frames import Sampler, display  # noqa: PLC0415 - no other command needs it

    sampler = Sampler(client)
    await sampler.sample()
    with display(as_json, sys.stdout) as show:
        shown = 0
        while frames is None or shown < frames:
            await asyncio.sleep(delay)
            show(await sampler.sample())
            shown += 1
