# SPDX-License-Identifier: MIT
"""`nbdctl monitor`: events as they happen."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from nbdd.bus.caller.device import DeviceView, document
from nbdd.ctl.common import as_json, call, say, terminal
from nbdd.ctl.show import Look
from nbdd.errors import NbddError

if TYPE_CHECKING:
    from nbdd.bus.caller.client import ManagerEvent, ManagerProxy
    from nbdd.ctl.events import EventFormatter


@click.command(short_help="Print events as they happen, one line each.")
@as_json
def monitor(as_json: bool) -> None:
    """Print events of the devices as they happen, one line each, until Ctrl-C.

    With --json each line is an object with all data of the event.
    """
    import json  # noqa: PLC0415 - of use here only

    async def action(client: ManagerProxy) -> None:
        running = await client.subscribe()
        formatter = await _formatter(client, running)
        look = Look.of(sys.stdout)
        if terminal():
            say("Watching; Ctrl-C ends it." if running else "Watching; nbdd is not running now. Ctrl-C ends it.")
        while True:
            event = await client.event()
            if as_json:
                print(json.dumps(_event(event)), flush=True)
            elif line := formatter.format(event):
                print(f"{time.strftime('%H:%M:%S')} {look.coloured(line, formatter.state(event.name))}", flush=True)

    try:
        # Watching does not start nbdd.
        call(action, activate=False)
    except KeyboardInterrupt:
        return


async def _formatter(client: ManagerProxy, running: bool) -> EventFormatter:
    from nbdd.ctl.events import EventFormatter  # noqa: PLC0415 - of use here only

    try:
        # After the subscription, so that no event is missed.
        return EventFormatter(await client.devices() if running else ())
    except NbddError:
        return EventFormatter()  # nbdd has just stopped; the next event says so


def _event(event: ManagerEvent) -> dict[str, Any]:
    """The JSON object of an event; `time` is in microseconds since 1970, as everywhere in nbdd."""
    found: dict[str, Any] = {"time": time.time_ns() // 1000, "event": str(event.kind)}
    if event.name:
        found["name"] = event.name
    if event.kind == "added":
        found["device"] = DeviceView(**event.changes).to_json()
    if event.kind == "changed":
        found["changes"] = document(event.changes)
    return found
