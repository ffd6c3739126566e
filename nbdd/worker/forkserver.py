# SPDX-License-Identifier: MIT
"""The fork server: a small process with the worker's code loaded, from which every worker is forked.

A fresh interpreter for each device would cost several times the memory; a fork shares nearly all of it. The server
runs no thread and no event loop, so a fork of it is sound at any moment. It reaps its children and reports how
each ended, once their own children have ended too: what they asked of the kernel is then done, and a successor sees it.
The supervisor starts it as ``python -m nbdd.worker.forkserver FD``; it ends when that socket does.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys

from nbdd.ipc.channel import Channel, Message
from nbdd.ipc.processes import close_all_but


def _import_threading() -> None:
    """Import `threading`, which our modules need, without the part that it has run in every fork.

    That part corrects what the module knows of threads other than the one that forked. Here that one is the only one,
    so it stays true, and each worker shares the 300 KiB of pages that the correction would touch.
    """
    register, os.register_at_fork = os.register_at_fork, lambda **_: None
    try:
        import threading  # noqa: F401, PLC0415
    finally:
        os.register_at_fork = register


_import_threading()

from nbdd.worker.worker import Worker  # noqa: E402 - after it, in this process
from nbdd.worker.worker import main as work  # noqa: E402

_REHEARSALS = 10
"""Python makes code that is run often faster, for good, on about the eighth time."""


def main() -> None:
    """Serve until the supervisor closes its end of the socket whose number is the first argument."""
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    # Ctrl-C on a terminal goes to the whole group; only the manager decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _rehearse()
    # What is loaded by now lives as long as the process: keep the collector from touching, and so copying, its pages.
    gc.collect()
    gc.freeze()
    try:
        _serve(control)
    except BrokenPipeError:
        return  # The manager went away while something was sent to it.


def _rehearse() -> None:
    """Run a worker for a moment before any is forked.

    What Python writes as it goes, in its caches and in the code itself, is then in pages that they share.
    """
    ours, theirs = Channel.pair()
    manager, channel = Channel(ours), Channel(theirs)
    worker = Worker(channel, "rehearsal")
    for number in range(_REHEARSALS):
        # The shortest job of a child: the answer is that this is no URI.
        manager.send({"order": "list-exports", "id": number, "uri": ""})
        worker.run_once()
        while not worker.idle:
            worker.run_once()
        manager.wait()
    manager.close()
    channel.close()


def _serve(control: Channel) -> None:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    # A pipe for each worker, which it and its children have open for writing: it ends when the last of them has ended.
    lives: dict[int, int] = {}
    while True:
        for fd, _ in poll.poll():
            if fd in lives:
                poll.unregister(fd)
                os.close(fd)
                _reap(control, lives.pop(fd))
                continue
            if not control.receive():
                return
            while (found := control.pop()) is not None:
                message, fds = found
                if (born := _fork(control, message, fds[0])) is not None:
                    pid, life = born
                    lives[life] = pid
                    poll.register(life, 0)


def _fork(control: Channel, message: Message, channel_fd: int) -> tuple[int, int] | None:
    """Fork a worker; its process id and the pipe that ends with it, or None if that fails."""
    try:
        life, held = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(life)
            os.close(held)
            raise
    except OSError as error:
        os.close(channel_fd)
        control.send({"event": "refused", "id": message["id"], "message": error.strerror})
        return None
    if pid == 0:
        code = 1
        try:
            close_all_but(channel_fd, held)
            # Open until the very end: the manager kills a worker whose channel closes, and the exit code would be lost.
            channel = Channel(socket.socket(fileno=channel_fd))
            code = work(channel, message["name"])
        finally:
            os._exit(code)
    os.close(channel_fd)
    os.close(held)
    # A descriptor for the process, opened while no other process can have its number: we have not reaped it yet.
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        # Its channel will be closed, and that ends it.
        control.send({"event": "refused", "id": message["id"], "message": error.strerror})
        return pid, life
    try:
        control.send({"event": "spawned", "id": message["id"], "pid": pid}, [pidfd])
    finally:
        os.close(pidfd)
    return pid, life


def _reap(control: Channel, pid: int) -> None:
    # It has closed the pipe, so it is as good as dead, and this is no waiting.
    _, status = os.waitpid(pid, 0)
    control.send({"event": "ended", "pid": pid, "code": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
