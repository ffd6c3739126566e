# SPDX-License-Identifier: MIT
"""An offer: one errand that gives the kernel links, and our hold of those, whatever becomes of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from nbdd.ipc.channel import Message
from nbdd.ipc.poller import Loop
from nbdd.worker.child import Errand, Job, Tell


class Offer:
    """The errand, and the links that it has told of; they are the owner's to take out of `links` when it is done."""

    def __init__(
        self, loop: Loop, name: str, job: Job, *, heard: Tell, done: Callable[[Offer, Message | None], None]
    ) -> None:
        """Send it; raises WorkerFailed. `heard` gets all but the links; `done` the answer, or None where it is lost."""
        self.links: list[int] = []
        self.unsure = False
        """Whether the kernel is offered more than it may need, and does not say what it took."""
        self.offered: Callable[[Message], None] | None = None
        """What to do as soon as links are offered, before the kernel gets them; takes what the server said of the
        export."""
        self.linked: Callable[[str], None] | None = None
        """What to do when the kernel has them, although the errand goes on; takes the URI of their server."""
        self._heard = heard
        self._abandoned = False
        self._errand = Errand(loop, name, job, heard=self._told, done=lambda answer, _fds: done(self, answer))

    def kill(self) -> None:
        """End the errand; `done` is called."""
        self._errand.kill()

    def abandon(self) -> None:
        """Make sure that no link comes of it: nobody knows whether the kernel has taken one."""
        self._abandoned = True
        self._errand.kill()
        self._shut_down()

    def let_go(self) -> None:
        """Close our copies."""
        while self.links:
            os.close(self.links.pop())

    def _told(self, message: Message, fds: Sequence[int]) -> None:
        match message["event"]:
            case "offered":
                self.links += fds
                if self._abandoned:
                    self._shut_down()
                elif self.offered is not None:
                    self.offered(message["export"])
            case "linked":
                if self.linked is not None and not self._abandoned:
                    self.linked(message["uri"])
            case _:
                self._heard(message, fds)

    def _shut_down(self) -> None:
        while self.links:
            with socket.socket(fileno=self.links.pop()) as sock, suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
