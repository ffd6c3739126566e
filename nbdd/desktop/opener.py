# SPDX-License-Identifier: MIT
"""nbdd-open: a click on an nbd:// link becomes a folder in the file manager, and goes again.

Where a person has no terminal before them, what went wrong is a notification; it is one sentence in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from nbdd import __version__
from nbdd.bus.caller.client import Client
from nbdd.bus.caller.connection import CallerBus, session_bus, system_bus
from nbdd.desktop import notice
from nbdd.desktop.disks import Disks, link, one_at_a_time
from nbdd.desktop.file_manager import show_folder
from nbdd.desktop.notifications import Notification, Notifications, NotShown
from nbdd.desktop.udisks import UDisks
from nbdd.errors import NbddError
from nbdd.text import one_line
from nbdd.uri import URI

PATIENCE = 1.5
"""Seconds after which a person begins to wonder whether the click was heard."""

_OPENER_SECONDS = 3.0
"""How long xdg-open may take to fail; one that runs longer is a file manager."""

INTERRUPTED = 128 + signal.SIGINT

log = logging.getLogger("nbdd-open")


class Voice:
    """How the person is spoken to: on the terminal, else by notifications, else not at all."""

    def __init__(self, session: CallerBus | None) -> None:
        self._shower = Notifications(session) if session is not None and not sys.stderr.isatty() else None
        self._number = 0

    async def say(self, summary: str, body: str, icon: str, *, lasting: bool = True) -> None:
        """Show a notification, in place of the one before."""
        await self.show(Notification(summary, body, icon, category="device", lasting=lasting))

    async def show(self, what: Notification) -> None:
        """The same, for what is made already."""
        if self._shower is not None:
            with contextlib.suppress(NotShown):
                self._number = await self._shower.show(what, self._number)

    @contextlib.asynccontextmanager
    async def waiting(self, summary: str, body: str) -> AsyncIterator[None]:
        """Say what is waited for, if that takes longer than a person expects."""
        over = asyncio.Event()

        async def later() -> None:
            try:
                async with asyncio.timeout(PATIENCE):
                    await over.wait()
            except TimeoutError:
                await self.say(summary, body, "network-server")

        task = asyncio.create_task(later())
        try:
            yield
        finally:
            over.set()
            # Of what is half said nobody would know the number, to take it away or put the next word in its place.
            await task

    async def hush(self) -> None:
        """Take the last notification away."""
        if self._shower is not None and self._number:
            await self._shower.close(self._number)


async def open_link(text: str, voice: Voice, session: CallerBus | None) -> None:
    """Attach what the link names, mount it, and show it in the file manager."""
    uri = link(text)
    async with (
        voice.waiting("Opening a network disk", f"{_what(uri)} is asked for."),
        one_at_a_time(),
        Client() as client,
        system_bus() as bus,
    ):
        disks = Disks(client, UDisks(bus))
        folder = await disks.mount(await disks.attach(uri))
    await voice.hush()
    _tell(folder)
    if session is None or not await show_folder(session, folder):
        await asyncio.to_thread(_xdg_open, folder)


async def detach(target: str, voice: Voice) -> None:
    """Unmount and detach what is meant by `target`: a name, a link, a node, a folder; "" is all that they attached."""
    # Of what is unmounted here, nbdd-notify shall not think that it was the file manager.
    async with one_at_a_time(), Client() as client, system_bus() as bus:
        disks = Disks(client, UDisks(bus))
        found = await disks.find(target)
        if not found:
            await voice.say("Nothing to detach", "No network disk is yours.", "drive-harddisk", lasting=False)
            _tell("Nothing to detach: no network disk is yours")
        for device in found:
            name = notice.title(device)
            async with voice.waiting(f"Detaching {name}", "What is not written yet is being written."):
                await disks.detach(device)
            await voice.show(notice.detached(device))
            _tell(f"{device.name} is detached")


def _tell(what: object) -> None:
    try:
        print(what, flush=True)
    except OSError:  # a script that does not want to know; Python would try again at our end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _what(uri: URI) -> str:
    export = uri.export or "The default export"
    return one_line(f"{export} on {uri.host or uri.address}", notice.MAX_TEXT)


def _xdg_open(folder: Path) -> None:
    """The same without the session's bus. A file manager may stay with us as a child; it is not waited for."""
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
        voice = Voice(session)
        try:
            if target is not None:
                await detach(target, voice)
            else:
                await open_link(uri or "", voice, session)
        except NbddError as problem:
            sentence = one_line(str(problem), notice.MAX_TEXT)
            log.error("nbdd-open: %s", sentence)
            doing = "be detached" if target is not None else "be opened"
            await voice.say(f"The network disk can't {doing}", sentence, "dialog-error")
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
        parser.error("the name is empty")  # of a variable that is not set; it must not mean all disks
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    uri, target = (None, given.what or "") if given.detach else (given.what, None)
    try:
        return asyncio.run(run(uri, target))
    except KeyboardInterrupt:
        log.error("nbdd-open: Stopped waiting; nbdd goes on with what it was asked for.")
        return INTERRUPTED
