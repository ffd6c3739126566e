# SPDX-License-Identifier: MIT
"""Which sockets the kernel's NBD driver can work with."""

from __future__ import annotations

import array
import fcntl
import select
import socket
import termios
from contextlib import suppress
from typing import TYPE_CHECKING

from nbdd.errors import ConnectFailed, InvalidArgs

if TYPE_CHECKING:
    from collections.abc import Iterable

_DEAD = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def check_socket(sock: socket.socket) -> None:
    """Raise for a socket that the kernel's driver can't use, or would take and then fail with.

    InvalidArgs if it is no connected stream socket (nbd_get_socket refuses some of them, and which, depends on its
    version); ConnectFailed if the other end has hung up.
    """
    if not isinstance(sock, socket.socket):
        raise InvalidArgs(
            f"The kernel needs a connected TCP or Unix socket, not an object of type {type(sock).__name__}."
        )
    if sock.fileno() < 0:
        raise InvalidArgs("The socket is closed.")
    if hasattr(sock, "getpeercert"):
        raise InvalidArgs("The kernel can't speak TLS on a socket of Python's ssl module.")
    if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        family, kind = (getattr(number, "name", number) for number in (sock.family, sock.type))
        raise InvalidArgs(f"The socket must be TCP or a Unix stream, not {family} and {kind}.")
    if sock.family != socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) != socket.IPPROTO_TCP:
        raise InvalidArgs("The socket must be TCP; it speaks another protocol.")
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise InvalidArgs("The socket listens for connections; give the connection that accept() returns.")
    # One that was never connected has no other end to hang up.
    if _events(sock) & select.POLLRDHUP:
        raise ConnectFailed("The other end of the socket has hung up.")
    try:
        sock.getpeername()
    except OSError:
        raise InvalidArgs("The socket is not connected.") from None


def hung_up(sock: socket.socket) -> bool:
    """Whether nothing comes from the other end any more. False for one that is closed on our side."""
    return sock.fileno() >= 0 and dead(sock.fileno())


def dead(fd: int) -> bool:
    """Whether nothing comes from the other end of this descriptor of a socket any more."""
    return bool(_events(fd) & _DEAD)


def all_hung_up(sockets: Iterable[socket.socket]) -> bool:
    """Whether nothing comes from the other end of any of them any more; True if there are none."""
    return all(hung_up(sock) for sock in sockets)


def shut_down(sockets: Iterable[socket.socket]) -> None:
    """Shut them down in both directions, for a process that waits for them to fail; never raises."""
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def unread(sock: socket.socket) -> int:
    """How many bytes wait in a socket to be read."""
    number = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, number)
    return number[0]


def _events(sock: socket.socket | int) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return next((events for _, events in poll.poll(0)), 0)
