# SPDX-License-Identifier: MIT
"""Handover: a child that gives the kernel connections, and our duplicates of them, whatever becomes of the child."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from nbdd.ipc.channel import Message
from nbdd.ipc.poller import Poller
from nbdd.worker.child import ChildTask, Job, Report


class Handover:
    """The child, and the connections that it has reported; the owner takes them out of `sockets` when it is done."""

    def __init__(
        self,
        poller: Poller,
        name: str,
        job: Job,
        *,
        on_progress: Report,
        done: Callable[[Handover, Message | None], None],
    ) -> None:
        """Start it; raises WorkerFailed.

        `on_progress` gets all but the connections; `done` gets the answer, or None if the child is lost.
        """
        self.sockets: list[int] = []
        self.unsure = False
        """Whether the kernel is offered more than it may need, and does not say what it took."""
        self.on_offered: Callable[[Message], None] | None = None
        """Called as soon as connections are open, before the kernel gets them, with what the server said of the
        export."""
        self.on_taken: Callable[[str], None] | None = None
        """Called when the kernel has them, although the child goes on, with the URI of their server."""
        self._on_progress = on_progress
        self._cancelled = False
        self._child = ChildTask(
            poller, name, job, on_progress=self._reported, done=lambda answer, _fds: done(self, answer)
        )

    def kill(self) -> None:
        """End the child; `done` is called."""
        self._child.kill()

    def cancel(self) -> None:
        """Make sure that no connection comes of it: whether the kernel has taken one is unknown."""
        self._cancelled = True
        self._child.kill()
        self._shut_down()

    def close(self) -> None:
        """Close our duplicates."""
        while self.sockets:
            os.close(self.sockets.pop())

    def _reported(self, message: Message, fds: Sequence[int]) -> None:
        match message["event"]:
            case "offered":
                self.sockets += fds
                if self._cancelled:
                    self._shut_down()
                elif self.on_offered is not None:
                    self.on_offered(message["export"])
            case "taken":
                if self.on_taken is not None and not self._cancelled:
                    self.on_taken(message["uri"])
            case _:
                self._on_progress(message, fds)

    def _shut_down(self) -> None:
        while self.sockets:
            with socket.socket(fileno=self.sockets.pop()) as sock, suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
