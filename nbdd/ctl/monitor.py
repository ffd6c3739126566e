# SPDX-License-Identifier: MIT
"""`nbdctl monitor`: what happens to the devices, as it happens."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from nbdd.bus.caller.device import Device, changes
from nbdd.ctl.common import as_json, call, say, terminal
from nbdd.ctl.show import Look
from nbdd.errors import NbddError

if TYPE_CHECKING:
    from nbdd.bus.caller.client import Client, Event
    from nbdd.ctl.story import Story


@click.command(short_help="Tell what happens, a line for each event.")
@as_json
def monitor(as_json: bool) -> None:
    """Tell what happens to the devices, a line for each event, until Ctrl-C.

    With --json each line is an object with all that the event said.
    """
    import json  # noqa: PLC0415 - of use here only

    async def action(client: Client) -> None:
        running = await client.subscribe()
        story = await _beginning(client, running)
        look = Look.of(sys.stdout)
        if terminal():
            say("Watching; Ctrl-C ends it." if running else "Watching; nbdd is not running now. Ctrl-C ends it.")
        while True:
            event = await client.event()
            if as_json:
                print(json.dumps(_event(event)), flush=True)
            elif told := story.tell(event):
                print(f"{time.strftime('%H:%M:%S')} {look.coloured(told, story.state(event.name))}", flush=True)

    try:
        # Who only watches starts nothing.
        call(action, activate=False)
    except KeyboardInterrupt:
        return


async def _beginning(client: Client, running: bool) -> Story:
    from nbdd.ctl.story import Story  # noqa: PLC0415 - of use here only

    try:
        # Asked for after the subscription: of what happens meanwhile, nothing is missed.
        return Story([Device.of(properties) for properties in await client.devices()] if running else ())
    except NbddError:
        return Story()  # it has just stopped, and the next event says so


def _event(event: Event) -> dict[str, Any]:
    """The JSON object of an event; `time` is in microseconds since 1970, as everywhere in nbdd."""
    found: dict[str, Any] = {"time": time.time_ns() // 1000, "event": str(event.kind)}
    if event.name:
        found["name"] = event.name
    if event.kind == "added":
        found["device"] = Device.of(event.properties).to_json()
    if event.kind == "changed":
        found["changes"] = changes(event.properties)
    return found
