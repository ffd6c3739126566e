# SPDX-License-Identifier: MIT
"""All servers of the matrix, running at once on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdd.uri import URI
from tests.interop.cells import FILES, MANY, SERVERS, TRANSPORTS, Server, many_name, many_size

START_SECONDS = 60.0
"""nbd-server computes parameters for TLS before it takes anybody: a blink, or ten seconds on an emulated processor."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server is reached over one transport."""

    server: Server
    transport: str
    port: int
    socket: str

    def uri(self, export: str = "") -> str:
        """Of one export, in nbdd's own spelling, which nbdinfo has to understand."""
        host = {"tcp4": "127.0.0.1", "tcp6": "::1"}.get(self.transport)
        return str(URI(False, host, self.port, None if host else self.socket, export))


@contextlib.contextmanager
def serving() -> Iterator[list[Place]]:
    """Start them, on files of their own; the places are in the order of the table. Afterwards nothing is left.

    Where it fails inside, what the servers said goes to stderr.
    """
    with contextlib.ExitStack() as stack:
        # What a server tells of a file depends on the file system, and /run is a tmpfs everywhere.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="interop-", dir="/run")))
        _make_files(folder)
        places: list[Place] = []
        # nbd-server is started first and asked last.
        for number, server in sorted(enumerate(SERVERS), key=lambda item: item[1].peer != "nbd-server"):
            path = str(folder / f"{number}.sock")
            if server.peer == "nbd-server":
                port = _free_port()
                stack.callback(_end, _start_nbd_server(server, port, path, folder))
                places += [Place(server, transport, port, path) for transport in TRANSPORTS]
                continue
            # qemu-nbd takes one socket.
            for group in [TRANSPORTS] if server.peer == "nbdkit" else [(transport,) for transport in TRANSPORTS]:
                listeners = [_listen(transport, path) for transport in group]
                stack.callback(_end, _hand_over(server.command, listeners, folder))
                for transport, listener in zip(group, listeners, strict=True):
                    port = 0 if transport == "unix" else listener.getsockname()[1]
                    places.append(Place(server, transport, port, path))
                    listener.close()
        try:
            yield sorted(places, key=lambda place: SERVERS.index(place.server))
        except BaseException:
            print((folder / "log").read_text(), file=sys.stderr)
            raise


def _make_files(folder: Path) -> None:
    (folder / "many").mkdir()
    sizes = FILES | {f"many/{many_name(number)}": many_size(number) for number in range(MANY)}
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "8M.qcow2", "8M"], check=True)


def _listen(transport: str, path: str) -> socket.socket:
    family = {"tcp4": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}[transport]
    listener = socket.socket(family)
    listener.bind(path if transport == "unix" else ("127.0.0.1" if transport == "tcp4" else "::1", 0))
    listener.listen()
    return listener


def _hand_over(command: str, listeners: Sequence[socket.socket], folder: Path) -> int:
    """Start a server on sockets that listen already, as systemd does (sd_listen_fds(3)); returns its process id."""
    script = f"cd {folder}; export LISTEN_PID=$$ LISTEN_FDS={len(listeners)}; exec {command} >>log 2>&1"
    # First out of the way, so that none is overwritten before it is moved.
    high = [fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, 10) for listener in listeners]
    moves = [(os.POSIX_SPAWN_DUP2, fd, 3 + number) for number, fd in enumerate(high)]
    try:
        return os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ, file_actions=moves)
    finally:
        for fd in high:
            os.close(fd)


def _free_port() -> int:
    """Of TCP, for both kinds of addresses."""
    while True:
        with _listen("tcp4", "") as one, socket.socket(socket.AF_INET6) as other, contextlib.suppress(OSError):
            port: int = one.getsockname()[1]
            other.bind(("::1", port))
            return port


def _start_nbd_server(server: Server, port: int, path: str, folder: Path) -> int:
    config, pid = folder / f"{port}.conf", folder / f"{port}.pid"
    text = server.command
    for key, value in {"{port}": str(port), "{socket}": path, "{folder}": str(folder)}.items():
        text = text.replace(key, value)
    config.write_text(text)
    # It closes every descriptor that it might have; where the limit is high, that takes seconds.
    subprocess.run(["sh", "-c", f"ulimit -n 1024; exec nbd-server -C {config} -p {pid}"], check=True)
    # It goes into the background first, and then opens its sockets and writes that file.
    end = time.monotonic() + START_SECONDS
    while not (pid.exists() and pid.read_text().strip()):
        if time.monotonic() > end:
            raise TimeoutError(f"nbd-server does not start with {text}")
        time.sleep(0.05)
    return int(pid.read_text())


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):  # nbd-server is no child of ours any more
        os.waitpid(pid, 0)
