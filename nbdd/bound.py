# SPDX-License-Identifier: MIT
"""A bound device as its worker knows it: what it is, its links, and how they are mended when they die."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from nbdd.channel import Message
from nbdd.client import Client
from nbdd.errand import Errand
from nbdd.errors import ConnectFailed, NotAttached, WorkerFailed
from nbdd.jobs import Task, mend
from nbdd.kernel import LinkDeadMonitor
from nbdd.link import why_ended
from nbdd.loop import Loop

MEND_WAITS = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Seconds before each attempt to mend; the last one repeats."""

MEND_DEADLINE = 30.0
"""Seconds after which an errand that mends counts as hung. Its own deadlines end sooner."""

Report = Callable[[Message, Sequence[int]], None]
"""Takes what the manager is to know about the links, and those that live."""


class Bound:
    """The device, from the kernel's binding to the detach. All it needs to know is in the notes (see `nbdd.jobs`):
    nothing else may ever be bound in its place, and the manager keeps a copy for the worker's successor.

    The kernel holds the links; ours are duplicates, to see them end and to shut them down.
    """

    def __init__(
        self, loop: Loop, name: str, *, definition: Message, notes: Message, links: list[int], report: Report
    ) -> None:
        self.notes = notes
        self.definition = definition
        self.links = links
        self._loop = loop
        self._name = name
        self._report_to = report
        self._mends = 0
        self._attempt: _Attempt | None = None
        # When to mend, or to give the attempt under way up, monotonic.
        self.due: float | None = None
        # Set while the links are the kernel's alone: after a start that found none kept. Then the kernel's reports are
        # all there is to watch, and for what died unseen it is offered a new link.
        self._reports: LinkDeadMonitor | None = None
        if not links and notes["live"]:
            with Client(name) as client:
                self._reports = client.link_dead()
        self.resume()

    def rest(self) -> None:
        """Look no longer after the links: somebody detaches the device, and they die on purpose."""
        for fd in self.links:
            self._loop.forget(fd)
        if self._reports is not None:
            self._loop.forget(self._reports.fileno())
        attempt, self._attempt = self._attempt, None
        self.due = None
        if attempt is not None:
            attempt.abandon()

    def resume(self) -> None:
        """Look after the links, again; one that died meanwhile is seen by the next poll."""
        for fd in self.links:
            self._watch(fd)
        if self._reports is not None:
            self._loop.watch(self._reports.fileno(), select.POLLIN, self._reported)
        if self._missing or self._reports is not None:
            self.due = time.monotonic()

    def close(self) -> None:
        """Let go of a device that is no more, after `rest`."""
        for fd in self.links:
            os.close(fd)
        if self._reports is not None:
            self._reports.close()

    def tick(self) -> None:
        """Do what is due by now."""
        if self.due is None or time.monotonic() < self.due:
            return
        self.due = None
        if self._attempt is not None:
            self._attempt.errand.kill()
        else:
            self._mend()

    @property
    def _missing(self) -> int:
        return int(self.notes["connections"] - self.notes["live"])

    def _watch(self, fd: int) -> None:
        # No POLLIN: what arrives is the kernel driver's to read. Only the end of the link is ours to see.
        self._loop.watch(fd, select.POLLRDHUP, partial(self._link_died, fd))

    def _link_died(self, fd: int, _events: int) -> None:
        self._loop.forget(fd)
        self.links.remove(fd)
        with socket.socket(fileno=fd) as sock:
            self._lost(1, why_ended(sock))

    def _lost(self, count: int, why: str) -> None:
        self.notes["live"] = max(0, self.notes["live"] - count)
        self._mends = 0
        if self._attempt is None:
            self.due = time.monotonic()
        self._report(ConnectFailed(f"A connection to {self.notes['uri']} ended: {why}.").to_wire())

    def _reported(self, _events: int) -> None:
        """The kernel says that links died, of this device or of others."""
        died = self._reports.read().count(self.notes["index"]) if self._reports is not None else 0
        if died:
            self._lost(died, "the kernel lost it, and nobody here held it to see why")

    # Mending

    def _mend(self) -> None:
        """Send for new links in place of the dead ones."""
        missing = self._missing
        # Blind, with none known to be dead: the kernel takes what we offer in place of a dead one, or drops it unseen.
        offer = self._reports is not None and missing == 0
        job = partial(mend, Task({"missing": missing or 1}, self._name, self.definition, self.notes, ()))
        attempt = _Attempt()
        done = partial(self._tried, attempt, offer)
        try:
            attempt.errand = Errand(self._loop, self._name, job, heard=attempt.heard, done=done)
        except WorkerFailed as error:
            self._not_mended(error.to_wire())
            return
        self._attempt = attempt
        self.due = time.monotonic() + MEND_DEADLINE

    def _tried(self, attempt: _Attempt, offer: bool, answer: Message | None, _fds: list[int]) -> None:
        if attempt is not self._attempt:
            return
        self._attempt = None
        # More may have died meanwhile.
        self.due = time.monotonic() if self._missing else None
        if answer is None:
            answer = WorkerFailed(f"The process that mends the links of {self._name!r} was lost.").to_wire()
        if "error" in answer:
            attempt.abandon()
            self._not_mended(answer)
        elif offer:
            # Ours alone, or the kernel's alone: it did not say.
            attempt.let_go()
        else:
            self._mended(attempt.offered, answer["uri"])

    def _not_mended(self, error: Message) -> None:
        if error["error"] == NotAttached.__name__:
            # Somebody else ended the device: go, and the next worker finds out.
            raise SystemExit(0)
        self._mends += 1
        self.due = time.monotonic() + MEND_WAITS[min(self._mends, len(MEND_WAITS) - 1)]
        self._report(error)

    def _mended(self, links: list[int], uri: str) -> None:
        for fd in links:
            self._watch(fd)
        self.links += links
        self.notes["live"] += len(links)
        self.notes["reconnects"] += len(links)
        self.notes["uri"] = uri
        if self._reports is not None and len(self.links) >= self.notes["connections"]:
            self._loop.forget(self._reports.fileno())
            self._reports.close()
            self._reports = None
        self._mends = 0
        self.due = time.monotonic() if self._missing else None
        self._report({})

    def _report(self, error: Message) -> None:
        fields = {key: self.notes[key] for key in ("live", "reconnects", "uri")}
        self._report_to({"event": "links", **fields, **error}, self.links)


class _Attempt:
    """One errand that mends, and the links that it has offered to the kernel."""

    errand: Errand

    def __init__(self) -> None:
        self.offered: list[int] = []
        self._abandoned = False

    def heard(self, _message: Message, fds: Sequence[int]) -> None:
        """It offers links; nothing else is said on the way."""
        self.offered += fds
        if self._abandoned:
            self._shut_down()

    def abandon(self) -> None:
        """Make sure that no link comes of it: nobody knows whether the kernel has taken one."""
        self._abandoned = True
        self.errand.kill()
        self._shut_down()

    def let_go(self) -> None:
        """Close our copies."""
        while self.offered:
            os.close(self.offered.pop())

    def _shut_down(self) -> None:
        while self.offered:
            with socket.socket(fileno=self.offered.pop()) as sock, suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
