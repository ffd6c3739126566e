# SPDX-License-Identifier: MIT
"""`nbdctl doctor`: checks of everything that nbdd needs, with what to do about each fault."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from nbdd.bus.caller.device import DeviceView
from nbdd.ctl.common import as_json_here, document, only_here
from nbdd.ctl.show import Look
from nbdd.errors import NbddError
from nbdd.text import printable

if TYPE_CHECKING:
    from nbdd.bus.caller.client import ManagerProxy
    from nbdd.ctl.checks import Finding

DIRECTORY = "/etc/nbdd"

ANSWER_SECONDS = 5
"""How long a healthy nbdd may take to answer; it never waits for a server or a device for that."""

_COLOURS = {"ok": "green", "warning": "yellow", "fault": "red"}


@click.command(short_help="Check everything that nbdd needs.")
@as_json_here
def doctor(as_json: bool) -> None:
    """Check everything that nbdd needs, one line for each thing, with what to do about a fault.

    It starts nothing and changes nothing. Every user may run it; it says what only root can see. Ends with 1 if there
    is a fault, and with 0 if there are warnings at most.
    """
    only_here()
    found = findings()
    faults = sum(finding.verdict == "fault" for finding in found)
    if as_json:
        document({"ok": not faults, "checks": [asdict(finding) for finding in found]})
    else:
        print(_text(found, Look.of(sys.stdout)))
    if faults:
        raise click.exceptions.Exit(1)


def findings() -> list[Finding]:
    """What all checks find, in the order in which faults should be fixed."""
    import asyncio  # noqa: PLC0415 - comes with the bus
    from pathlib import Path  # noqa: PLC0415

    from nbdd.ctl import checks  # noqa: PLC0415 - heavy, and no other command needs it

    found = [checks.kernel_module(), checks.netlink_family(), checks.device_nodes(), checks.udev_rules()]
    found += [checks.permissions(), checks.systemd_unit()]
    on_bus, devices = asyncio.run(_bus())
    found += on_bus
    configured, of_files = checks.configuration(Path(DIRECTORY))
    found += of_files
    found += [*checks.states(devices), *checks.links(devices)]
    return found + checks.servers(checks.known_servers(configured, devices), devices)


async def _bus() -> tuple[list[Finding], list[DeviceView]]:
    """Findings about the bus, nbdd and polkit; and nbdd's devices, if it runs."""
    from nbdd import __version__  # noqa: PLC0415
    from nbdd.bus.caller.client import ManagerProxy  # noqa: PLC0415
    from nbdd.bus.wire.names import BUS_NAME  # noqa: PLC0415
    from nbdd.ctl import checks  # noqa: PLC0415

    try:
        async with ManagerProxy(activate=False) as client:
            names, startable = await client.names()
            found = [checks.ok("system bus", "it answers")]
            version, devices, problem = await _service(client) if BUS_NAME in names else (None, [], None)
            found.append(checks.running(version, __version__, problem))
            if BUS_NAME not in startable:
                found.append(checks.warning("activation", "D-Bus can't start nbdd; install the package again"))
            return [*found, checks.polkit(names, startable)], devices
    except NbddError as error:
        return [checks.fault("system bus", str(error).rstrip("."))], []


async def _service(client: ManagerProxy) -> tuple[str | None, list[DeviceView], NbddError | None]:
    import asyncio  # noqa: PLC0415

    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await client.version(), await client.devices(), None
    except TimeoutError:
        return None, [], NbddError(f"It does not answer within {ANSWER_SECONDS} s; `systemctl restart nbdd` helps.")
    except NbddError as error:
        return None, [], error


def _text(found: list[Finding], look: Look) -> str:
    subjects = max(len(printable(finding.subject)) for finding in found)
    verdicts = max(map(len, _COLOURS))
    lines = []
    for finding in found:
        verdict = look.paint(f"{finding.verdict:{verdicts}}", fg=_COLOURS[finding.verdict])
        lines.append(f"{verdict}  {printable(finding.subject):{subjects}}  {printable(finding.text)}")
    return "\n".join(lines)
