# SPDX-License-Identifier: MIT
"""The commands of nbdctl: options in, one call to the service, text or JSON out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nbdd.bus.caller.device import DeviceView
from nbdd.ctl import complete, find, remote, show, users
from nbdd.ctl.common import (
    as_json,
    call,
    count,
    device_argument,
    document,
    elsewhere,
    may_ask,
    number,
    order,
    say,
    terminal,
    text,
)
from nbdd.ctl.doctor import doctor
from nbdd.ctl.importing import import_
from nbdd.ctl.monitor import monitor
from nbdd.ctl.top import top
from nbdd.errors import AlreadyAttached, InvalidConfig, InvalidURI, NoSuchDevice, NotAttached
from nbdd.text import printable, size

if TYPE_CHECKING:
    from nbdd.bus.caller.client import ManagerProxy

T = TypeVar("T")


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


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=version, help="Show the version.")
@remote.option
@click.pass_context
def cli(context: click.Context) -> None:
    """Attach network block devices and keep them attached, with the service nbdd.

    Exit status: 0 done, 1 failed (stderr says why), 2 wrong usage, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        # Not click's no_args_is_help: before click 8.2, which Debian 12 does not have, that is a success.
        with contextlib.suppress(OSError):
            click.echo(context.get_help(), err=True)
        context.exit(2)


@cli.command(short_help="Attach a defined device, or an export by its URI.")
@click.argument(
    "target",
    metavar="NAME|URI",
    type=text,
    shell_complete=complete.names(lambda device: device.state in {"detached", "failed"}),
)
@click.option(
    "--name",
    metavar="NAME",
    type=text,
    help="What to call the device; only with a URI. By default it is made from the name of the export.",
)
@click.option(
    "--device", metavar="NODE", type=text, help="The block device to take, as /dev/nbd3, or auto for a free one."
)
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option(
    "--connections", metavar="N", type=count, help="How many connections to open to the server, from 1 to 16."
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=number,
    help="How long a request may take before its connection is given up; 0 is no limit.",
)
@click.option(
    "--dead-timeout",
    metavar="SECONDS",
    type=number,
    help="How long I/O waits without any connection before it fails.",
)
@click.option(
    "--network-timeout",
    metavar="SECONDS",
    type=count,
    help="How long the server's machine may be silent before its connection is given up.",
)
@click.option(
    "--block-size", metavar="BYTES", type=count, help="The logical block size, a power of two from 512 to 65536."
)
@click.option(
    "--wait",
    metavar="SECONDS",
    type=number,
    default=0,
    help="How long to retry if the server can't be reached; 0 by default.",
)
@click.option("--if-needed", is_flag=True, help="Succeed if it is attached already.")
@as_json
def attach(target: str, wait: int, if_needed: bool, as_json: bool, **given: Any) -> None:
    """Attach a device that is defined under NAME, or the export at URI.

    Ends when the block device is usable. Options override the definition until the device is detached.

    \b
    nbdctl attach backup
    nbdctl attach nbd://storage.example/backup --name copy --read-only
    """  # noqa: D301 - the backspace is click's sign to leave lines as they are
    from nbdd.ctl.attempt import Attempt  # noqa: PLC0415 - brings D-Bus along

    options = {key.replace("_", "-"): value for key, value in given.items() if value is not None and value is not False}
    is_uri = find.is_uri(target)
    if "name" in options and not is_uri:
        raise click.UsageError("--name goes with a URI only; a definition has its name.")
    if "/" in target and not is_uri:
        raise InvalidURI(f"{target} is neither a name nor a URI; perhaps nbd://{target.lstrip('/')} is meant.")
    attempt = Attempt(target, options, terminal(), wait=wait, quiet=may_ask())

    async def action(client: ManagerProxy) -> DeviceView:
        try:
            return await attempt.run(client)
        except AlreadyAttached:
            there = await attempt.existing(client) if if_needed else None
            if there is None:
                raise
            return there

    try:
        device = call(action, asks=True)
    except KeyboardInterrupt:
        if attempt.goes_on:
            name = attempt.name
            end = f" To end that: nbdctl detach {name}" if name else " `nbdctl list` shows it."
            say(printable(f"Stopped waiting; nbdd goes on attaching {name or target}.{end}"))
        raise click.exceptions.Exit(130) from None
    if as_json:
        document({"name": device.name, "node": device.node, "size": device.size})
    else:
        print(show.attached(device))
    if attempt.twins:
        others = " and ".join(attempt.twins)
        say(printable(f"Beware: {others} can write to the same export. What is mounted twice is destroyed."))


@cli.command()
@device_argument(lambda device: device.state != "detached")
@click.option("--force", is_flag=True, help="Detach although it is in use; what was not yet written is lost.")
@click.option(
    "--wait",
    metavar="SECONDS",
    type=number,
    help="How long to wait until nothing uses it; 0 by default.",
)
@click.option("--if-needed", is_flag=True, help="Succeed if it is not attached.")
@as_json
def detach(target: str, force: bool, wait: int | None, if_needed: bool, as_json: bool) -> None:
    """Detach a device, or end an attach that is under way.

    Ends when the kernel's device is free. Refused while the device is in use; the error names what uses it.
    """
    options: dict[str, bool | int | str] = {}
    if force:
        options["force"] = True
    if wait is not None:
        options["wait"] = wait

    here = not elsewhere()
    node = ""

    async def action(client: ManagerProxy) -> tuple[str, bool]:
        nonlocal node
        meant = target
        try:
            if force:
                device = await find.device(client, target, here=here)
                meant, node = device.name, device.node
            else:
                meant = await find.name(client, target, here=here)
            await client.detach(meant, options)
        except (NotAttached, NoSuchDevice):
            if not if_needed:
                raise
            return meant, False
        return meant, True

    try:
        name, done = call(action, asks=True)
    except KeyboardInterrupt:
        say(printable(f"Stopped waiting; nbdd may still detach {target}. `nbdctl status {target}` shows it."))
        raise click.exceptions.Exit(130) from None
    if as_json:
        document({"name": name, "detached": done})
    else:
        print(printable(f"{name} is detached" if done else f"{name} was not attached"))
    if node and here:
        for claim in users.claims().get(node, []):
            say(printable(f"{claim} still: what was not written is lost, and all I/O there fails."))


@cli.command("list", short_help="List all devices, attached or not.")
@as_json
def list_(as_json: bool) -> None:
    """List all devices, attached or not, with their servers.

    The last column shows what is mounted, used as swap or stacked on them. It is ? if that is not known: on another
    machine.
    """
    here = not elsewhere()

    async def action(client: ManagerProxy) -> tuple[list[DeviceView], dict[str, list[str]] | None]:
        import asyncio  # noqa: PLC0415 - comes with the bus

        # Look at this machine while nbdd answers.
        looking = asyncio.to_thread(users.claims) if here else asyncio.sleep(0)
        found, claims = await asyncio.gather(client.devices(), looking)
        return found, claims

    found, claims = call(action)
    found.sort(key=lambda device: order(device.name))
    if as_json:
        known = [None if claims is None else claims.get(device.node, []) for device in found]
        document({"devices": [each.to_json() | {"users": using} for each, using in zip(found, known, strict=True)]})
    elif found:
        print(show.devices(found, claims, show.Look.of(sys.stdout)))
    else:
        say(
            "There are no devices. Define some in /etc/nbdd/devices.d/ and `nbdctl reload`, or try: "
            "nbdctl attach nbd://HOST/EXPORT"
        )


@cli.command(short_help="Show all about one device, and what uses it.")
@device_argument()
@as_json
def status(target: str, as_json: bool) -> None:
    """Show all about one device: its state, what uses it, its connections, its counters, the last error.

    The NODE is /dev/nbd5, a partition of it, a link to it, or just nbd5. Only root sees the processes of other users;
    the output says if some may be missing. On another machine, what uses a device is not known.
    """
    here = not elsewhere()

    async def action(client: ManagerProxy) -> tuple[DeviceView, dict[str, int] | None]:
        device = await find.device(client, target, here=here)
        try:
            return device, await client.statistics(device.name)
        except (NotAttached, NoSuchDevice):
            return device, None

    device, statistics = call(action)
    using = users.users_of(device.node) if device.node and here else None
    if as_json:
        seen = {"users": list(using.found), "users-complete": using.complete} if using is not None else {}
        unseen: dict[str, Any] = {"users": [] if here else None, "users-complete": here}
        document(device.to_json() | unseen | seen | {"statistics": statistics})
    else:
        print(show.status(device, statistics, using, show.Look.of(sys.stdout)))


def _do(target: str, order: Callable[[ManagerProxy, str], Awaitable[T]]) -> tuple[str, T]:
    """Run `order` on the device that `target` means; return its name and the result."""
    here = not elsewhere()

    async def action(client: ManagerProxy) -> tuple[str, T]:
        name = await find.name(client, target, here=here)
        return name, await order(client, name)

    return call(action, asks=True)


# "-1" is a number out of range here, not an option.
@cli.command("set-timeout", context_settings={"ignore_unknown_options": True})
@device_argument(lambda device: bool(device.node))
@click.argument("seconds", metavar="SECONDS", type=number)
@as_json
def set_timeout(target: str, seconds: int, as_json: bool) -> None:
    """Set how long a request of an attached device may take.

    It works under I/O. A request that takes longer ends its connection, not the I/O; 0 is no limit. It holds until the
    device is detached.
    """
    name, _ = _do(target, lambda client, name: client.set_timeout(name, seconds))
    if as_json:
        document({"name": name, "timeout": seconds})
    else:
        limit = f"a request may take {seconds} s" if seconds else "a request may take as long as it needs"
        print(printable(f"{name}: {limit}"))


@cli.command()
@device_argument(lambda device: bool(device.node))
@as_json
def reconnect(target: str, as_json: bool) -> None:
    """Replace the connections of an attached device, under I/O.

    For a server that is about to be restarted or moved, and for going back to the first server of a list: the servers
    are tried in the order of the definition, and one that does not have the same data is refused.
    """
    name, _ = _do(target, lambda client, name: client.reconnect(name))
    if as_json:
        document({"name": name, "reconnected": True})
    else:
        print(printable(f"{name} is connected again"))


@cli.command()
@device_argument(lambda device: bool(device.node))
@as_json
def resize(target: str, as_json: bool) -> None:
    """Grow an attached device to the size that its export has now, under I/O.

    Grow what is on the device afterwards, with resize2fs, xfs_growfs and the like.
    """
    name, count = _do(target, lambda client, name: client.resize(name))
    if as_json:
        document({"name": name, "size": count})
    else:
        print(printable(f"{name} has {size(count)} ({count} bytes)"))


@cli.command()
@click.argument("uri", metavar="URI", type=text)
@as_json
def exports(uri: str, as_json: bool) -> None:
    """Ask the NBD server at URI what it exports."""
    found = call(lambda client: client.exports(uri), asks=True)
    if as_json:
        document({"exports": found})
    elif found:
        print(show.exports(found, show.Look.of(sys.stdout)))
    else:
        say("The server lists no exports. It may still have some, for those who know their names.")


@cli.command(short_help="Make nbdd read its configuration again.")
@as_json
def reload(as_json: bool) -> None:
    """Make nbdd read its configuration again, and print what was added, changed and removed.

    A bad file changes nothing.
    """
    try:
        done = call(lambda client: client.reload(), asks=True)
    except InvalidConfig as error:
        raise InvalidConfig(*error.problems, "Nothing is changed.") from None
    if as_json:
        document(done._asdict())
        return
    if not any(done):
        print("Nothing changed.")
    for label, names in zip(("added", "changed", "removed"), done, strict=True):
        if names:
            print(printable(f"{label}: {', '.join(sorted(names, key=order))}"))


cli.add_command(monitor)
cli.add_command(doctor)
cli.add_command(import_)
cli.add_command(top)
