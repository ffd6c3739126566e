# SPDX-License-Identifier: MIT
"""A bound device as its worker knows it: its links, how they are mended when they die, and the end of the waiting."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from nbdd.errors import Busy, ConnectFailed, NotAttached, TimedOut, WorkerFailed
from nbdd.ipc.channel import Message
from nbdd.ipc.poller import Loop
from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.sockets import dead
from nbdd.protocol import Export
from nbdd.server.connections import disconnect_reason
from nbdd.worker.binding import Binding
from nbdd.worker.child import Job
from nbdd.worker.error_server import Refuser
from nbdd.worker.handover import Offer
from nbdd.worker.operations import RENEWALS, Task, mend, refuse

MEND_WAITS = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Seconds before each attempt to mend; the last one repeats. Up to a third more: see `_jittered`."""

MEND_DEADLINE = 30.0
"""Seconds after which an errand that mends counts as hung. Its own deadlines end sooner."""

WARN_SECONDS = 60.0
"""How long before the dead timeout is over it is warned of; half of it where it is short."""

RENEW_DEADLINE = 28.0
"""Seconds after which an errand that exchanges links counts as hung: before the manager takes us for that."""

END_EARLY = 0.5
"""How much before the dead timeout is over the waiting is ended: what was under way when the link died hears of it when
the kernel looks after it, up to two seconds later."""

REFUSE_WAIT = 1.0
"""Seconds before another attempt to end the waiting, where one failed."""

Report = Callable[[Message, Sequence[int]], None]
"""Takes what the manager is to know about the links, and those that live."""


class Bound:
    """The device, from the kernel's binding to the detach. All it needs to know of it is in the binding,
    of which the manager keeps a copy for the worker's successor.

    The kernel holds the links; ours are duplicates, to see them end and to shut them down.
    """

    def __init__(
        self, loop: Loop, name: str, *, definition: Message, binding: Binding, links: list[int], report: Report
    ) -> None:
        self.binding = binding
        self.definition = definition
        self.links = links
        self._loop = loop
        self._name = name
        self._report_to = report
        self._mends = 0
        self._offer: Offer | None = None
        # When to mend, or to give the attempt under way up; and when to warn of the end of the dead timeout, or to see
        # to it. Monotonic.
        self._mend_due: float | None = None
        self._end_due: float | None = None
        self._refuser: Refuser | None = None
        # Refusers that the kernel has, or had, and whose death it has not reported yet: none of them is a loss.
        self._refusers = 0
        self._resting = True
        self._renewing = False
        # Where links died unseen, or were kept by nobody, our predecessor may have given the kernel others, and be dead
        # before it could tell. Then the kernel's own reports count, and it is offered as many new links as there can
        # be: those that it needs not it drops, without a word.
        self._reports: LinkDeadMonitor | None = None
        self._unseen: set[int] = set()
        if len(links) < binding.connections or any(map(dead, links)):
            with KernelDevice(name) as device:
                self._reports = device.watch_connections()
            self._unseen.update(filter(dead, links))
        self._unsure = self._reports is not None
        self.resume()

    @property
    def due(self) -> float | None:
        """When to call `tick` again, monotonic; None while there is nothing to wait for."""
        return min((due for due in (self._mend_due, self._end_due) if due is not None), default=None)

    def rest(self) -> None:
        """Look no longer after the links: somebody detaches the device, and they die on purpose."""
        self._resting = True
        for fd in self.links:
            self._loop.forget(fd)
        if self._reports is not None:
            self._loop.forget(self._reports.fileno())
        self._mend_due = self._end_due = None
        self._abandon()

    def resume(self) -> None:
        """Look after the links, again; one that died meanwhile is seen by the next poll."""
        self._resting = False
        for fd in self.links:
            self._watch(fd)
        if self._reports is not None:
            self._loop.watch(self._reports.fileno(), select.POLLIN, self._reported)
        if self._missing or self._unsure:
            self._mend_due = time.monotonic()
        self._count_down()

    def hasten(self, seconds: int) -> int:
        """Let I/O wait for `seconds` at most from now on, or from the death of the last link; returns the dead timeout.

        The kernel is not told: it ends the waiting when the refuser comes, however long it would have gone on.
        """
        lost = self.binding.lost
        waited = int(time.monotonic() - lost) if lost else 0
        self.definition["dead-timeout"] = min(self.definition["dead-timeout"], waited + seconds)
        self._count_down()
        return int(self.definition["dead-timeout"])

    def close(self) -> None:
        """Let go of a device that is no more, after `rest`."""
        for fd in self.links:
            os.close(fd)
        if self._reports is not None:
            self._reports.close()
        if self._refuser is not None:
            self._refuser.close()

    def tick(self) -> None:
        """Do what is due by now."""
        now = time.monotonic()
        if self._end_due is not None and self._end_due <= now:
            self._count_down()
        if self._mend_due is not None and self._mend_due <= now:
            self._mend_due = None
            if self._offer is not None:
                self._offer.kill()
            else:
                self._mend()

    @property
    def _missing(self) -> int:
        return self.binding.missing

    def _watch(self, fd: int) -> None:
        # No POLLIN: what arrives is the kernel driver's to read. Only the end of the link is ours to see.
        self._loop.watch(fd, select.POLLRDHUP, partial(self._link_died, fd))

    def _link_died(self, fd: int, _events: int) -> None:
        self._loop.forget(fd)
        self.links.remove(fd)
        with socket.socket(fileno=fd) as sock:
            # What the kernel reports counts once.
            if self._reports is None or fd in self._unseen:
                self._lost(1, disconnect_reason(sock))
        self._unseen.discard(fd)

    def _lost(self, count: int, why: str) -> None:
        self._change(live=max(0, self.binding.live - count))
        self._mends = 0
        if self._offer is None:
            self._mend_due = time.monotonic()
        if not self.binding.live:
            self._change(lost=self.binding.lost or time.monotonic())
        self._report(ConnectFailed(f"A connection to {self.binding.uri} ended: {why}.").to_wire())
        self._count_down()

    def _reported(self, _events: int) -> None:
        """The kernel says that links died, of this device or of others."""
        died = self._reports.read().count(self.binding.index) if self._reports is not None else 0
        forgiven = min(died, self._refusers)
        self._refusers -= forgiven
        died -= forgiven
        if died:
            # Before or after the kernel got what it is being offered? Offer again.
            self._unsure = self._unsure or (self._offer is not None and self._offer.unsure)
            self._lost(died, "the kernel lost it, and nobody here held it to see why")

    # Mending

    def _mend(self) -> None:
        """Send for new links in place of the dead ones."""
        unsure, self._unsure = self._unsure, False
        wanted = self.binding.connections if unsure else self._missing
        try:
            with self._task({"missing": wanted}) as task:
                self._send(partial(mend, task), self._tried).unsure = unsure
        except WorkerFailed as error:
            self._unsure = unsure
            self._not_mended(error.to_wire())
        else:
            self._mend_due = time.monotonic() + MEND_DEADLINE

    @contextmanager
    def _task(self, order: Message) -> Iterator[Task]:
        """A task for an errand that gives the kernel links, and so may have to withdraw the refuser first."""
        # A duplicate, as an errand closes what the loop watches.
        refusing = [os.dup(self._refuser.fileno())] if self._refuser is not None else []
        try:
            yield Task(order, self._name, self.definition, self.binding, refusing)
        finally:
            for fd in refusing:
                os.close(fd)

    def _send(self, job: Job, done: Callable[[Offer, Message | None], None]) -> Offer:
        """Send an errand that has to do with the links, one at a time: `done` is called unless it is abandoned."""

        def ended(offer: Offer, answer: Message | None) -> None:
            if offer is self._offer:
                self._offer = None
                done(offer, answer)

        self._offer = Offer(self._loop, self._name, job, heard=self._report_to, done=ended)
        return self._offer

    def _abandon(self) -> None:
        """Give up the attempt under way, if there is one."""
        offer, self._offer = self._offer, None
        if offer is not None:
            self._doubt(offer)
            offer.abandon()

    def _doubt(self, offer: Offer) -> None:
        """Of an offer that is given up, a link may have been the kernel's, whose death counts then like any other's."""
        self._unsure = self._unsure or offer.unsure or self._reports is not None

    def _tried(self, offer: Offer, answer: Message | None) -> None:
        if answer is None:
            answer = WorkerFailed(f"The process that mends the links of {self._name!r} was lost.").to_wire()
        if "error" in answer:
            offer.abandon()
            self._doubt(offer)
            self._not_mended(answer)
        elif offer.unsure:
            # The server's alone, or the kernel's alone: it did not say. But now it has as many as there can be.
            offer.let_go()
            if not self._unsure:
                self._mended([], self._missing, answer["uri"])
        else:
            self._mended(offer.links, len(offer.links), answer["uri"])
        # More may have died meanwhile.
        if "error" not in answer:
            self._mend_due = time.monotonic() if self._missing or self._unsure else None

    def _not_mended(self, error: Message) -> None:
        self._check_attached(error)
        self._mends += 1
        self._mend_due = time.monotonic() + _jittered(MEND_WAITS[min(self._mends, len(MEND_WAITS) - 1)])
        self._report(error)

    def _check_attached(self, error: Message) -> None:
        if error["error"] == NotAttached.__name__:
            # Somebody else ended the device: go, and the next worker finds out.
            raise SystemExit(0)

    def _mended(self, links: list[int], number: int, uri: str) -> None:
        """The kernel has so many links more; those of them that are ours to watch are given."""
        for fd in links:
            self._watch(fd)
        self.links += links
        live, reconnects = self.binding.live + number, self.binding.reconnects + number
        self._change(live=live, reconnects=reconnects, uri=uri, lost=0)
        self._end_due = None
        if self._reports is not None and len(self.links) >= self.binding.connections:
            self._loop.forget(self._reports.fileno())
            self._reports.close()
            self._reports = None
        self._mends = 0
        self._report({})

    # Renewal, as somebody asked for

    def renew(self, order: Message, done: Callable[[Message | None], None]) -> None:
        """Have all links exchanged for new ones, by the job of the order; `done` gets its answer.

        The old ones are shut down when the new ones are there, checked, and about to be the kernel's. Raises Busy where
        not all of the old ones are ours to shut down, WorkerFailed.
        """
        if self._reports is not None:
            raise Busy(
                f"Some links of {self._name!r} are the kernel's alone, since nbdd was stopped or lost a process, and "
                "can't be exchanged: detach the device and attach it again when nobody uses it."
            )
        self._mend_due = time.monotonic()
        self._abandon()
        try:
            with self._task(order) as task:
                offer = self._send(partial(RENEWALS[order["order"]], task), partial(self._renewed, done))
        except WorkerFailed:
            self._count_down()
            raise
        offer.offered, offer.linked = self._exchange, partial(self._exchanged, offer)
        self._renewing = True
        self._mend_due = time.monotonic() + RENEW_DEADLINE

    def _exchange(self, export: Message) -> None:
        """New links are there: end the old ones. Whoever comes after us knows by the report that they are gone."""
        self._change(export=Export.from_wire(export), live=0, lost=self.binding.lost or time.monotonic())
        old = self.links.copy()
        self.links.clear()
        self._report({})
        for fd in old:
            self._loop.forget(fd)
            with socket.socket(fileno=fd) as sock, suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _exchanged(self, offer: Offer, uri: str) -> None:
        """The kernel has them: from here on they are watched, whatever becomes of the rest of the errand."""
        links, offer.links = offer.links, []
        self._mended(links, len(links), uri)

    def _renewed(self, done: Callable[[Message | None], None], offer: Offer, answer: Message | None) -> None:
        self._renewing = False
        told = answer
        if told is None:
            told = WorkerFailed(f"The process that exchanged the links of {self._name!r} was lost.").to_wire()
        if "error" in told:
            offer.abandon()
            if self._missing:
                self._report(told)
        elif told.get("size", self.binding.size) != self.binding.size:
            self._change(size=told["size"])
            self._report({})
        self._mend_due = time.monotonic() if self._missing else None
        self._count_down()
        done(told)

    # Waiting

    @property
    def _ends_at(self) -> float | None:
        """When I/O has waited as long as it may, monotonic; None while there is a link."""
        return self.binding.lost + self.definition["dead-timeout"] - END_EARLY if self.binding.lost else None

    def _count_down(self) -> None:
        """Warn of the end of the dead timeout, and see to it: only the kernel's newer requests end by themselves."""
        end, self._end_due = self._ends_at, None
        if end is None or self._resting or self._renewing or self._refuser is not None:
            return
        now = time.monotonic()
        warn = end - min(WARN_SECONDS, self.definition["dead-timeout"] / 2)
        if now < warn:
            self._end_due = warn
        elif now < end:
            self._end_due = end
            message = f"no server answers; reads and writes that wait fail in {round(end - now)} s"
            self._report_to({"event": "warning", "message": message}, ())
        elif self._offer is not None and self._offer.links:
            # The kernel may have them already: what comes of that is known in a moment.
            self._end_due = now + REFUSE_WAIT
        else:
            self._abandon()
            self._refuse()

    def _refuse(self) -> None:
        """Fail all that waits, and all that comes, until there is a server again."""
        ours, theirs = socket.socketpair()
        try:
            task = Task({}, self._name, self.definition, self.binding, [theirs.fileno()])
            offer = self._send(partial(refuse, task), self._refused)
            offer.links.append(ours.detach())
            self._mend_due = time.monotonic() + MEND_DEADLINE
        except WorkerFailed as error:
            self._not_refused(error.to_wire())
        finally:
            ours.close()
            theirs.close()

    def _refused(self, offer: Offer, answer: Message | None) -> None:
        self._mend_due = time.monotonic()
        if answer is None or "error" in answer:
            offer.abandon()
            lost = WorkerFailed(f"The process that ends the waiting for {self._name!r} was lost.")
            self._not_refused(answer or lost.to_wire())
            return
        ours = socket.socket(fileno=offer.links.pop())
        self._refuser = Refuser(self._loop, ours, self._refuser_gone)
        self._refusers += 1
        why = f"No server came back within {self.definition['dead-timeout']} s: reads and writes fail until one does."
        self._report(TimedOut(why).to_wire())

    def _not_refused(self, error: Message) -> None:
        self._check_attached(error)
        self._end_due = time.monotonic() + REFUSE_WAIT
        self._report(error)

    def _refuser_gone(self) -> None:
        """It was withdrawn for a real link; or the kernel did not take it, since it has no dead one to replace."""
        self._refuser = None
        # Nothing is withdrawn before the links for its place are told.
        withdrawn = self._offer is not None and self._offer.links
        if self._resting or withdrawn or not self.binding.lost:
            return
        self._refusers -= 1
        if self._reports is None:
            # It may be just dying, and we were quicker to see that.
            self._end_due = time.monotonic() + REFUSE_WAIT
        else:
            # Our predecessor gave it links, and could not say so any more. Of their death the kernel will tell.
            self._mended([], self._missing, self.binding.uri)

    def _change(self, **changes: Any) -> None:
        self.binding = replace(self.binding, **changes)

    def _report(self, error: Message) -> None:
        state = self.binding.connection_state(failing=self._refuser is not None)
        self._report_to({"event": "links", **state.to_wire(), **error}, self.links)


def _jittered(seconds: float) -> float:
    """Up to a third more, by chance: a hundred devices of one server shall not all come back in the same moment."""
    return seconds * (1 + os.urandom(1)[0] / 768)
