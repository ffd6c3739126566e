# SPDX-License-Identifier: MIT
"""nbdd-open: opens an nbd:// link as a folder in the file manager, and detaches it again.

An error is one sentence: on standard error and, if that is no terminal, as a notification.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from nbdd import __version__
from nbdd.bus.caller.client import ManagerProxy
from nbdd.bus.caller.connection import CallerBus, session_bus, system_bus
from nbdd.desktop import notice
from nbdd.desktop.disks import Disks, link, one_at_a_time
from nbdd.desktop.file_manager import show_folder
from nbdd.desktop.notifications import Notification, Notifications, NotShown
from nbdd.desktop.udisks import UDisks
from nbdd.errors import NbddError
from nbdd.system.stdio import discard_stdout
from nbdd.text import one_line
from nbdd.uri import URI

PATIENCE = 1.5
"""Seconds after a click before the first notification."""

_OPENER_SECONDS = 3.0
"""How long xdg-open may take to fail; one that runs longer is a file manager."""

INTERRUPTED = 128 + signal.SIGINT

log = logging.getLogger("nbdd-open")


class Feedback:
    """Messages to the user: on the terminal, else as notifications, else none."""

    def __init__(self, session: CallerBus | None) -> None:
        self._notifications = Notifications(session) if session is not None and not sys.stderr.isatty() else None
        self._number = 0

    async def notify(self, summary: str, body: str, icon: str, *, lasting: bool = True) -> None:
        """Show a notification, in place of the one before."""
        await self.show(Notification(summary, body, icon, category="device", lasting=lasting))

    async def show(self, what: Notification) -> None:
        """The same with a complete notification."""
        if self._notifications is not None:
            with contextlib.suppress(NotShown):
                self._number = await self._notifications.show(what, self._number)

    @contextlib.asynccontextmanager
    async def waiting(self, summary: str, body: str) -> AsyncIterator[None]:
        """Show what takes long, after PATIENCE seconds."""
        over = asyncio.Event()

        async def later() -> None:
            try:
                async with asyncio.timeout(PATIENCE):
                    await over.wait()
            except TimeoutError:
                await self.notify(summary, body, "network-server")

        task = asyncio.create_task(later())
        try:
            yield
        finally:
            over.set()
            # Cancelled, it would leave a notification whose number we don't know, and so can't replace or close.
            await task

    async def close(self) -> None:
        """Close the last notification."""
        if self._notifications is not None and self._number:
            await self._notifications.close(self._number)


async def open_link(text: str, feedback: Feedback, session: CallerBus | None) -> None:
    """Attach what the link names, mount it, and show it in the file manager."""
    uri = link(text)
    async with (
        feedback.waiting("Opening a network disk", f"{_describe(uri)} is asked for."),
        one_at_a_time(),
        ManagerProxy() as client,
        system_bus() as bus,
    ):
        disks = Disks(client, UDisks(bus))
        folder = await disks.mount(await disks.attach(uri))
    await feedback.close()
    _print(folder)
    if session is None or not await show_folder(session, folder):
        await asyncio.to_thread(_xdg_open, folder)


async def detach(target: str, feedback: Feedback) -> None:
    """Unmount and detach `target`: a name, a link, a node or a folder; "" is all that this user attached."""
    # The lock keeps nbdd-notify from taking this unmount for one in the file manager.
    async with one_at_a_time(), ManagerProxy() as client, system_bus() as bus:
        disks = Disks(client, UDisks(bus))
        found = await disks.find(target)
        if not found:
            await feedback.notify("Nothing to detach", "No network disk is yours.", "drive-harddisk", lasting=False)
            _print("Nothing to detach: no network disk is yours")
        for device in found:
            name = notice.title(device)
            async with feedback.waiting(f"Detaching {name}", "What is not written yet is being written."):
                await disks.detach(device)
            await feedback.show(notice.detached(device))
            _print(f"{device.name} is detached")


def _print(what: object) -> None:
    try:
        print(what, flush=True)
    except OSError:  # a script that does not read it
        discard_stdout()


def _describe(uri: URI) -> str:
    export = uri.export or "The default export"
    return one_line(f"{export} on {uri.host or uri.address}", notice.MAX_TEXT)


def _xdg_open(folder: Path) -> None:
    """Show the folder without the session's bus. The file manager may become a child that outlives this program."""
    failed = NbddError(f"The disk is mounted at {folder}, but no file manager could be opened.")
    program = shutil.which("xdg-open")
    if program is None:
        raise failed
    process = subprocess.Popen([program, folder], stdin=subprocess.DEVNULL, start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.wait(_OPENER_SECONDS):
            raise failed


async def _session(stack: contextlib.AsyncExitStack) -> CallerBus | None:
    try:
        return await stack.enter_async_context(session_bus())
    except NbddError:
        return None


async def run(uri: str | None, target: str | None) -> int:
    """Open a link or, with `target`, detach; 0 done, 1 failed."""
    async with contextlib.AsyncExitStack() as stack:
        session = await _session(stack)
        feedback = Feedback(session)
        try:
            if target is not None:
                await detach(target, feedback)
            else:
                await open_link(uri or "", feedback, session)
        except NbddError as problem:
            sentence = one_line(str(problem), notice.MAX_TEXT)
            log.error("nbdd-open: %s", sentence)
            doing = "be detached" if target is not None else "be opened"
            await feedback.notify(f"The network disk can't {doing}", sentence, "dialog-error")
            return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run nbdd-open; 0 done, 1 failed, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="nbdd-open",
        description="Attach the disk that an nbd:// link names, mount it and show it in the file manager.",
        usage="nbdd-open URI\n       nbdd-open --detach [NAME|URI|NODE|FOLDER]",
    )
    parser.add_argument("--version", action="version", version=f"nbdd-open {__version__}")
    parser.add_argument(
        "--detach",
        action="store_true",
        help="unmount and detach; without a name, all disks that you attached",
    )
    parser.add_argument("what", nargs="?", metavar="URI", help="an NBD URI, such as nbd://storage.example/photos")
    given = parser.parse_args(arguments)
    if given.what is None and not given.detach:
        parser.error("give it an NBD URI, such as nbd://storage.example/photos")
    if given.what == "":
        parser.error("the name is empty")  # from an unset variable; it must not mean all disks
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    uri, target = (None, given.what or "") if given.detach else (given.what, None)
    try:
        return asyncio.run(run(uri, target))
    except KeyboardInterrupt:
        log.error("nbdd-open: Stopped waiting; nbdd goes on with what it was asked for.")
        return INTERRUPTED
