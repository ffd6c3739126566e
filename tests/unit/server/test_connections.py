# SPDX-License-Identifier: MIT
"""Connections: what a scripted server offers, checked against what the definition asks for."""

from __future__ import annotations

import errno
import itertools
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pytest

from nbdd.config.definition import Definition
from nbdd.errors import ConnectFailed, NegotiationFailed, NoSuchExport, ServerError, TimedOut
from nbdd.protocol import Flags
from nbdd.server.connect import Deadline
from nbdd.server.connections import Connections, disconnect, disconnect_reason, open_connections
from nbdd.uri import URI
from tests.fakes.servers import GO, HAS_FLAGS, MIB, Server, ack, greeting, info_blocks, info_export, offers, says
from tests.fakes.worker import open_fds

SECONDS = 30.0
READ_ONLY = HAS_FLAGS | int(Flags.NBD_FLAG_READ_ONLY)
MULTI = HAS_FLAGS | int(Flags.NBD_FLAG_CAN_MULTI_CONN)


def wanted(*uris: URI, **fields: Any) -> Definition:
    return Definition("disk", uris, **fields)


def open_from(serve: Callable[[socket.socket], None], **fields: Any) -> Connections:
    with Server(serve) as server:
        return open_connections(wanted(server.uri(), **fields), Deadline(SECONDS))


def refusal_from(serve: Callable[[socket.socket], None], **fields: Any) -> str:
    """The sentence; no descriptor may be left."""
    with Server(serve) as server:
        definition = wanted(server.uri(), **fields)
        with pytest.raises(NegotiationFailed) as caught:
            open_connections(definition, Deadline(SECONDS))
    return str(caught.value)


def with_blocks(minimum: int, size: int = MIB) -> Callable[[socket.socket], None]:
    blocks = info_blocks(GO, minimum, max(minimum, 4096), 1 << 25)
    return says(greeting() + info_export(GO, size) + blocks + ack(GO))


def in_turn(*serves: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """A server that is another one for each connection."""
    turns = itertools.chain(serves, itertools.repeat(serves[-1]))

    def serve(conn: socket.socket) -> None:
        next(turns)(conn)

    return serve


@pytest.mark.parametrize(("minimum", "chosen"), [(1, 512), (512, 512), (4096, 4096), (65536, 65536)])
def test_block_size_is_the_servers_minimum_and_at_least_the_kernels(minimum: int, chosen: int) -> None:
    with open_from(with_blocks(minimum)) as connections:
        assert connections.block_size == chosen


def test_block_size_is_the_kernels_smallest_if_the_server_says_none() -> None:
    with open_from(offers({b"": MIB})) as connections:
        assert connections.block_size == 512


def test_block_size_of_the_definition_is_taken() -> None:
    with open_from(with_blocks(512), block_size=4096) as connections:
        assert connections.block_size == 4096


def test_block_size_below_the_servers_minimum_is_refused() -> None:
    assert "takes no requests below 4096 bytes" in refusal_from(with_blocks(4096), block_size=512)


def test_size_with_a_rest_below_one_block_gives_a_warning() -> None:
    with open_from(offers({b"": MIB + 100})) as connections:
        assert connections.export.size == MIB + 100
        assert "the last 100 are not reachable" in connections.warnings[0]


@pytest.mark.parametrize(
    ("flags", "asked", "read_only"),
    [
        (HAS_FLAGS, None, False),
        (HAS_FLAGS, False, False),
        (HAS_FLAGS, True, True),
        (READ_ONLY, None, True),
        (READ_ONLY, True, True),
    ],
)
def test_connections_are_read_only_if_the_server_or_the_definition_says_so(
    flags: int, asked: bool | None, read_only: bool
) -> None:
    with open_from(offers({b"": MIB}, flags), read_only=asked) as connections:
        assert connections.read_only is read_only


def test_read_only_export_is_refused_if_writing_was_asked_for() -> None:
    assert "offered read-only" in refusal_from(offers({b"": MIB}, READ_ONLY), read_only=False)


def test_export_of_size_0_is_refused() -> None:
    assert "size of 0 bytes" in refusal_from(offers({b"": 0}))


def test_export_that_does_not_exist_raises_no_such_export() -> None:
    with Server(offers({b"other": MIB})) as server, pytest.raises(NoSuchExport):
        open_connections(wanted(server.uri("disk")), Deadline(SECONDS))


def test_connections_are_several_if_the_server_allows_them() -> None:
    with open_from(offers({b"": MIB}, MULTI), connections=4) as connections:
        assert len(connections.sockets) == 4
        assert connections.warnings == ()


def test_connections_are_one_if_the_server_does_not_allow_more() -> None:
    with open_from(offers({b"": MIB}), connections=4) as connections:
        assert len(connections.sockets) == 1
        assert "does not allow several connections; one is used instead of 4" in connections.warnings[0]


def test_connections_can_be_another_number_than_the_definitions() -> None:
    with Server(offers({b"": MIB}, MULTI)) as server:
        definition = wanted(server.uri(), connections=4)
        with open_connections(definition, Deadline(SECONDS), 2) as connections:
            assert len(connections.sockets) == 2


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (offers({b"": 2 * MIB}, MULTI), "the size was 1048576 and is 2097152"),
        (offers({b"": MIB}, MULTI | int(Flags.NBD_FLAG_READ_ONLY)), "the flags was"),
        (says(greeting() + info_export(GO, MIB, MULTI) + info_blocks(GO, 4096, 4096, 1 << 25) + ack(GO)), "minimum"),
    ],
)
def test_connections_that_disagree_are_refused(second: Callable[[socket.socket], None], what: str) -> None:
    sentence = refusal_from(in_turn(offers({b"": MIB}, MULTI), second), connections=2)
    assert "not the same on every connection" in sentence
    assert what in sentence


def test_server_that_offers_what_is_asked_for_first_is_taken() -> None:
    with Server(offers({b"": 0})) as first, Server(offers({b"": MIB})) as second, Server(offers({b"": MIB})) as third:
        definition = wanted(first.uri(), second.uri(), third.uri())
        with open_connections(definition, Deadline(SECONDS)) as connections:
            assert connections.uri == second.uri()
        assert not third.connected.is_set()


def test_server_that_is_silent_leaves_time_for_the_next() -> None:
    with Server(says(b"")) as silent, Server(offers({b"": MIB})) as good:
        definition = wanted(silent.uri(), good.uri())
        with open_connections(definition, Deadline(4)) as connections:
            assert connections.uri == good.uri()


def test_servers_that_failed_are_all_named_with_the_last_ones_class() -> None:
    with Server(says(b"")) as gone:
        pass
    with Server(offers({b"": 0})) as empty:
        definition = wanted(empty.uri(), gone.uri())
        with pytest.raises(ConnectFailed) as caught:
            open_connections(definition, Deadline(SECONDS))
    assert "size of 0 bytes" in str(caught.value)
    assert "nothing listens" in str(caught.value)


def test_servers_that_are_silent_end_with_the_deadline() -> None:
    with Server(says(b"")) as one, Server(says(b"")) as two, pytest.raises(TimedOut):
        open_connections(wanted(one.uri(), two.uri()), Deadline(0.4))


@pytest.mark.parametrize(
    "serve",
    [
        offers({b"": 0}),
        offers({b"": MIB}, READ_ONLY),
        in_turn(offers({b"": MIB}, MULTI), offers({b"": MIB}, MULTI), offers({b"": 0}, MULTI)),
        in_turn(offers({b"": MIB}, MULTI), says(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
    ],
)
def test_connections_that_are_refused_leave_no_descriptor(serve: Callable[[socket.socket], None]) -> None:
    before = open_fds()
    with Server(serve) as server, pytest.raises(ServerError):
        open_connections(wanted(server.uri(), connections=3, read_only=False), Deadline(SECONDS))
    assert open_fds() == before


# The end of a connection


def ending_of(sock: socket.socket, kill: Callable[[], None]) -> str:
    """Why the connection ended, once it has."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    kill()
    assert poll.poll(SECONDS * 1000)
    with sock:
        return disconnect_reason(sock)


@pytest.fixture
def tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: our end, and the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            yield ours, theirs


def test_disconnect_reason_of_a_connection_that_the_server_closed(tcp: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = tcp
    assert ending_of(ours, theirs.close) == "the server closed it"


def test_disconnect_reason_of_a_connection_that_was_reset(tcp: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = tcp
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ending_of(ours, theirs.close) == "the server reset it"


def test_disconnect_reason_of_a_connection_that_the_kernel_closed(tcp: tuple[socket.socket, socket.socket]) -> None:
    ours, _theirs = tcp
    # As the driver does with a socket whose request took too long.
    assert ending_of(ours, lambda: ours.shutdown(socket.SHUT_RDWR)).startswith("the kernel closed it")


def test_disconnect_reason_of_a_unix_connection_that_the_server_closed() -> None:
    ours, theirs = socket.socketpair()
    assert ending_of(ours, theirs.close) == "the server closed it"


class DeadSocket:
    """A TCP socket as it is left behind."""

    family = socket.AF_INET

    def __init__(self, error: int, state: int, silent: int) -> None:
        self._error = error
        self._info = struct.pack("=B55xI", state, silent)

    def getsockopt(self, _level: int, option: int, _length: int = 0) -> int | bytes:
        found: dict[int, int | bytes] = {socket.TCP_INFO: self._info, socket.TCP_USER_TIMEOUT: 30_000}
        return found.get(option, self._error)


@pytest.mark.parametrize(
    ("error", "silent", "why"),
    [
        (errno.ETIMEDOUT, 0, "the server's machine was silent for 30 s"),
        (0, 30_100, "the server's machine was silent for 30 s"),
        (0, 12_000, "the server closed it"),
        (errno.EHOSTUNREACH, 30_100, "no route to host"),
    ],
)
def test_disconnect_reason_is_a_timeout_even_if_the_driver_has_taken_the_error(
    error: int, silent: int, why: str
) -> None:
    assert disconnect_reason(cast(socket.socket, DeadSocket(error, 7, silent))) == why


# Connections that are not used


DISC = bytes.fromhex("25609513 0000 0002 0000000000000000 0000000000000000 00000000")
"""A request of type NBD_CMD_DISC."""


def overheard(act: Callable[[Definition], None], flags: int = MULTI) -> list[bytes]:
    """What a server hears on each connection after the negotiation, until the client hangs up."""
    heard: list[bytes] = []

    class Ear:
        """The server's end, with an ear on what `offers` reads and ignores."""

        def __init__(self, conn: socket.socket) -> None:
            self._conn = conn
            self.octets = b""

        def sendall(self, octets: bytes) -> None:
            self._conn.sendall(octets)

        def recv(self, count: int) -> bytes:
            octets = self._conn.recv(count)
            # Only the end of the conversation is read in such portions.
            self.octets += octets if count == 65536 else b""
            return octets

    def serve(conn: socket.socket) -> None:
        ear = Ear(conn)
        offers({b"": MIB}, flags)(cast(socket.socket, ear))
        heard.append(ear.octets)

    with Server(serve) as server:
        act(wanted(server.uri(), connections=2))
    return heard


def test_connections_that_are_not_used_send_disconnect() -> None:
    received = overheard(lambda definition: open_connections(definition, Deadline(SECONDS)).close())
    assert received == [DISC, DISC]


def test_connections_that_are_refused_send_disconnect() -> None:
    def refuse(definition: Definition) -> None:
        with pytest.raises(NegotiationFailed):
            open_connections(replace(definition, read_only=False), Deadline(SECONDS))

    assert overheard(refuse, flags=MULTI | READ_ONLY) == [DISC]


def test_disconnect_closes_a_connection_that_takes_nothing_more() -> None:
    ours, theirs = socket.socketpair()
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(65536), socket.MSG_DONTWAIT)
    disconnect(ours)
    assert ours.fileno() == -1
    theirs.close()
