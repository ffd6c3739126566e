# SPDX-License-Identifier: MIT
"""The service of a device: a process that waits for the device's end, says why it came, and cleans up.

It carries no I/O, the kernel does. It is there so that a device ends with its server, or with the program that uses it.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NoReturn, Self

from nbdd.errors import ConnectFailed, KernelError, NbddError, NotAttached, TimedOut, WorkerFailed
from nbdd.ipc.channel import Channel, Message
from nbdd.ipc.processes import close_all_but
from nbdd.kernel.binding import KernelDevice
from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.netlink import NetlinkNBD
from nbdd.kernel.release import let_udev_finish, release
from nbdd.kernel.sockets import all_hung_up, shut_down
from nbdd.kernel.sysfs import Node, find, read
from nbdd.kernel.usage import Usage

START_SECONDS = 60.0
"""For a child to bind its device, or to give up; it has limits of its own for each step, which are shorter."""

END_SECONDS = 10.0
"""For a killed child to be gone, and for its device to be free."""

STUCK_SECONDS = 1.0
"""How long a killed child may take to be gone before something is done about it."""

PATIENCE_SECONDS = 2.0
"""How long the kernel's report of a dead connection may come after the end of the connection."""

_LOOK_SECONDS = 0.02
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Reason(StrEnum):
    """Why a service ended."""

    DISCONNECTED = "disconnected"
    """Somebody disconnected the device."""
    SERVER_DIED = "server died"
    """The last connection to the server broke, or was given up after a timeout."""
    SIGNAL = "signal"
    """A signal came."""


@dataclass(frozen=True, slots=True)
class End:
    """What `Client.run` returns."""

    reason: Reason
    signal: int = 0
    """The signal's number; 0 if there was none."""

    def __str__(self) -> str:
        return f"{self.reason} {self.signal}" if self.signal else str(self.reason)

    @property
    def status(self) -> int:
        """The exit status that says it: 0 disconnected, 1 the server died, 128 and its number for a signal."""
        if self.signal:
            return 128 + self.signal
        return int(self.reason is Reason.SERVER_DIED)


class Stop:
    """What may ask a service to end: the signals that would end the program, and the end of the parent process.

    Only in the main thread, and only signals that have their default effect: others are the program's own affair.
    """

    def __init__(self, parent: Channel | None = None, parents_life: int | None = None) -> None:
        self.parent = parent
        # A descriptor for the parent's process: forks of it may hold the other end of the channel.
        self.parents_life = parents_life
        self._caught = 0
        self._before: dict[signal.Signals, Any] = {}
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._reader.fileno()

    def end(self) -> End:
        """The End that a signal, or the end of the parent, leads to."""
        return End(Reason.SIGNAL, self._caught or signal.SIGHUP)

    def _catch(self, number: int, _frame: object) -> None:
        if not self._caught:
            self._caught = number
            self._writer.send(b"\0")


def watch(
    node: Node, is_ours: Callable[[], bool], sockets: Sequence[socket.socket], reports: LinkDeadMonitor, stop: Stop
) -> End:
    """Wait for the end of a device that was bound with these sockets; it may be bound still.

    `reports` was opened before it was bound. The kernel reports a connection that dies by itself, and none
    that a disconnect ends (nbd_mark_nsock_dead): that distinguishes the two.
    """
    poll = select.poll()
    living = {sock.fileno() for sock in sockets}
    for fd in living:
        # No POLLIN: what arrives is the kernel driver's to read.
        poll.register(fd, select.POLLRDHUP)
    poll.register(reports, select.POLLIN)
    poll.register(stop, select.POLLIN)
    if stop.parent is not None:
        poll.register(stop.parent, select.POLLRDHUP)
    if stop.parents_life is not None:
        poll.register(stop.parents_life, select.POLLIN)
    died = 0
    while living:
        for fd, _ in poll.poll():
            if fd in living:
                living.discard(fd)
                poll.unregister(fd)
            elif fd == reports.fileno():
                died += reports.read().count(node.index)
            else:
                return stop.end()
    until = time.monotonic() + PATIENCE_SECONDS
    while died < len(sockets):
        died += reports.wait(_LOOK_SECONDS).count(node.index)
        if not is_ours() or time.monotonic() >= until:
            break
    return End(Reason.SERVER_DIED if died >= len(sockets) else Reason.DISCONNECTED)


def serve(device: KernelDevice, stop: Stop, bound: Callable[[Node], None], *, index: int | None) -> End:
    """Bind the device to /dev/nbdX or a free one, call `bound` once it is usable, wait for its end, free it.

    Closes its sockets.
    """
    # Before the device is there, to miss no connection that dies.
    with device.watch_connections() as reports:
        node = device.connect(index)
        try:
            try:
                device.make_usable(node)
                bound(node)
            except NbddError:
                # It may have been disconnected already: then `watch` knows.
                if not device.is_cut_off():
                    raise
            return watch(node, lambda: device.current() is not None, device.sockets, reports, stop)
        finally:
            if (left := device.current()) is not None:
                device.unbind(left)
            device.close_sockets()


Serve = Callable[[Stop, Callable[[Node], None]], End]
"""What a child does: bind a device, report which, wait for its end."""


class Service:
    """A child process that serves a device, as its parent holds it. It ends when the parent does."""

    def __init__(
        self, pid: int, channel: Channel, backend: str, sockets: Sequence[socket.socket], others: Sequence[Node]
    ) -> None:
        """`others` were bound under that identifier before; they are not the child's."""
        self.pid = pid
        self._channel = channel
        self._backend = backend
        self._sockets = tuple(sockets)
        self._owner = os.getpid()
        self._others = others
        # A number may be given away once the child was waited for, by whomever; this can't.
        self._pidfd = os.pidfd_open(pid)
        self._device: tuple[Node, int | None, int | None] | None = None

    @classmethod
    def start(cls, backend: str, sockets: Sequence[socket.socket], serve: Serve) -> Self:
        """Fork a child that serves; raises KernelError if there are no descriptors or processes left."""
        others = find(backend)
        try:
            ours, theirs = Channel.pair()
            with ours, theirs:
                channel = Channel(ours.dup())
                life = os.pidfd_open(os.getpid())
                try:
                    pid = os.fork()
                    if pid == 0:
                        _child(Channel(theirs), life, sockets, serve)
                    try:
                        return cls(pid, channel, backend, sockets, others)
                    except BaseException:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        raise
                finally:
                    os.close(life)
        except OSError as error:
            raise KernelError(f"No service process could be started: {error.strerror}.", error.errno) from error

    def bound(self) -> tuple[Node, int | None, int | None]:
        """Wait until the device is bound; what it is: the node, its disk sequence number, and the thread that bound it.

        Raises what the child met, WorkerFailed if it was killed, TimedOut.
        """
        report = self._first_message()
        if not report:
            raise WorkerFailed("The service process was killed before it had bound a device.")
        if "error" in report:
            raise NbddError.from_wire(report)
        self._device = Node(report["index"]), report["diskseq"], report["pid"]
        return self._device

    def _first_message(self) -> Message:
        """The child's first message; empty if it ended without one."""
        until = time.monotonic() + START_SECONDS
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while (found := self._channel.pop()) is None:
            if poll.poll(STUCK_SECONDS * 1000):
                if not self._channel.receive():
                    return {}
            elif _is_dead(self.pid):
                # One that was killed keeps its end open while one of its threads waits for the server.
                return {}
            elif time.monotonic() >= until:
                raise TimedOut(f"The service process bound no device within {START_SECONDS:g} seconds.")
        return found[0]

    def ended(self, seconds: float) -> bool:
        """Whether the child has ended by itself within that time."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def end(self, patience: float = 0.0) -> list[str]:
        """Have the child end, free its device; returns who has that open still. To be called again if interrupted.

        A child that does not end the device by itself within `patience` seconds is killed. Raises TimedOut if the
        kernel does not let it go, KernelError. Does nothing in a fork of the process that started the child.
        """
        if self._owner != os.getpid():
            return []
        if patience:
            self._channel.close()
        if not self.ended(patience):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            if not self.ended(STUCK_SECONDS):
                # It waits in the kernel for a server that doesn't answer. What it waits for fails with the device.
                self._free()
            if not self.ended(END_SECONDS):
                raise TimedOut(f"The service process {self.pid} was killed, and the kernel holds it still.")
        with suppress(ChildProcessError):  # the program has waited for it already, or we were interrupted after it
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        # Only now can there be nothing more to come.
        left = self._free()
        self._channel.close()
        os.close(self._pidfd)
        return left

    def drop(self) -> None:
        """End the service of a client that was dropped, and close its sockets."""
        if self._owner == os.getpid():
            self.end(END_SECONDS)
            for sock in self._sockets:
                sock.close()

    def _free(self) -> list[str]:
        """Free what the child had bound; a child that was killed early may not have reported it."""
        found = [node for node in find(self._backend) if node not in self._others]
        devices = [self._device] if self._device else [(node, node.diskseq, node.pid) for node in found]
        left: list[str] = []
        for node, diskseq, pid in devices:
            if not node.bound:
                continue
            if not all_hung_up(self._sockets):
                let_udev_finish(node, Usage())
            with suppress(NotAttached), NetlinkNBD() as netlink:
                left += release(
                    netlink,
                    node,
                    self._backend,
                    END_SECONDS,
                    diskseq=diskseq,
                    pid=pid,
                    force=True,
                    nudge=partial(shut_down, self._sockets),
                )
        return left


def _is_dead(pid: int) -> bool:
    """Whether a child that was not reaped yet has ended, all but its threads perhaps."""
    # proc_pid_stat(5): the name, in parentheses, may hold anything.
    state = (read(f"/proc/{pid}/stat") or ") X").rpartition(")")[2].split()[0]
    return state in "ZX"


def _child(channel: Channel, parents_life: int, sockets: Sequence[socket.socket], serve: Serve) -> NoReturn:
    """The whole life of the child. Nothing of the parent's program may run in it: no handler, no finalizer, no exit."""
    status = 2
    try:
        # Objects of the parent's still hold numbers of descriptors that are closed here, and given to others.
        gc.disable()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                # One that the program handles is its own affair, here as in `run`: Ctrl-C goes to both.
                own = number in _STOPPING and handler is not signal.default_int_handler
                signal.signal(number, signal.SIG_IGN if own else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        close_all_but(channel.fileno(), parents_life, *(sock.fileno() for sock in sockets))

        def bound(node: Node) -> None:
            _report(channel, {"index": node.index, "diskseq": node.diskseq, "pid": node.pid})

        try:
            with Stop(channel, parents_life) as stop:
                end = serve(stop, bound)
            status = end.status
            # Not read if the device was usable for a while.
            _report(channel, ConnectFailed(f"The device ended before it could be used: {end}.").to_wire())
        except NbddError as error:
            _report(channel, error.to_wire())
    except BaseException as error:  # noqa: BLE001 - the last word of a process
        _report(channel, WorkerFailed(f"The service process failed: {error!r}.").to_wire())
        # Whatever the parent has made of sys.stderr is not ours to use.
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _report(channel: Channel, what: Message) -> None:
    # A parent that has gone is seen by the process that waits for the end.
    with suppress(OSError):
        channel.send(what)
