# SPDX-License-Identifier: MIT
"""The fork server: a small process with the worker's code loaded, from which every worker is forked.

A fresh interpreter for each device would cost several times the memory; a fork shares nearly all of it. The server
runs no thread and no event loop, so a fork of it is sound at any moment. It reaps its children and tells how each
ended. Started by the supervisor as ``python -m nbdd.forkserver FD``; it ends when that socket does.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys

from nbdd.channel import Channel, Message
from nbdd.worker import main as work


def main() -> None:
    """Serve until the supervisor closes its end of the socket whose number is the first argument."""
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    # Ctrl-C on a terminal goes to the whole group; only the manager decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # What is loaded by now lives as long as the process: keep the collector from touching, and so copying, its pages.
    gc.collect()
    gc.freeze()
    try:
        _serve(control, reader, writer)
    except BrokenPipeError:
        return  # The manager went away while it was told something.


def _serve(control: Channel, reader: int, writer: int) -> None:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(reader, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == reader:
                os.read(reader, 4096)
                _reap(control)
            elif not control.receive():
                return
            while (found := control.pop()) is not None:
                message, fds = found
                _fork(control, message, fds[0], inherited=(reader, writer))


def _fork(control: Channel, message: Message, channel_fd: int, inherited: tuple[int, ...]) -> None:
    try:
        pid = os.fork()
    except OSError as error:
        os.close(channel_fd)
        control.send({"event": "refused", "id": message["id"], "message": error.strerror})
        return
    if pid == 0:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for fd in inherited:
                os.close(fd)
            control.close()
            # Held until the very end: the manager kills whose channel closes, and the exit code would be lost.
            channel = Channel(socket.socket(fileno=channel_fd))
            code = work(channel, message["name"])
        finally:
            os._exit(code)
    os.close(channel_fd)
    # A descriptor for the process, opened while nobody else can have its number: we have not reaped it yet.
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        # Its channel will be closed, and that ends it.
        control.send({"event": "refused", "id": message["id"], "message": error.strerror})
        return
    try:
        control.send({"event": "spawned", "id": message["id"], "pid": pid}, [pidfd])
    finally:
        os.close(pidfd)


def _reap(control: Channel) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        control.send({"event": "ended", "pid": pid, "code": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
