# SPDX-License-Identifier: MIT
"""Poller: the event loop of a light process, one poll(2) with a callback for each descriptor."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator

Callback = Callable[[int], None]
"""Gets the events of its descriptor, as `select.poll` returns them."""


class Poller:
    """Calls the callback of a descriptor when something happens to it."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._callbacks: dict[int, Callback] = {}
        self.exit_code: int | None = None
        """What the process is to end with; None while it goes on."""

    def register(self, fd: int, events: int, callback: Callback) -> None:
        """Call `callback` whenever one of `events` happens to `fd`, and at the end of its stream in any case."""
        self._poll.register(fd, events)
        self._callbacks[fd] = callback

    def unregister(self, fd: int) -> None:
        """Watch it no longer; to be called before it is closed."""
        self._poll.unregister(fd)
        del self._callbacks[fd]

    def __iter__(self) -> Iterator[int]:
        """Every descriptor that is watched."""
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def stop(self, exit_code: int) -> None:
        """Call no callback any more; `exit_code` is for the code around the poller, which ends."""
        self.exit_code = exit_code

    def run_once(self, seconds: float | None) -> None:
        """Wait for events, that long at most (None is for ever), and call the callbacks."""
        ready = self._poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
        for callback, fd, events in [(self._callbacks[fd], fd, events) for fd, events in ready]:
            if self.exit_code is not None:
                return
            # A callback may have unregistered the next one, and its number may belong to another descriptor by now.
            if self._callbacks.get(fd) is callback:
                callback(events)
