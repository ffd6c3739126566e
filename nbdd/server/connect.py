# SPDX-License-Identifier: MIT
"""From a URI to a socket in NBD's transmission phase: resolve, connect, negotiate, all under one deadline.

The calls block; they are meant for a process of their own. There is no encryption yet: if it is asked for, nothing is
ever sent.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from typing import Any, NoReturn, TypeVar

from nbdd import protocol
from nbdd.config.definition import DEFAULT_NETWORK_TIMEOUT
from nbdd.errors import ConnectFailed, NegotiationFailed, ServerError, TimedOut, TLSFailed
from nbdd.limits import MAX_NETWORK_TIMEOUT
from nbdd.protocol import Export, Receive, Send, Steps
from nbdd.uri import MAX_SOCKET_PATH, URI

MAX_ADDRESSES = 16
"""Addresses of one name that are tried, so that each still gets a useful part of the time."""

_T = TypeVar("_T")

_REASONS = {
    errno.ECONNREFUSED: "connection refused, nothing listens there",
    errno.EHOSTUNREACH: "no route to the host",
    errno.ENETUNREACH: "the network is unreachable",
    errno.ENOENT: "there is no such socket, the server may not be running",
    errno.EACCES: "permission denied",
    errno.EPROTOTYPE: "the socket is not a stream socket",
    errno.ENOTCONN: "the server closed the connection at once",
}


class Deadline:
    """A moment at which waiting ends; it is set once and covers all that follows."""

    __slots__ = ("_end", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self, what: str = "It was not done") -> float:
        """The seconds left, more than 0; otherwise raise `TimedOut`: `what` and "within N s."."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimedOut(f"{what} within {self.seconds:g} s.")
        return left


def open_export(
    uri: URI, deadline: Deadline, *, network_timeout: int = DEFAULT_NETWORK_TIMEOUT
) -> tuple[socket.socket, Export]:
    """Connect and open the export; the socket is ready for the kernel. Raises any `ServerError`."""
    sock = connect(uri, deadline, network_timeout=network_timeout)
    try:
        return sock, negotiate(sock, protocol.go(uri.export), deadline, address=uri.address)
    except BaseException:
        sock.close()
        raise


def list_exports(uri: URI, deadline: Deadline) -> list[Export]:
    """List the exports of the server of `uri`; the export name in the URI is not used. Raises any `ServerError`."""
    with connect(uri, deadline) as sock:
        return negotiate(sock, protocol.list_exports(), deadline, address=uri.address)


def negotiate(sock: socket.socket, steps: Steps[_T], deadline: Deadline, *, address: str | None = None) -> _T:
    """Run a generator of `nbdd.protocol` on a socket, and return what it returns.

    No byte more is read than it asked for. Afterwards `sock` blocks without a timeout, as the kernel needs it; after an
    error it is of no use. `address` is the server's name in errors, by default the socket's peer.
    """
    # Now, since a connection that broke has no peer.
    address = address or _peer(sock)
    try:
        request = next(steps)
        while True:
            try:
                octets = _perform(sock, request, deadline)
            except ServerError as error:
                request = steps.throw(error)
            else:
                request = steps.send(octets)
    except StopIteration as end:
        sock.settimeout(None)
        result: _T = end.value
        return result
    except ServerError as error:
        raise type(error)(f"The NBD server {address} {error}") from None
    finally:
        steps.close()


def connect(uri: URI, deadline: Deadline, *, network_timeout: int = DEFAULT_NETWORK_TIMEOUT) -> socket.socket:
    """Connect to the server: a stream socket, not inherited by children, set up for a long life in the kernel.

    Every address of the host is tried in the resolver's order, each with a fair part of the time that is left.
    `network_timeout` in seconds, 1 to MAX_NETWORK_TIMEOUT, is how long the server's machine may be silent.
    Raises `ConnectFailed`; `TimedOut` if nothing answered at all; `TLSFailed` if the URI asks for TLS.
    """
    if uri.tls:
        raise TLSFailed(f"{uri} asks for encryption (TLS), which nbdd does not speak yet; nothing was sent.")
    if uri.socket is not None:
        return _connect_unix(uri.socket, uri.address, deadline)
    return _connect_tcp(uri, deadline, network_timeout)


def _connect_unix(path: str, address: str, deadline: Deadline) -> socket.socket:
    length = len(path.encode())
    if length > MAX_SOCKET_PATH:
        raise ConnectFailed(
            f"Can't connect to {address}: the path of a Unix socket has at most {MAX_SOCKET_PATH} bytes, not {length}."
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A Unix socket whose queue of callers is full has a blocking connect wait, for as long as SO_SNDTIMEO says,
        # and a non-blocking one fail at once (net/unix/af_unix.c). Waiting beats asking again and again.
        _set_send_timeout(sock, deadline.remaining(f"There was no connection to {address}"))
        sock.connect(path)
        _set_send_timeout(sock, 0)
    except OSError as error:
        sock.close()
        if error.errno == errno.EAGAIN:
            raise TimedOut(
                f"There was no connection to {address} within {deadline.seconds:g} s: the server accepts none."
            ) from None
        raise ConnectFailed(f"Can't connect to {address}: {_reason(error)}.") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _set_send_timeout(sock: socket.socket, seconds: float) -> None:
    """SO_SNDTIMEO; 0 is no limit. Rounded up, since a limit that rounds to 0 would be none."""
    micros = int(seconds * 1_000_000) + (1 if seconds else 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", micros // 1_000_000, micros % 1_000_000))


def _connect_tcp(uri: URI, deadline: Deadline, network_timeout: int) -> socket.socket:
    found = _resolve(uri, deadline)
    tried: list[str] = []
    unanswered = 0
    for number, (family, sockaddr) in enumerate(found):
        left = deadline.remaining(_unconnected(uri, tried))
        try:
            return _connect_address(family, sockaddr, left / (len(found) - number), network_timeout)
        except TimeoutError:
            reason = "no answer"
            unanswered += 1
        except OSError as error:
            reason = _reason(error)
        tried.append(f"{_text(sockaddr)}: {reason}")
    if unanswered == len(tried):
        raise TimedOut(f"{_unconnected(uri, tried)} within {deadline.seconds:g} s.")
    raise ConnectFailed(f"Can't connect to {_attempts(uri, tried)}.")


def _connect_address(family: int, sockaddr: Any, seconds: float, network_timeout: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(sockaddr)
        _refuse_self(sock)
        _prepare(sock, network_timeout)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _refuse_self(sock: socket.socket) -> None:
    # To a port of this machine without a listener, TCP may connect a socket to itself, if that port happens to be
    # picked as its own. It would wait for its own greeting, and keep the port from the server.
    if sock.getsockname() == sock.getpeername():
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _prepare(sock: socket.socket, network_timeout: int) -> None:
    """Set the options of a socket that the kernel will use."""
    seconds = min(max(network_timeout, 1), MAX_NETWORK_TIMEOUT)
    # The kernel sends a request's header and its data in pieces; Nagle's algorithm would hold the last one back.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Two ways to lose a peer, two clocks (tcp(7)). With requests on the wire it is the time that they, sent again and
    # again, go unacknowledged. That defaults to some 15 minutes.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
    # With nothing on the wire, probes find it out: the first after 2/5 of the time, and one every 1/5 from then on.
    idle, interval = max(seconds * 2 // 5, 1), max(seconds // 5, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max((seconds - idle) // interval, 1))


def _resolve(uri: URI, deadline: Deadline) -> list[tuple[int, Any]]:
    """Family and address of each address of the host; returns before the deadline."""
    if uri.host is None:
        raise ConnectFailed(f"{uri} names neither a host nor a socket.")
    # Bytes, or Python would run the name through its IDNA codec, and load that first.
    host = uri.host.encode("ascii")
    try:
        return _lookup(host, uri.port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        if ":" in uri.host:
            raise ConnectFailed(
                f"Can't connect to {uri.address}: no network interface here has the name after the %."
            ) from None
    found: list[tuple[int, Any]] = []
    failed: list[socket.gaierror] = []

    def look_up() -> None:
        try:
            found.extend(_lookup(host, uri.port, 0))
        except socket.gaierror as error:
            failed.append(error)

    # getaddrinfo can't be interrupted, and has its own time limits. A thread that takes longer than the deadline is
    # left behind, and ends with the process.
    thread = threading.Thread(target=look_up, name="nbdd-resolver", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise ConnectFailed(
            "The system lets nbdd start no more threads, and so no host name can be resolved."
        ) from None
    thread.join(deadline.remaining(f"There was no connection to {uri.address}"))
    if failed:
        _unresolved(uri, failed[0])
    if not found:
        raise TimedOut(f"The host name {uri.host} was not resolved within {deadline.seconds:g} s; check the DNS.")
    return found


def _lookup(host: bytes, port: int, flags: int) -> list[tuple[int, Any]]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    # A dict for a set that keeps the resolver's order.
    found: dict[tuple[int, Any], None] = dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in answers)
    return list(found)[:MAX_ADDRESSES]


def _unresolved(uri: URI, error: socket.gaierror) -> NoReturn:
    if error.errno == socket.EAI_AGAIN:
        raise ConnectFailed(f"The host name {uri.host} can't be resolved now: no name server answers.")
    if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        raise ConnectFailed(f"The host name {uri.host} is not known; check its spelling and the DNS.")
    raise ConnectFailed(f"The host name {uri.host} can't be resolved: {error.strerror}.")


def _perform(sock: socket.socket, request: Send | Receive, deadline: Deadline) -> bytes:
    """One step of a negotiation; the texts of errors begin with a verb, as everywhere in nbdd.protocol."""
    if isinstance(request, Receive):
        return _receive(sock, request, deadline)
    late = f"did not take {request.what}"
    try:
        sock.settimeout(deadline.remaining(late))
        sock.sendall(request.data)
    except TimeoutError:
        raise TimedOut(f"{late} within {deadline.seconds:g} s.") from None
    except OSError as error:
        raise NegotiationFailed(f"closed the connection before it took {request.what} ({_reason(error)}).") from None
    return b""


def _receive(sock: socket.socket, request: Receive, deadline: Deadline) -> bytes:
    """Receive exactly the bytes asked for, however slowly they come."""
    octets = bytearray()
    while len(octets) < request.count:
        partly = f"only {len(octets)} of {request.count} bytes of {request.what}"
        late = f"sent {partly}" if octets else f"did not send {request.what}"
        hint = f" {request.hint}" if request.hint and not octets else ""
        try:
            sock.settimeout(deadline.remaining(late))
            _acknowledge_at_once(sock)
            chunk = sock.recv(request.count - len(octets))
        except (TimeoutError, TimedOut):
            raise TimedOut(f"{late} within {deadline.seconds:g} s.{hint}") from None
        except OSError as error:
            raise NegotiationFailed(f"broke the connection when {request.what} was due: {_reason(error)}.") from None
        if not chunk:
            when = f"after {partly}" if octets else f"when {request.what} was due"
            raise NegotiationFailed(f"closed the connection {when}.{hint}")
        octets += chunk
    return bytes(octets)


def _acknowledge_at_once(sock: socket.socket) -> None:
    """Have the kernel acknowledge at once; it returns to delayed acknowledgements by itself.

    Servers send a reply in small pieces, and one without TCP_NODELAY holds back each until the last is acknowledged,
    which the kernel otherwise delays. Measured on loopback with qemu-nbd: 44 ms for NBD_OPT_GO.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _unconnected(uri: URI, tried: list[str]) -> str:
    return f"There was no connection to {_attempts(uri, tried)}"


def _attempts(uri: URI, tried: list[str]) -> str:
    """The server and, for each of its addresses, why the connection failed."""
    if not tried:
        return uri.address
    if len(tried) == 1 and tried[0].startswith(uri.address + ": "):
        return tried[0]
    return f"{uri.address} ({'; '.join(tried)})"


def _reason(error: OSError) -> str:
    """The error as a part of a sentence."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return _REASONS.get(error.errno or 0, text[:1].lower() + text[1:])


def _text(sockaddr: Any) -> str:
    """An address as in a URI. Only IPv6 has a scope: the interface of a link-local address."""
    host, port, *rest = sockaddr
    if not rest:
        return f"{host}:{port}"
    if rest[-1] and "%" not in host:
        try:
            host += "%" + socket.if_indextoname(rest[-1])
        except OSError:
            host += f"%{rest[-1]}"
    return f"[{host}]:{port}"


def _peer(sock: socket.socket) -> str:
    try:
        peer = sock.getpeername()
    except OSError:
        return "that closed the connection"
    if isinstance(peer, tuple):
        return _text(peer)
    return str(peer) or "on a Unix socket"
