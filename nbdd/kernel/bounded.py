# SPDX-License-Identifier: MIT
"""A call into the kernel that may never come back, made so that the caller does.

Opening a block device reads its partition table through the server, and a netlink command runs to its end inside
``sendmsg``: both wait in D state, which no signal and no time limit ends. So a thread makes the call, and the caller
waits for the thread as long as it wants to. A thread that is left behind ends when the call does, after a DISCONNECT at
the latest.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from nbdd.errors import KernelError, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

NUDGE_SECONDS = 2.0
"""How long a call may be stuck before `nudge` is called."""

INTERRUPT_SECONDS = 1.0
"""How long an interruption, such as Ctrl-C, is held back for the call to come to its end."""


class _Call(Generic[T]):
    """One call in one daemon thread; exactly one side, caller or thread, gets to keep the result."""

    def __init__(self, call: Callable[[], T], late: Callable[[T], None] | None) -> None:
        self._call = call
        self._late = late
        self._lock = threading.Lock()
        self.done = threading.Event()
        self._left = False
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            result = self._call()
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread
            self._error = error
            self.done.set()
            return
        with self._lock:
            self._results.append(result)
            left = self._left
            self.done.set()
        if left and self._late is not None:
            self._late(result)

    def wait(self, seconds: float) -> bool:
        if self.done.wait(max(seconds, 0.0)):
            return True
        with self._lock:
            self._left = not self.done.is_set()
        return not self._left

    def leave(self) -> None:
        """The caller has given up: pass a result to `late`, now or when it comes."""
        with self._lock:
            self._left = True
            left = list(self._results)
        if self._late is not None:
            for result in left:
                self._late(result)

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._results[0]


def _start(thread: threading.Thread) -> None:
    """Start it; raises KernelError if the system gives no thread."""
    try:
        thread.start()
    except RuntimeError:
        raise KernelError(
            "The system lets nbdd start no more threads; see TasksMax= in systemd.resource-control(5)."
        ) from None


def bounded(
    call: Callable[[], T],
    seconds: float,
    stuck: str,
    *,
    late: Callable[[T], None] | None = None,
    nudge: Callable[[], None] | None = None,
) -> T:
    """Return what `call` returns, or raise what it raises, or raise `TimedOut(stuck)` after `seconds`.

    `nudge` is called once, after `NUDGE_SECONDS`, to end a stuck call. `late` gets the result of a call that
    came back after the caller had given up, to undo it; it runs in the thread that was left behind.
    """
    work = _Call(call, late)
    thread = threading.Thread(target=work.run, name="nbdd-kernel", daemon=True)
    try:
        _start(thread)
        if nudge is not None and seconds > NUDGE_SECONDS:
            if not work.done.wait(NUDGE_SECONDS):
                nudge()
            seconds -= NUDGE_SECONDS
        in_time = work.wait(seconds)
    except BaseException as error:
        # The caller that cleans up must see what the call has done. A thread that could not be started does nothing.
        if thread.ident is not None or not isinstance(error, KernelError):
            work.done.wait(INTERRUPT_SECONDS)
        work.leave()
        raise
    if not in_time:
        raise TimedOut(stuck)
    # It has nothing left to do, and a process that forks next should have only one thread.
    thread.join()
    return work.result()
