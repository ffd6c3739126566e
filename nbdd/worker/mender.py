# SPDX-License-Identifier: MIT
"""The mender of an attached device: gives the kernel new connections for dead ones, and ends the waiting if none comes.

What happens to the device in each phase:

    phase        a connection dies    the child answers               its time is over   the dead timeout is over
    WATCHING     MENDING at once      -                               MENDING            FAILING
    MENDING      after the answer     WATCHING, or again in a moment  the child is       FAILING, unless the kernel may
    FAILING      after the answer     WATCHING, mend at once          killed, which is   have new connections: looked at
    EXCHANGING   after the answer     WATCHING, mend what is dead     its answer         nothing: a moment of our own
    PAUSED       is not seen          - (the child is cancelled)      -                  nothing

The order of events is the same for all: a child opens connections and reports them ("offered", see replacement.py), the
kernel gets them, the child answers, and only then are they watched and counted. If a child is lost in between, the
connections that it reported are shut down, so that the kernel has none that is not known.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Protocol

from nbdd.config.definition import Definition
from nbdd.errors import NotAttached, TimedOut, WorkerFailed
from nbdd.ipc.channel import Message
from nbdd.ipc.poller import Poller
from nbdd.protocol import Export
from nbdd.worker.binding import Binding
from nbdd.worker.child import Job, Report
from nbdd.worker.error_server import ErrorServer
from nbdd.worker.handover import Handover
from nbdd.worker.replacement import mend, serve_errors
from nbdd.worker.request import Operation, Request

MEND_WAITS = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Seconds before each attempt to mend; the last one repeats. Up to a third more: see `_jittered`."""

MEND_DEADLINE = 30.0
"""Seconds after which a child that mends counts as hung. Its own deadlines end sooner."""

EXCHANGE_DEADLINE = 28.0
"""The same for a child that exchanges connections: sooner than the manager takes the worker for hung."""

WARN_SECONDS = 60.0
"""How long before the end of the dead timeout a warning is logged; half of the dead timeout if that is shorter."""

END_EARLY = 0.5
"""How much before the dead timeout is over the waiting is ended: the kernel looks after what was under way when the
connection died only up to two seconds later."""

ERROR_SERVER_WAIT = 1.0
"""Seconds before another attempt to end the waiting, if one failed."""


class Phase(Enum):
    """What is under way for the device; a child in MENDING, FAILING and EXCHANGING."""

    WATCHING = "watching"
    MENDING = "mending"
    FAILING = "giving the kernel an error server"
    EXCHANGING = "exchanging"
    PAUSED = "paused"


class Mended(Protocol):
    """What a `Mender` needs of the device; `worker.attached.AttachedDevice` is one."""

    name: str
    definition: Definition

    @property
    def binding(self) -> Binding:
        """What the device is now."""

    @property
    def has_unknown_connections(self) -> bool:
        """Whether the kernel may have connections that this process knows nothing of."""

    def report(self, error: Message) -> None:
        """Report the state of the connections to the manager, and what went wrong; {} if nothing did."""

    def add_connections(self, sockets: list[int], number: int, uri: str) -> None:
        """Count that many connections more to that server, and watch these sockets of them."""

    def shut_down_connections(self, export: Export) -> None:
        """End all connections, as others to that export take their place."""

    def set_size(self, size: int) -> None:
        """Note that the device has so many bytes now."""

    def expect_deaths(self, number: int) -> None:
        """Expect so many more reports of dead connections that are no loss."""


class Mender:
    """Decides what is done about the connections of one device, one child at a time."""

    def __init__(self, poller: Poller, device: Mended, on_progress: Report) -> None:
        """It begins PAUSED. `on_progress` gets what children report for the manager."""
        self._poller = poller
        self._device = device
        self._on_progress = on_progress
        self._phase = Phase.PAUSED
        self._handover: Handover | None = None
        # How many attempts in a row failed.
        self._attempts = 0
        # Whether the kernel may have connections that we do not know, or lack some that we count. Then it is offered as
        # many as there can be: it drops those that it does not need, without an error.
        self._kernel_state_unknown = device.has_unknown_connections
        # When to mend, or to kill the child under way; when to warn of the end of the dead timeout, or to see to it.
        # Monotonic.
        self._mend_due: float | None = None
        self._end_due: float | None = None
        self._error_server: ErrorServer | None = None

    @property
    def failing(self) -> bool:
        """Whether I/O fails until a server is back."""
        return self._error_server is not None

    @property
    def due(self) -> float | None:
        """When to call `tick` again, monotonic; None while there is nothing to wait for."""
        return min((due for due in (self._mend_due, self._end_due) if due is not None), default=None)

    def _enter(self, phase: Phase, handover: Handover | None = None) -> None:
        """Change the phase; nothing else does."""
        self._phase = phase
        self._handover = handover

    # What happens to it

    def pause(self) -> None:
        """Do nothing until `resume`; a child under way is cancelled."""
        self._mend_due = self._end_due = None
        self._cancel()
        self._enter(Phase.PAUSED)

    def resume(self) -> None:
        """Mend what is dead."""
        self._enter(Phase.WATCHING)
        if self._device.binding.missing or self._kernel_state_unknown:
            self._mend_due = time.monotonic()
        self.check_dead_timeout()

    def close(self) -> None:
        """Close what is ours, after `pause`."""
        if self._error_server is not None:
            self._error_server.close()

    def connection_died(self) -> None:
        """A connection died, and is counted and reported."""
        self._attempts = 0
        if self._phase is Phase.WATCHING:
            self._mend_due = time.monotonic()
        # Else the answer of the child is followed by another attempt.
        self.check_dead_timeout()

    def kernel_reported_death(self) -> None:
        """A connection died that only the kernel has."""
        # Before or after the kernel got what it is being offered? Offer again.
        offered = self._handover is not None and self._handover.unsure
        self._kernel_state_unknown = self._kernel_state_unknown or offered

    def tick(self) -> None:
        """Do what is due by now."""
        now = time.monotonic()
        if self._end_due is not None and self._end_due <= now:
            self.check_dead_timeout()
        if self._mend_due is not None and self._mend_due <= now:
            self._mend_due = None
            if self._handover is not None:
                # The child hangs. Its end is its answer.
                self._handover.kill()
            else:
                self._mend()

    # Children

    def _start(self, phase: Phase, job: Job, answered: Callable[[Handover, Message | None], None]) -> Handover:
        """Start a child, and enter the phase; `answered` is called in WATCHING, unless the child is cancelled.

        Raises WorkerFailed.
        """

        def done(handover: Handover, answer: Message | None) -> None:
            if handover is self._handover:
                self._enter(Phase.WATCHING)
                answered(handover, answer)

        handover = Handover(self._poller, self._device.name, job, on_progress=self._on_progress, done=done)
        self._enter(phase, handover)
        return handover

    @contextmanager
    def _request(self, order: Message) -> Iterator[Request]:
        """A request to a child that gives the kernel connections, and so may have to remove the error server first."""
        # A duplicate, as a child closes what the poller watches.
        sockets = [os.dup(self._error_server.fileno())] if self._error_server is not None else []
        try:
            yield Request(order, self._device.name, self._device.definition, self._device.binding, sockets)
        finally:
            for fd in sockets:
                os.close(fd)

    def _cancel(self) -> None:
        """Cancel the child under way, if there is one."""
        handover = self._handover
        if handover is not None:
            self._enter(Phase.WATCHING)
            self._doubt(handover)
            handover.cancel()

    def _doubt(self, handover: Handover) -> None:
        """The kernel may have had a connection of a cancelled handover, whose death then counts like any other's."""
        unknown = handover.unsure or self._device.has_unknown_connections
        self._kernel_state_unknown = self._kernel_state_unknown or unknown

    def _stop_if_gone(self, error: Message) -> bool:
        """If another program ended the device, end this process; the next worker finds out what there is."""
        if error["error"] != NotAttached.__name__:
            return False
        self._poller.stop(0)
        return True

    # Mending

    def _mend(self) -> None:
        """Give the kernel new connections in place of the dead ones."""
        unknown, self._kernel_state_unknown = self._kernel_state_unknown, False
        binding = self._device.binding
        try:
            with self._request({"missing": binding.connections if unknown else binding.missing}) as request:
                self._start(Phase.MENDING, partial(mend, request), self._mend_answered).unsure = unknown
        except WorkerFailed as error:
            self._kernel_state_unknown = unknown
            self._not_mended(error.to_wire())
        else:
            self._mend_due = time.monotonic() + MEND_DEADLINE

    def _mend_answered(self, handover: Handover, answer: Message | None) -> None:
        if answer is None:
            lost = f"The process that mends the connections of {self._device.name!r} was lost."
            answer = WorkerFailed(lost).to_wire()
        if "error" in answer:
            handover.cancel()
            self._doubt(handover)
            self._not_mended(answer)
            return
        if handover.unsure:
            # Which of them the kernel took it does not say. But now it has as many as there can be.
            handover.close()
            if not self._kernel_state_unknown:
                self._mended([], self._device.binding.missing, answer["uri"])
        else:
            self._mended(handover.sockets, len(handover.sockets), answer["uri"])
        # More may have died meanwhile.
        self._mend_due = self._due_if_missing()

    def _not_mended(self, error: Message) -> None:
        if self._stop_if_gone(error):
            return
        self._attempts += 1
        self._mend_due = time.monotonic() + _jittered(MEND_WAITS[min(self._attempts, len(MEND_WAITS) - 1)])
        self._device.report(error)

    def _due_if_missing(self) -> float | None:
        """Now if connections are missing, or may be; a device that has them all is not mended."""
        return time.monotonic() if self._device.binding.missing or self._kernel_state_unknown else None

    def _mended(self, sockets: list[int], number: int, uri: str) -> None:
        """The kernel has that many connections more; `sockets` are those of them that are ours to watch."""
        self._device.add_connections(sockets, number, uri)
        self._end_due = None
        self._attempts = 0
        self._device.report({})

    # An exchange of all connections, as ordered

    def exchange(self, operation: Operation, order: Message, done: Callable[[Message], None]) -> None:
        """See `AttachedDevice.replace_connections`."""
        self._cancel()
        self._mend_due = self._due_if_missing()
        try:
            with self._request(order) as request:
                answered = partial(self._exchange_answered, done)
                handover = self._start(Phase.EXCHANGING, partial(operation, request), answered)
        except WorkerFailed:
            self.check_dead_timeout()
            raise
        handover.on_offered = self._exchange_offered
        handover.on_taken = partial(self._exchange_taken, handover)
        self._mend_due = time.monotonic() + EXCHANGE_DEADLINE

    def _exchange_offered(self, export: Message) -> None:
        """New connections are open: end the old ones. The kernel gets the new ones when it has seen those die."""
        self._device.shut_down_connections(Export.from_wire(export))

    def _exchange_taken(self, handover: Handover, uri: str) -> None:
        """The kernel has them: from here on they are watched, whatever becomes of the child."""
        sockets, handover.sockets = handover.sockets, []
        self._mended(sockets, len(sockets), uri)

    def _exchange_answered(self, done: Callable[[Message], None], handover: Handover, answer: Message | None) -> None:
        if answer is None:
            lost = f"The process that exchanged the connections of {self._device.name!r} was lost."
            answer = WorkerFailed(lost).to_wire()
        if "error" in answer:
            handover.cancel()
            if self._device.binding.missing:
                self._device.report(answer)
        elif "size" in answer:
            self._device.set_size(answer["size"])
        self._mend_due = time.monotonic() if self._device.binding.missing else None
        self.check_dead_timeout()
        done(answer)

    # The end of the dead timeout

    def check_dead_timeout(self) -> None:
        """Warn of the end of the dead timeout, and see to it: only the kernel's newer requests end by themselves."""
        lost, timeout = self._device.binding.lost, self._device.definition.dead_timeout
        self._end_due = None
        if not lost or self._phase in (Phase.PAUSED, Phase.EXCHANGING) or self.failing:
            return
        now, end = time.monotonic(), lost + timeout - END_EARLY
        warn = end - min(WARN_SECONDS, timeout / 2)
        if now < warn:
            self._end_due = warn
        elif now < end:
            self._end_due = end
            message = f"no server answers; reads and writes that wait fail in {round(end - now)} s"
            self._on_progress({"event": "warning", "message": message}, ())
        elif self._handover is not None and self._handover.sockets:
            # The kernel may have them already: what comes of that is known in a moment.
            self._end_due = now + ERROR_SERVER_WAIT
        else:
            self._cancel()
            self._fail_io()

    def _fail_io(self) -> None:
        """Fail all that waits, and all that comes, until there is a server again."""
        ours, theirs = socket.socketpair()
        try:
            device = self._device
            request = Request({}, device.name, device.definition, device.binding, [theirs.fileno()])
            handover = self._start(Phase.FAILING, partial(serve_errors, request), self._error_server_answered)
            handover.sockets.append(ours.detach())
            self._mend_due = time.monotonic() + MEND_DEADLINE
        except WorkerFailed as error:
            self._no_error_server(error.to_wire())
        finally:
            ours.close()
            theirs.close()

    def _error_server_answered(self, handover: Handover, answer: Message | None) -> None:
        self._mend_due = time.monotonic()
        if answer is None or "error" in answer:
            handover.cancel()
            lost = WorkerFailed(f"The process that ends the waiting for {self._device.name!r} was lost.")
            self._no_error_server(answer or lost.to_wire())
            return
        self._error_server = ErrorServer(
            self._poller, socket.socket(fileno=handover.sockets.pop()), self._error_server_closed
        )
        self._device.expect_deaths(1)
        timeout = self._device.definition.dead_timeout
        why = f"No server came back within {timeout} s: reads and writes fail until one does."
        self._device.report(TimedOut(why).to_wire())

    def _no_error_server(self, error: Message) -> None:
        if self._stop_if_gone(error):
            return
        self._end_due = time.monotonic() + ERROR_SERVER_WAIT
        self._device.report(error)

    def _error_server_closed(self) -> None:
        """It was removed for a connection; or the kernel did not take it, as it has no dead one to replace."""
        self._error_server = None
        # It is never removed before the connections for its place are reported.
        removed = self._handover is not None and self._handover.sockets
        if self._phase is Phase.PAUSED or removed or not self._device.binding.lost:
            return
        self._device.expect_deaths(-1)
        if not self._device.has_unknown_connections:
            # A connection may be just dying, and we saw that before the kernel.
            self._end_due = time.monotonic() + ERROR_SERVER_WAIT
        else:
            # Our predecessor gave it connections, and could not report them any more. The kernel reports their death.
            self._mended([], self._device.binding.missing, self._device.binding.uri)


def _jittered(seconds: float) -> float:
    """Up to a third more, at random: a hundred devices of one server must not all come back in the same moment."""
    return seconds * (1 + os.urandom(1)[0] / 768)
