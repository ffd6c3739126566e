# SPDX-License-Identifier: MIT
"""Completion of device names in the shell: it asks a running nbdd, briefly, and says nothing when that fails.

The rest is click's: completions/ has what bash, zsh and fish load for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from nbdd.ctl.record import Device

_SECONDS = 1
"""A person who pressed Tab does not wait longer."""

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names(wanted: Callable[[Device], bool] = lambda _: True, *, nodes: bool = False) -> Completer:
    """A completer for the names of the devices that are `wanted`; with `nodes` for a begun /dev/nbdX as well."""

    def complete(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        import asyncio  # noqa: PLC0415 - as below

        found: list[Device] = []
        with contextlib.suppress(Exception):
            found = asyncio.run(_devices())
        by_node = nodes and begun.startswith("/")
        return [
            CompletionItem(word, help=device.name if by_node else device.state)
            for device in sorted(found, key=lambda device: device.name)
            if (word := device.node if by_node else device.name).startswith(begun) and word and wanted(device)
        ]

    return complete


async def _devices() -> list[Device]:
    # Imported here: they take longer than all else together, and --help needs neither.
    import asyncio  # noqa: PLC0415

    from nbdd.bus.client import Client  # noqa: PLC0415

    async with asyncio.timeout(_SECONDS), Client(activate=False) as client:
        return [Device.of(properties) for properties in await client.devices()]
