# SPDX-License-Identifier: MIT
"""The loop of a light process: one poll, and who wants to hear of which descriptor."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator

Call = Callable[[int], None]
"""Gets the events of its descriptor, as `select.poll` tells them."""


class Loop:
    """Calls whoever watches a descriptor when something happens to it."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._calls: dict[int, Call] = {}

    def watch(self, fd: int, events: int, call: Call) -> None:
        """Call `call` whenever one of `events` happens to `fd`; the end of the stream is always told."""
        self._poll.register(fd, events)
        self._calls[fd] = call

    def forget(self, fd: int) -> None:
        """Watch it no longer; to be called before it is closed."""
        self._poll.unregister(fd)
        del self._calls[fd]

    def __iter__(self) -> Iterator[int]:
        """Every descriptor that is watched."""
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def turn(self, seconds: float | None) -> None:
        """Wait for news, that long at most (None is for ever), and call who watches."""
        news = self._poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
        for call, fd, events in [(self._calls[fd], fd, events) for fd, events in news]:
            # One call may end what the next was for, and the number may already be somebody else's.
            if self._calls.get(fd) is call:
                call(events)
