# SPDX-License-Identifier: MIT
"""Sockets, deadlines and servers that misbehave on them, each with its own readable sentence."""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdd import protocol
from nbdd.errors import ConnectFailed, NegotiationFailed, NoSuchExport, ServerError, TimedOut, TLSFailed
from nbdd.protocol import Receive, Send, Steps
from nbdd.server import connect as transport
from nbdd.server.connect import Deadline, connect, list_exports, negotiate, open_export
from nbdd.uri import MAX_SOCKET_PATH, URI
from tests.fakes.servers import GO, MIB, Server, accepts, greeting, offers, receive, reply, says, says_and_closes

LONG = 10.0
"""Seconds; a test that waits so long has failed."""

SHORT = 0.3
"""Seconds of a deadline that is meant to pass."""

FAMILIES = [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX]


def refusal_of(uri: URI, seconds: float = LONG) -> ServerError:
    with pytest.raises(ServerError) as caught:
        open_export(uri, Deadline(seconds))
    message = str(caught.value)
    assert message.isprintable()
    assert message[0].isupper()
    assert message.endswith(".")
    return caught.value


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port where nobody listens, and nobody else can."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def full_port() -> Iterator[int]:
    """A port that does not even say no: its queue of callers is full, so the kernel drops what comes."""
    with socket.socket() as listener, socket.socket() as caller, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for sock in (caller, second):
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# The good way.


@pytest.mark.parametrize("family", FAMILIES)
def test_open_export_gives_a_socket_as_the_kernel_needs_it(family: int) -> None:
    with Server(offers({b"disk": 5 * MIB}), family) as server:
        sock, export = open_export(server.uri("disk"), Deadline(LONG))
        with sock:
            assert (export.name, export.size) == ("disk", 5 * MIB)
            assert sock.gettimeout() is None
            assert not sock.get_inheritable()
            assert sock.type == socket.SOCK_STREAM
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == bytes(16)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)


@pytest.mark.parametrize(
    ("seconds", "clocks"), [(10, (10_000, 4, 2, 3)), (1, (1000, 1, 1, 1)), (60, (60_000, 24, 12, 3))]
)
def test_network_timeout_sets_the_clocks_of_the_socket(seconds: int, clocks: tuple[int, int, int, int]) -> None:
    with (
        Server(says(b"")) as server,
        connect(server.uri(), Deadline(LONG), network_timeout=seconds) as sock,
    ):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert tuple(sock.getsockopt(socket.IPPROTO_TCP, name) for name in names) == clocks
        idle, interval, count = clocks[1:]
        assert idle + interval * count in (seconds, seconds + 1)


def test_network_timeout_stays_within_what_the_kernel_takes() -> None:
    with Server(says(b"")) as server:
        for seconds in (-1, 0, 10**9):
            connect(server.uri(), Deadline(LONG), network_timeout=seconds).close()


@pytest.mark.parametrize("family", FAMILIES)
def test_list_exports_reads_the_list(family: int) -> None:
    with Server(offers({b"a": MIB, b"": 2 * MIB}), family) as server:
        assert [(export.name, export.size) for export in list_exports(server.uri("ignored"), Deadline(LONG))] == [
            ("a", MIB),
            ("", 2 * MIB),
        ]


def test_negotiate_runs_over_any_socket_and_names_its_peer() -> None:
    with Server(offers({b"a": MIB})) as server:
        with connect(server.uri(), Deadline(LONG)) as sock:
            assert negotiate(sock, protocol.info("a"), Deadline(LONG)).size == MIB
        with (
            connect(server.uri(), Deadline(LONG)) as sock,
            pytest.raises(NoSuchExport, match=rf"The NBD server 127.0.0.1:{server.port} has no export called 'b'\."),
        ):
            negotiate(sock, protocol.info("b"), Deadline(LONG))


def test_negotiate_reads_no_byte_of_the_transmission_phase() -> None:
    with Server(says(greeting() + accepts(GO) + b"NEXT")) as server:
        sock, _ = open_export(server.uri(), Deadline(LONG))
        with sock:
            assert receive(sock, 4) == b"NEXT"


def test_slow_server_is_waited_for_until_the_deadline() -> None:
    def drip(conn: socket.socket) -> None:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in greeting() + accepts(GO):
            conn.sendall(bytes([octet]))
        conn.recv(1 << 16)

    with Server(drip) as server:
        sock, export = open_export(server.uri(), Deadline(LONG))
        sock.close()
        assert export.size == MIB


# TLS.


@pytest.mark.parametrize("family", FAMILIES)
def test_tls_uri_is_refused_before_any_connection(family: int) -> None:
    with Server(offers({b"": MIB}), family) as server:
        uri = server.uri()
        asked = URI(tls=True, host=uri.host, port=uri.port, socket=uri.socket, export="")
        calls: list[Callable[[URI, Deadline], object]] = [open_export, list_exports, connect]
        for call in calls:
            with pytest.raises(TLSFailed, match=r"asks for encryption \(TLS\)"):
                call(asked, Deadline(LONG))
        assert not server.connected.is_set()


# Nobody there.


def test_refused_connection_raises_connect_failed(closed_port: int) -> None:
    error = refusal_of(URI.parse(f"nbd://127.0.0.1:{closed_port}/x"))
    assert type(error) is ConnectFailed
    assert str(error) == f"Can't connect to 127.0.0.1:{closed_port}: connection refused, nothing listens there."


def test_host_that_never_answers_times_out_at_the_deadline(full_port: int) -> None:
    start = time.monotonic()
    error = refusal_of(URI.parse(f"nbd://127.0.0.1:{full_port}/x"), SHORT)
    assert type(error) is TimedOut
    assert str(error) == f"There was no connection to 127.0.0.1:{full_port}: no answer within {SHORT:g} s."
    assert time.monotonic() - start < LONG


def test_host_that_does_not_resolve_raises_connect_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> Callable[..., Any]:
        def getaddrinfo(*_: object, **__: object) -> Any:
            raise socket.gaierror(code, "what the library says")

        return getaddrinfo

    for code, sentence in [
        (socket.EAI_NONAME, "The host name server.example is not known; check its spelling and the DNS."),
        (socket.EAI_AGAIN, "The host name server.example can't be resolved now: no name server answers."),
        (socket.EAI_FAIL, "The host name server.example can't be resolved: what the library says."),
    ]:
        monkeypatch.setattr(socket, "getaddrinfo", fail(code))
        error = refusal_of(URI.parse("nbd://server.example/x"))
        assert type(error) is ConnectFailed
        assert str(error) == sentence


def test_name_server_that_never_answers_times_out_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    seen: list[threading.Thread] = []

    def hang(_host: object, _port: object, *, flags: int, **_: object) -> Any:
        if not flags & socket.AI_NUMERICHOST:
            seen.append(threading.current_thread())
            over.wait(LONG)
        raise socket.gaierror(socket.EAI_NONAME, "")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    error = refusal_of(URI.parse("nbd://server.example/x"), SHORT)
    assert type(error) is TimedOut
    assert str(error) == f"The host name server.example was not resolved within {SHORT:g} s; check the DNS."
    assert seen[0].daemon
    over.set()
    seen[0].join(LONG)


def test_zone_that_is_no_interface_raises_connect_failed() -> None:
    error = refusal_of(URI.parse("nbd://[fe80::1%25nosuch0]/x"))
    assert type(error) is ConnectFailed
    assert "[fe80::1%nosuch0]:10809: no network interface here" in str(error)


class Resolver:
    """Stands in for getaddrinfo: one name, these ports of these addresses."""

    def __init__(self, *found: tuple[int, str, int]) -> None:
        self.found = found

    def __call__(self, host: bytes, _port: int, *, type: int, flags: int) -> list[Any]:  # noqa: A002
        assert host == b"server.example"
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "")
        return [
            (family, type, 6, "", (address, port) if family == socket.AF_INET else (address, port, 0, 0))
            for family, address, port in self.found
        ]


def test_addresses_are_tried_until_one_answers(
    monkeypatch: pytest.MonkeyPatch, closed_port: int, full_port: int
) -> None:
    with Server(offers({b"x": MIB})) as server:
        found = [
            (socket.AF_INET6, "::1", 1),
            (socket.AF_INET, "127.0.0.1", closed_port),
            (socket.AF_INET, "127.0.0.1", full_port),
            (socket.AF_INET, "127.0.0.1", server.port),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", Resolver(*found))
        # The full port gets a fair part of the time, not all of it.
        sock, export = open_export(URI.parse("nbd://server.example/x"), Deadline(2))
        sock.close()
        assert export.size == MIB


def test_addresses_that_failed_are_named_with_their_reasons(
    monkeypatch: pytest.MonkeyPatch, closed_port: int, full_port: int
) -> None:
    found = [
        (socket.AF_INET6, "::1", 1),
        (socket.AF_INET, "127.0.0.1", closed_port),
        (socket.AF_INET, "127.0.0.1", full_port),
        (socket.AF_INET, "127.0.0.1", full_port),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", Resolver(*found))
    error = refusal_of(URI.parse("nbd://server.example/x"), SHORT)
    assert type(error) is ConnectFailed
    assert str(error) == (
        "Can't connect to server.example:10809 ([::1]:1: connection refused, nothing listens there; "
        f"127.0.0.1:{closed_port}: connection refused, nothing listens there; 127.0.0.1:{full_port}: no answer)."
    )


def test_addresses_that_are_tried_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, "::1", port) for port in range(1, 1000)]
    monkeypatch.setattr(socket, "getaddrinfo", Resolver(*found))
    assert str(refusal_of(URI.parse("nbd://server.example/x"))).count("refused") == transport.MAX_ADDRESSES


def test_socket_connected_to_itself_is_not_a_server() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        with pytest.raises(OSError, match="refused") as caught:
            transport._refuse_self(sock)
        assert caught.value.errno == errno.ECONNREFUSED


# Unix sockets.


def test_unix_socket_that_is_missing_raises_connect_failed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    uri = URI.parse(f"nbd+unix:///x?socket={path}")
    assert str(refusal_of(uri)) == (f"Can't connect to {path}: there is no such socket, the server may not be running.")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert str(refusal_of(uri)) == f"Can't connect to {path}: connection refused, nothing listens there."
    path.unlink()
    path.write_text("no socket")
    assert str(refusal_of(uri)) == f"Can't connect to {path}: connection refused, nothing listens there."
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        path.unlink()
        listener.bind(str(path))
        assert str(refusal_of(uri)) == f"Can't connect to {path}: the socket is not a stream socket."


def test_unix_socket_path_that_is_too_long_raises_connect_failed() -> None:
    path = "/" + "s" * MAX_SOCKET_PATH
    error = refusal_of(URI(tls=False, host=None, port=10809, socket=path, export=""))
    assert type(error) is ConnectFailed
    assert str(error).endswith("the path of a Unix socket has at most 107 bytes, not 108.")


def test_unix_server_that_accepts_nothing_times_out_at_the_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(path)
        listener.listen(0)
        caller.connect(path)
        error = refusal_of(URI.parse(f"nbd+unix:///x?socket={path}"), SHORT)
        assert type(error) is TimedOut
        assert str(error) == f"There was no connection to {path} within {SHORT:g} s: the server accepts none."


def test_unix_server_that_accepts_late_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(path)
        listener.listen(0)
        caller.connect(path)

        def make_room() -> None:
            listener.accept()[0].close()

        late = threading.Timer(SHORT, make_room)
        late.start()
        connect(URI.parse(f"nbd+unix:///x?socket={path}"), Deadline(LONG)).close()
        late.join(LONG)


# Servers that are none, or leave.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("said", "read", "sentence"),
    [
        (b"", 0, "closed the connection when its greeting was due. Perhaps it is not an NBD server, or does not let"),
        (b"NBDM", 0, "closed the connection after only 4 of 8 bytes of its greeting."),
        (greeting()[:-1], 0, "closed the connection after only 1 of 2 bytes of its greeting."),
        (greeting(), 4 + 30, "closed the connection when its reply to NBD_OPT_GO was due."),
        (
            greeting() + accepts(GO)[:7],
            4 + 30,
            "closed the connection after only 7 of 20 bytes of its reply to NBD_OPT_GO",
        ),
        (greeting() + accepts(GO)[:-20], 4 + 30, "closed the connection when its reply to NBD_OPT_GO was due."),
        (
            greeting() + reply(GO, 0x80000001),
            4 + 30 + 16,
            "closed the connection when its reply to NBD_OPT_EXPORT_NAME was due. Most likely it does not have a",
        ),
        (b"HTTP/1.1 408 Request Timeout\r\n\r\n", 0, "is not an NBD server but a web server"),
    ],
)
def test_server_that_closes_is_reported_with_the_step(family: int, said: bytes, read: int, sentence: str) -> None:
    with Server(says_and_closes(said, read), family) as server:
        error = refusal_of(server.uri())
        assert type(error) is NegotiationFailed
        assert str(error).startswith(f"The NBD server {server.uri().address} {sentence}")


def test_server_that_resets_is_reported() -> None:
    def reset(conn: socket.socket) -> None:
        conn.sendall(greeting())
        receive(conn, 4 + 30)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with Server(reset) as server:
        error = refusal_of(server.uri())
        assert type(error) is NegotiationFailed
        assert (
            f"{server.uri().address} broke the connection when its reply to NBD_OPT_GO was due: connection reset"
            in (str(error))
        )


def test_server_that_resets_at_once_is_reported_at_any_step() -> None:
    def reset(conn: socket.socket) -> None:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with Server(reset) as server:
        address = server.uri().address
        sentences = {
            f"The NBD server {address} broke the connection when its greeting was due: connection reset by peer.",
            f"Can't connect to {address}: connection reset by peer.",
            f"Can't connect to {address}: the server closed the connection at once.",
        }
        for _ in range(50):
            assert str(refusal_of(server.uri())) in sentences


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (b"", f"did not send its greeting within {SHORT:g} s. Perhaps it is not an NBD server"),
        (b"NBDM", f"sent only 4 of 8 bytes of its greeting within {SHORT:g} s."),
        (greeting(), f"did not send its reply to NBD_OPT_GO within {SHORT:g} s."),
        (greeting() + accepts(GO)[:50], f"sent only 18 of 20 bytes of its reply to NBD_OPT_GO within {SHORT:g} s."),
    ],
)
def test_server_that_falls_silent_times_out_at_the_deadline(said: bytes, sentence: str) -> None:
    with Server(says(said)) as server:
        error = refusal_of(server.uri(), SHORT)
        assert type(error) is TimedOut
        assert str(error).startswith(f"The NBD server {server.uri().address} {sentence}")


def test_server_that_sends_byte_by_byte_times_out_at_the_deadline() -> None:
    over = threading.Event()

    def drip(conn: socket.socket) -> None:
        # Each byte comes well within the deadline; all of them never do.
        for octet in greeting() + accepts(GO):
            if over.wait(SHORT / 10):
                return
            conn.sendall(bytes([octet]))

    with Server(drip) as server:
        start = time.monotonic()
        error = refusal_of(server.uri(), SHORT)
        over.set()
        assert type(error) is TimedOut
        assert f"within {SHORT:g} s." in str(error)
        assert time.monotonic() - start < LONG


def test_server_that_sends_without_end_is_refused() -> None:
    def babble(conn: socket.socket) -> None:
        conn.sendall(greeting())
        while True:
            conn.sendall(reply(GO, 99, b"x" * 1000))

    with Server(babble) as server:
        assert "sent more than 256 replies" in str(refusal_of(server.uri()))


def test_server_that_reads_nothing_times_out_at_the_deadline() -> None:
    def push() -> Steps[None]:
        yield Send(bytes(64 * MIB), "a lot")

    near, far = socket.socketpair()
    with near, far, pytest.raises(TimedOut, match="did not take a lot within"):
        negotiate(near, push(), Deadline(SHORT))


def test_server_that_is_gone_when_we_send_is_reported() -> None:
    def push() -> Steps[None]:
        yield Send(b"hello", "our greeting")

    near, far = socket.socketpair()
    far.close()
    with near, pytest.raises(NegotiationFailed, match=r"before it took our greeting \(broken pipe\)\."):
        negotiate(near, push(), Deadline(LONG))


def test_connect_leaves_no_socket_behind_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    class Kept(socket.socket):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    with Server(says_and_closes(b"HTTP/1.1")) as server, monkeypatch.context() as patch:
        patch.setattr(socket, "socket", Kept)
        refusal_of(server.uri())
        with pytest.raises(NegotiationFailed):
            list_exports(server.uri(), Deadline(LONG))
    ours = [sock for sock in made if sock.fileno() != -1]
    assert made
    assert not ours


# The deadline.


def test_deadline_that_has_passed_says_what_was_not_done() -> None:
    deadline = Deadline(0)
    with pytest.raises(TimedOut, match=r"^The node did not appear within 0 s\.$"):
        deadline.remaining("The node did not appear")
    assert 0 < Deadline(LONG).remaining() <= LONG


def test_deadline_that_has_passed_prevents_any_attempt() -> None:
    with Server(offers({b"": MIB})) as server:
        assert type(refusal_of(server.uri(), 0)) is TimedOut
        assert not server.connected.is_set()


def test_deadline_covers_connecting_and_negotiating() -> None:
    def ask() -> Steps[bytes]:
        return (yield Receive(1, "a byte"))

    deadline = Deadline(SHORT)
    near, far = socket.socketpair()
    with near, far:
        for _ in range(2):
            with pytest.raises(TimedOut, match=f"within {SHORT:g} s"):
                negotiate(near, ask(), deadline)
        with pytest.raises(TimedOut):
            deadline.remaining()
