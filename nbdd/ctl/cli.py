# SPDX-License-Identifier: MIT
"""The commands of nbdctl: options in, one call to the service, text or JSON out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from nbdd.ctl import complete, remote, show
from nbdd.ctl.record import Device, changes
from nbdd.errors import AlreadyAttached, InvalidConfig, InvalidURI, NoSuchDevice, NotAttached

if TYPE_CHECKING:
    from nbdd.bus.client import Client, Event

T = TypeVar("T")

LARGEST = 2_000_000
"""No option and no argument takes more: 23 days, in seconds."""


def text(value: str) -> str:
    """A text that can go over the bus, which carries UTF-8 only."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("it is not valid UTF-8.") from None
    return value


def number(value: str | int, least: int = 0) -> int:
    """A whole number that the bus can carry."""
    digits = str(value)
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 10 or not least <= int(digits) <= LARGEST:
        raise click.BadParameter(f"{show.clean(digits)} is not a whole number from {least} to {LARGEST}.")
    return int(digits)


def count(value: str | int) -> int:
    """A number of things of which there is one at least."""
    return number(value, 1)


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command takes: --json, and --host."""
    return remote.option(click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command))


def device_argument(wanted: Callable[[Device], bool] = lambda _: True) -> Callable[[Any], Any]:
    """The argument NAME, completed with the devices that are `wanted`."""
    return click.argument("name", metavar="NAME", type=text, shell_complete=complete.names(wanted))


def call(action: Callable[[Client], Awaitable[T]]) -> T:
    """Connect to the service, do one thing there, and return what came of it."""
    # Imported here: it takes longer than all else together, and --help needs none of it.
    from nbdd.bus.client import Client  # noqa: PLC0415

    host = remote.host(click.get_current_context())

    async def run() -> T:
        async with Client(host=host) as client:
            return await action(client)

    return asyncio.run(run())


def order(name: str) -> list[tuple[int, str]]:
    """A key that sorts disk10 after disk2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def document(value: Any) -> None:
    """Print one JSON document. It is pure ASCII, so nothing in it can upset a terminal."""
    print(json.dumps(value, indent=2))


def say(text: str) -> None:
    """Print one line for a person, on stderr; where that can't be, there is nobody to tell."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(f"nbdctl: {text}", file=sys.stderr)


def terminal() -> IO[str] | None:
    """Stderr if it is a terminal that can rewrite a line."""
    able = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return sys.stderr if able else None


def version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print the version and end, for --version."""
    if not wanted or context.resilient_parsing:
        return
    from importlib import metadata  # noqa: PLC0415 - slow, and needed here only

    try:
        print(f"nbdctl {metadata.version('nbdd')}")
    except metadata.PackageNotFoundError:
        print("nbdctl, not installed")
    context.exit()


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=version, help="Show the version.")
@remote.option
def cli() -> None:
    """Attach network block devices and look after them, with the service nbdd.

    Exit status: 0 done, 1 failed (stderr says why), 2 wrong usage, 130 interrupted.
    """


@cli.command(short_help="Attach a defined device, or an export by its URI.")
@click.argument(
    "target",
    metavar="NAME|URI",
    type=text,
    shell_complete=complete.names(lambda device: device.state in {"detached", "failed"}),
)
@click.option("--name", metavar="NAME", type=text, help="What to call the device; only with a URI.")
@click.option("--device", metavar="NODE", type=text, help="The block device to take, as /dev/nbd3, or auto.")
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option("--connections", metavar="N", type=count, help="How many links to open to the server.")
@click.option("--timeout", metavar="SECONDS", type=number, help="How long a request may take; 0 is no limit.")
@click.option("--dead-timeout", metavar="SECONDS", type=number, help="How long I/O waits while there is no link.")
@click.option("--network-timeout", metavar="SECONDS", type=count, help="How long the server's machine may be silent.")
@click.option("--block-size", metavar="BYTES", type=count, help="The logical block size.")
@click.option("--if-needed", is_flag=True, help="Succeed if it is attached already.")
@as_json
def attach(target: str, if_needed: bool, as_json: bool, **given: Any) -> None:
    """Attach a device that is defined under NAME, or the export at URI.

    Ends when the block device is usable. Options override the definition until the device is detached.

    \b
    nbdctl attach backup
    nbdctl attach nbd://storage.example/backup --name copy --read-only
    """  # noqa: D301 - the backspace is click's sign to leave lines as they are
    from nbdd.ctl.attempt import Attempt, is_uri  # noqa: PLC0415 - brings D-Bus along

    options = {key.replace("_", "-"): value for key, value in given.items() if value is not None and value is not False}
    if "name" in options and not is_uri(target):
        raise click.UsageError("--name goes with a URI only; a definition has its name.")
    if "/" in target and not is_uri(target):
        raise InvalidURI(f"{target} is neither a name nor a URI; perhaps nbd://{target.lstrip('/')} is meant.")
    attempt = Attempt(target, options, terminal())

    async def action(client: Client) -> Device:
        try:
            return await attempt.run(client)
        except AlreadyAttached:
            there = await attempt.existing(client) if if_needed else None
            if there is None:
                raise
            return there

    try:
        device = call(action)
    except KeyboardInterrupt:
        if attempt.asked:
            name = attempt.name
            end = f" To end that: nbdctl detach {name}" if name else " `nbdctl list` shows it."
            say(show.clean(f"Stopped waiting; nbdd goes on attaching {name or target}.{end}"))
        raise click.exceptions.Exit(130) from None
    if as_json:
        document({"name": device.name, "node": device.node, "size": device.size})
    else:
        print(show.attached(device))


@cli.command()
@device_argument(lambda device: device.state != "detached")
@click.option("--force", is_flag=True, help="Detach although it is in use; what was not yet written is lost.")
@click.option("--wait", metavar="SECONDS", type=number, help="How long to wait for those who use it to leave.")
@click.option("--if-needed", is_flag=True, help="Succeed if it is not attached.")
@as_json
def detach(name: str, force: bool, wait: int | None, if_needed: bool, as_json: bool) -> None:
    """Detach the device NAME, or end an attach that is under way."""
    options: dict[str, bool | int | str] = {}
    if force:
        options["force"] = True
    if wait is not None:
        options["wait"] = wait

    async def action(client: Client) -> bool:
        try:
            await client.detach(name, options)
        except (NotAttached, NoSuchDevice):
            if not if_needed:
                raise
            return False
        return True

    try:
        done = call(action)
    except KeyboardInterrupt:
        say(show.clean(f"Stopped waiting; nbdd may still detach {name}. `nbdctl status {name}` shows it."))
        raise click.exceptions.Exit(130) from None
    if as_json:
        document({"name": name, "detached": done})
    else:
        print(show.clean(f"{name} is detached" if done else f"{name} was not attached"))


@cli.command("list")
@as_json
def list_(as_json: bool) -> None:
    """List all devices, attached or not."""

    async def action(client: Client) -> list[Device]:
        return [Device.of(properties) for properties in await client.devices()]

    found = sorted(call(action), key=lambda device: order(device.name))
    if as_json:
        document({"devices": [device.to_json() for device in found]})
    elif found:
        print(show.devices(found, show.Look.of(sys.stdout)))
    else:
        say(
            "There are no devices. Define some in /etc/nbdd/devices.d/ and `nbdctl reload`, or try: "
            "nbdctl attach nbd://HOST/EXPORT"
        )


@cli.command()
@device_argument()
@as_json
def status(name: str, as_json: bool) -> None:
    """Show all about the device NAME."""

    async def action(client: Client) -> tuple[Device, dict[str, int] | None]:
        device = Device.of(await client.device(name))
        try:
            return device, await client.statistics(name)
        except (NotAttached, NoSuchDevice):
            return device, None

    device, statistics = call(action)
    if as_json:
        document(device.to_json() | {"statistics": statistics})
    else:
        print(show.status(device, statistics, show.Look.of(sys.stdout)))


# "-1" is a number out of range here, not an option.
@cli.command("set-timeout", context_settings={"ignore_unknown_options": True})
@device_argument(lambda device: bool(device.node))
@click.argument("seconds", metavar="SECONDS", type=number)
@as_json
def set_timeout(name: str, seconds: int, as_json: bool) -> None:
    """Set how long a request of the attached device NAME may take.

    A request that takes longer ends its link, not the I/O. 0 is no limit. It holds until the device is detached.
    """
    call(lambda client: client.set_timeout(name, seconds))
    if as_json:
        document({"name": name, "timeout": seconds})
    else:
        limit = f"a request may take {seconds} s" if seconds else "a request may take as long as it needs"
        print(show.clean(f"{name}: {limit}"))


@cli.command()
@device_argument(lambda device: bool(device.node))
@as_json
def reconnect(name: str, as_json: bool) -> None:
    """Exchange the links of the attached device NAME for new ones, under I/O.

    For a server that is about to be restarted or moved, and for going back to the first server of a list: the servers
    are asked in the order of the definition, and one that does not have the same data is refused.
    """
    call(lambda client: client.reconnect(name))
    if as_json:
        document({"name": name, "reconnected": True})
    else:
        print(show.clean(f"{name} is connected anew"))


@cli.command()
@device_argument(lambda device: bool(device.node))
@as_json
def resize(name: str, as_json: bool) -> None:
    """Let the attached device NAME take the size that its server says now, if it has grown, under I/O.

    What is on the device is grown afterwards, with resize2fs, xfs_growfs and the like.
    """
    size = call(lambda client: client.resize(name))
    if as_json:
        document({"name": name, "size": size})
    else:
        print(show.clean(f"{name} has {show.size(size)} ({size} bytes)"))


@cli.command()
@click.argument("uri", metavar="URI", type=text)
@as_json
def exports(uri: str, as_json: bool) -> None:
    """Ask the NBD server at URI what it exports."""
    found = call(lambda client: client.exports(uri))
    if as_json:
        document({"exports": found})
    elif found:
        print(show.exports(found, show.Look.of(sys.stdout)))
    else:
        say("The server lists no exports. It may still have some, for those who know their names.")


@cli.command()
@as_json
def reload(as_json: bool) -> None:
    """Make nbdd read its configuration again. A bad file changes nothing."""
    try:
        done = call(lambda client: client.reload())
    except InvalidConfig as error:
        raise InvalidConfig(*error.problems, "Nothing is changed.") from None
    if as_json:
        document(done._asdict())
        return
    if not any(done):
        print("Nothing changed.")
    for label, names in zip(("added", "changed", "removed"), done, strict=True):
        if names:
            print(show.clean(f"{label}: {', '.join(sorted(names, key=order))}"))


@cli.command(short_help="Print what happens, a line for each event.")
@as_json
def monitor(as_json: bool) -> None:
    """Print what happens to the devices, a line for each event, until Ctrl-C."""

    async def action(client: Client) -> None:
        running = await client.subscribe()
        if terminal():
            say("Watching; Ctrl-C ends it." if running else "Watching; nbdd is not running now. Ctrl-C ends it.")
        while True:
            event = await client.event()
            print(json.dumps(_event(event)) if as_json else _event_line(event), flush=True)

    try:
        call(action)
    except KeyboardInterrupt:
        return


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


def _event_line(event: Event) -> str:
    what = f"{event.name}: " if event.name else "nbdd "
    if event.kind == "added":
        device = Device.of(event.properties)
        line = show.clean(f"{what}added, {device.state}, {device.uri}")
    elif event.kind == "changed":
        line = show.clean(what) + show.changed(changes(event.properties))
    else:
        line = show.clean(f"{what}{event.kind}")
    return f"{time.strftime('%H:%M:%S')} {line}"
