# SPDX-License-Identifier: MIT
"""Child tasks: processes of a worker that do one long or heavy job each, report the result, and end.

A fork shares its parent's memory until either of them touches it. Connecting, negotiating and speaking to the kernel
touch much of it. Done in a child they leave the worker, which lives as long as its device, as small as it was. The
child may block, and its worker takes every order meanwhile.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from nbdd.errors import NbddError, WorkerFailed
from nbdd.ipc.channel import Channel, Message
from nbdd.ipc.poller import Poller
from nbdd.ipc.processes import die_at_end_of, set_title

Answer = tuple[Message, Sequence[socket.socket]]
"""What a job comes to, and the sockets that go with it."""

Report = Callable[[Message, Sequence[int]], None]
"""Takes a message and its descriptors; in the worker the callee closes them. In the child it returns when the
worker has read the message and done what follows from it."""

Job = Callable[[Report], Answer]
"""What the child does; it may report things before it is done. An NbddError that it raises is its answer."""

Done = Callable[[Message | None, list[int]], None]
"""Takes the answer with its descriptors, or None if the child ended without one."""


class ChildTask:
    """One child and its job. `on_progress` gets what it reports on the way; `done` is called once, by the poller.

    The child never outlives its worker: the kernel kills it when the worker ends, whatever ends it.
    """

    def __init__(self, poller: Poller, name: str, job: Job, *, on_progress: Report, done: Done) -> None:
        """Start it; raises WorkerFailed if no process can be had. `name` is shown by ``ps -o comm``."""
        self._poller = poller
        self._on_progress = on_progress
        self._done: Done | None = done
        try:
            # None once it is reaped: from then on another process may have the number.
            self._pid: int | None
            self._pid, self._channel, self._lifeline = _fork(poller, name, job)
        except OSError as error:
            raise WorkerFailed(f"No process could be started for {name!r}: {error.strerror}.") from None
        poller.register(self._channel.fileno(), select.POLLIN, self._readable)

    def kill(self) -> None:
        """Kill it if it has not ended. What it has reported by then is still passed on; then `done` is called."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)

    def _readable(self, _events: int) -> None:
        if not self._channel.receive():
            self._ended()
            return
        while (found := self._channel.pop()) is not None:
            message, fds = found
            if "answer" in message:
                self._finish(message["answer"], fds)
            else:
                self._on_progress(message, fds)
                with suppress(OSError):
                    self._channel.send({})

    def _ended(self) -> None:
        self._poller.unregister(self._channel.fileno())
        self._channel.close()
        os.close(self._lifeline)
        if self._pid is not None:
            # Its descriptors are closed, so it is as good as dead, and this is no waiting.
            os.waitpid(self._pid, 0)
            self._pid = None
        self._finish(None, [])

    def _finish(self, answer: Message | None, fds: list[int]) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(answer, fds)


def _fork(poller: Poller, name: str, job: Job) -> tuple[int, Channel, int]:
    """The child's process id, our end of its channel, and the descriptor whose end kills it."""
    ours, theirs = Channel.pair()
    with theirs:
        try:
            watched, lifeline = os.pipe()
            try:
                pid = os.fork()
                if pid == 0:
                    ours.close()
                    _run_child(poller, Channel(theirs), (watched, lifeline), name, job)
            except OSError:
                os.close(lifeline)
                raise
            finally:
                os.close(watched)
        except OSError:
            ours.close()
            raise
    return pid, Channel(ours), lifeline


def _run_child(poller: Poller, channel: Channel, life: tuple[int, int], name: str, job: Job) -> None:
    """Run the job in the child; never returns."""
    code = 1
    try:
        set_title(f"task:{name}")
        watched, lifeline = life
        os.close(lifeline)
        die_at_end_of(watched)
        # The manager takes a worker for dead when its channel closes, so no other process may hold that open.
        for fd in poller:
            os.close(fd)

        def report(message: Message, fds: Sequence[int]) -> None:
            channel.send(message, fds)
            if channel.wait() is None:
                raise BrokenPipeError

        try:
            answer, sockets = job(report)
        except NbddError as error:
            answer, sockets = error.to_wire(), ()
        channel.send({"answer": answer}, [sock.fileno() for sock in sockets])
        code = 0
    except BrokenPipeError:
        code = 0  # The worker does not want the answer any more.
    except BaseException:  # noqa: BLE001 - the last word of a process
        traceback.print_exc(file=sys.stderr)
    finally:
        # Whatever happened: never back into the worker's code, of which this is a copy.
        os._exit(code)
