# SPDX-License-Identifier: MIT
"""Errands: children of a worker that do one long or heavy job each, tell what came of it, and end.

A fork shares its parent's memory until either of them touches it. Connecting, negotiating and speaking to the kernel
touch much; done in a child they leave the worker, which lives for as long as its device, as small as it was. The
child may block, too, and its worker is there for every order meanwhile.
"""

from __future__ import annotations

import fcntl
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
from nbdd.ipc.poller import Loop

Answer = tuple[Message, Sequence[socket.socket]]
"""What a job comes to, and the sockets that go with it."""

Tell = Callable[[Message, Sequence[int]], None]
"""Takes a message and its descriptors; in the worker they are the callee's to close. In the child it returns when the
worker has heard it, and so has done what follows from it."""

Job = Callable[[Tell], Answer]
"""What the child does; it may tell things before it is done. An NbddError that it raises is its answer."""

Done = Callable[[Message | None, list[int]], None]
"""Takes the answer with its descriptors, or None where the child ended without one."""


class Errand:
    """One child and its job. `heard` gets what it tells on the way; `done` is called once, in the loop.

    The child never outlives its worker: the kernel kills it when the worker ends, whatever ends it.
    """

    def __init__(self, loop: Loop, name: str, job: Job, *, heard: Tell, done: Done) -> None:
        """Start it; raises WorkerFailed where no process can be had. `name` is shown by ``ps -o comm``."""
        self._loop = loop
        self._heard = heard
        self._done: Done | None = done
        try:
            # None once it is reaped: from then on somebody else may have the number.
            self._pid: int | None
            self._pid, self._channel, self._lifeline = _fork(loop, name, job)
        except OSError as error:
            raise WorkerFailed(f"No process could be started for {name!r}: {error.strerror}.") from None
        loop.watch(self._channel.fileno(), select.POLLIN, self._readable)

    def kill(self) -> None:
        """End it at once, if it has not ended; what it has told by then is still heard, and then `done` called."""
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
                self._heard(message, fds)
                with suppress(OSError):
                    self._channel.send({})

    def _ended(self) -> None:
        self._loop.forget(self._channel.fileno())
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


def title(text: str) -> None:
    """Show the text, cut to 15 bytes, in ``ps -o comm`` and ``top``."""
    # Without Python's text files: the first one of a process costs it 900 KiB.
    try:
        fd = os.open("/proc/self/comm", os.O_WRONLY)
    except OSError:
        return  # a nicety
    os.write(fd, text[:15].encode())
    os.close(fd)


def _fork(loop: Loop, name: str, job: Job) -> tuple[int, Channel, int]:
    """The child's process id, our end of its channel, and the descriptor that keeps it alive."""
    ours, theirs = Channel.pair()
    with theirs:
        try:
            watched, lifeline = os.pipe()
            try:
                pid = os.fork()
                if pid == 0:
                    ours.close()
                    _be(loop, Channel(theirs), (watched, lifeline), name, job)
            except OSError:
                os.close(lifeline)
                raise
            finally:
                os.close(watched)
        except OSError:
            ours.close()
            raise
    return pid, Channel(ours), lifeline


def _be(loop: Loop, channel: Channel, life: tuple[int, int], name: str, job: Job) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        title(f"errand:{name}")
        watched, lifeline = life
        os.close(lifeline)
        _die_at_end_of(watched)
        # The manager takes a worker for dead when its channel closes, so nobody else may hold that open.
        for fd in loop:
            os.close(fd)

        def tell(message: Message, fds: Sequence[int]) -> None:
            channel.send(message, fds)
            if channel.wait() is None:
                raise BrokenPipeError

        try:
            answer, sockets = job(tell)
        except NbddError as error:
            answer, sockets = error.to_wire(), ()
        channel.send({"answer": answer}, [sock.fileno() for sock in sockets])
        code = 0
    except BrokenPipeError:
        code = 0  # Nobody wants it any more.
    except BaseException:  # noqa: BLE001 - the last word of a process
        traceback.print_exc(file=sys.stderr)
    finally:
        # Whatever became of it: never back into the worker's code, of which this is a copy.
        os._exit(code)


def _die_at_end_of(pipe: int) -> None:
    """Have the kernel kill this process as soon as nobody has the other end of `pipe` open (fcntl(2), F_SETSIG)."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)
    poll = select.poll()
    poll.register(pipe, 0)
    if poll.poll(0):
        os._exit(0)  # It happened before.
