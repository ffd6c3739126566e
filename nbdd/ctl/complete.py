# SPDX-License-Identifier: MIT
"""Completion of device names in the shell: it asks a running nbdd, briefly, and completes nothing if that fails.

click does the rest; completions/ has what bash, zsh and fish load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from nbdd.bus.caller.device import DeviceView
from nbdd.ctl import remote

_SECONDS = 1
_REMOTE_SECONDS = 4
"""With --host, which needs ssh."""

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names(wanted: Callable[[DeviceView], bool] = lambda _: True, *, nodes: bool = False) -> Completer:
    """A completer for the names of the devices that are `wanted`; with `nodes` for a begun /dev/nbdX as well."""

    def complete(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        import asyncio  # noqa: PLC0415 - as below

        found: list[DeviceView] = []
        with contextlib.suppress(Exception):
            found = asyncio.run(_devices(remote.host(context)))
        by_node = nodes and begun.startswith("/")
        return [
            CompletionItem(word, help=device.name if by_node else device.state)
            for device in sorted(found, key=lambda device: device.name)
            if (word := device.node if by_node else device.name).startswith(begun) and word and wanted(device)
        ]

    return complete


async def _devices(host: str | None) -> list[DeviceView]:
    # Imported here: they take longer than all else together, and --help needs neither.
    import asyncio  # noqa: PLC0415

    from nbdd.bus.caller.client import ManagerProxy  # noqa: PLC0415

    seconds = _SECONDS if host is None else _REMOTE_SECONDS
    async with asyncio.timeout(seconds), ManagerProxy(activate=False, host=host) as client:
        return await client.devices()
