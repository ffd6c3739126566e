# SPDX-License-Identifier: MIT
"""What the commands of nbdctl share: types of arguments, the call to the service, and output."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import click

from nbdd.ctl import complete, remote
from nbdd.limits import MAX_TIMEOUT
from nbdd.system.stdio import complain
from nbdd.text import printable

if TYPE_CHECKING:
    from types import ModuleType

    from nbdd.bus.caller.client import ManagerProxy
    from nbdd.bus.caller.device import DeviceView

T = TypeVar("T")


def text(value: str) -> str:
    """A text that can go over the bus, which carries UTF-8 only."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("it is not valid UTF-8.") from None
    return value


def number(value: str | int, least: int = 0) -> int:
    """A whole number that the bus can carry; no option and no argument takes more than a time limit."""
    digits = str(value)
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 10 or not least <= int(digits) <= MAX_TIMEOUT:
        raise click.BadParameter(f"{printable(digits)} is not a whole number from {least} to {MAX_TIMEOUT}.")
    return int(digits)


def count(value: str | int) -> int:
    """A number of things of which there is one at least."""
    return number(value, 1)


as_json_here = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
"""The options of a command that is about this machine: --json alone."""


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every other command: --json and --host."""
    return remote.option(as_json_here(command))


def elsewhere() -> bool:
    """Whether --host names another machine; all that is known of it is what its nbdd reports."""
    return remote.host(click.get_current_context()) is not None


def only_here() -> None:
    """Refuse --host, given to nbdctl itself, for a command that is about this machine."""
    if elsewhere():
        raise click.UsageError("this command is about the machine that it runs on; run it there.")


def device_argument(wanted: Callable[[DeviceView], bool] = lambda _: True) -> Callable[[Any], Any]:
    """The argument `target`, which find.py resolves; the shell completes it with the devices that are `wanted`."""
    completer = complete.names(wanted, nodes=True)
    return click.argument("target", metavar="NAME|NODE|URI", type=text, shell_complete=completer)


def call(action: Callable[[ManagerProxy], Awaitable[T]], *, activate: bool = True, asks: bool = False) -> T:
    """Connect to the service, run `action`, and return its result.

    With `activate` a call may start the service; with `asks` polkit may ask for a password.
    """
    # Imported here: they take longer than all else together, and --help needs neither.
    with _no_ssl():
        import asyncio  # noqa: PLC0415

        from nbdd.bus.caller.client import ManagerProxy  # noqa: PLC0415
        from nbdd.ctl import agent  # noqa: PLC0415

    host = remote.host(click.get_current_context())

    async def run() -> T:
        async with ManagerProxy(activate=activate, host=host) as client:
            return await action(client)

    with agent.asking() if asks and may_ask() else contextlib.nullcontext():
        return asyncio.run(run())


def may_ask() -> bool:
    """Whether polkit may have to ask for a password, and can do so on this terminal."""
    local = not elsewhere()  # polkit of another machine can't use a terminal of this one
    return local and os.geteuid() != 0 and sys.stdin is not None and sys.stdin.isatty()


@contextlib.contextmanager
def _no_ssl() -> Iterator[None]:
    """Hide OpenSSL. asyncio loads it if it is there, for 6 ms of every command; a bus needs none."""
    there = "ssl" in sys.modules
    if not there:
        sys.modules["ssl"] = cast("ModuleType", None)  # makes its import fail, as in a Python that was built without it
    try:
        yield
    finally:
        if not there:
            del sys.modules["ssl"]


def order(name: str) -> list[tuple[int, str]]:
    """A key that sorts disk10 after disk2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def document(value: Any) -> None:
    """Print one JSON document. It is pure ASCII, so it needs no escaping for a terminal."""
    import json  # noqa: PLC0415 - most commands print text

    print(json.dumps(value, indent=2))


def say(text: str) -> None:
    """Print one line for a person, on stderr, if there is one."""
    complain("nbdctl", text)


def terminal() -> IO[str] | None:
    """Stderr if it is a terminal that can rewrite a line."""
    able = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return sys.stderr if able else None
