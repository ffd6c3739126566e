# SPDX-License-Identifier: MIT
"""A connection without a server: every request is answered with EIO, whatever its size and however it arrives."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from nbdd.ipc.poller import Poller
from nbdd.worker.error_server import ErrorServer, remove

REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3


def request(kind: int, cookie: int, length: int = 4096) -> bytes:
    return REQUEST.pack(0x25609513, 0, kind, cookie, 0, length) + (os.urandom(length) if kind == WRITE else b"")


class Scene:
    """The kernel's end, and a loop for ours."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.gone = 0
        ours, self.kernel = socket.socketpair()
        self.kernel.settimeout(10)
        self.error_server = ErrorServer(self.poller, ours, self.went)

    def went(self) -> None:
        self.gone += 1

    def refused(self, count: int) -> list[int]:
        """The cookies of so many answers."""
        got = b""
        while len(got) < count * REPLY.size:
            self.poller.run_once(10)
            self.kernel.settimeout(0)
            with suppress(BlockingIOError):
                got += self.kernel.recv(65536)
            self.kernel.settimeout(10)
        answers = [REPLY.unpack_from(got, at) for at in range(0, len(got), REPLY.size)]
        assert {(magic, error) for magic, error, _ in answers} == {(0x67446698, errno.EIO)}
        return [cookie for _, _, cookie in answers]


@pytest.fixture
def scene() -> Iterator[Scene]:
    found = Scene()
    yield found
    found.kernel.close()
    if not found.gone:
        found.error_server.close()


def test_error_server_answers_every_request_with_eio_in_order(scene: Scene) -> None:
    scene.kernel.sendall(request(READ, 1) + request(WRITE, 2) + request(FLUSH, 3, 0) + request(WRITE, 4, 8))
    assert scene.refused(4) == [1, 2, 3, 4]


def test_error_server_joins_requests_that_arrive_in_pieces(scene: Scene) -> None:
    octets = request(WRITE, 5, 50) + request(READ, 6)
    for octet in octets[:-1]:
        scene.kernel.sendall(bytes([octet]))
        scene.poller.run_once(10)
    scene.kernel.sendall(octets[-1:])
    assert scene.refused(2) == [5, 6]


def test_error_server_reads_write_of_megabytes_to_its_end(scene: Scene) -> None:
    sender = threading.Thread(target=scene.kernel.sendall, args=(request(WRITE, 7, 5 << 20) + request(READ, 8),))
    sender.start()
    assert scene.refused(2) == [7, 8]
    sender.join()


def test_error_server_does_not_answer_disconnect(scene: Scene) -> None:
    scene.kernel.sendall(request(DISC, 0, 0) + request(READ, 9))
    assert scene.refused(1) == [9]


def test_error_server_closes_once_when_kernel_does(scene: Scene) -> None:
    scene.kernel.close()
    scene.poller.run_once(10)
    assert (scene.gone, len(scene.poller)) == (1, 0)


def test_remove_waits_until_kernel_has_closed_its_end(scene: Scene) -> None:
    scene.kernel.sendall(request(READ, 1))

    def kernel() -> None:
        while scene.kernel.recv(65536):
            pass
        scene.kernel.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=kernel)
    thread.start()
    remove(scene.error_server.fileno())
    thread.join(10)
    assert not thread.is_alive()
    scene.poller.run_once(10)
    assert scene.gone == 1
