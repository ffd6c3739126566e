# SPDX-License-Identifier: MIT
"""The channel between nbdd's processes: whole messages, the right descriptors, and nobody's rubbish."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator

import pytest

import nbdd.ipc.channel
from nbdd.ipc.channel import Channel, ChannelError, Message
from tests.fakes.worker import open_fds

Pair = tuple[Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A channel, and the bare socket at its other end."""
    ours, theirs = Channel.pair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_channel_delivers_messages_whole_and_in_order_however_cut(pair: Pair) -> None:
    channel, peer = pair
    wire = b'{"a":1}\n{"b":"\\u00e4"}\n{}\n'
    got: list[Message] = []
    for octet in wire:
        peer.send(bytes([octet]))
        assert channel.receive()
        while (found := channel.pop()) is not None:
            got.append(found[0])
    assert got == [{"a": 1}, {"b": "ä"}, {}]


def test_channel_delivers_messages_of_one_read_one_by_one(pair: Pair) -> None:
    channel, peer = pair
    peer.send(b'{"a":1}\n{"b":2}\n{"c"')
    assert channel.wait() == ({"a": 1}, [])
    assert channel.wait() == ({"b": 2}, [])
    assert channel.pop() is None
    peer.send(b":3}\n")
    assert channel.wait() == ({"c": 3}, [])


def test_channel_delivers_message_larger_than_every_buffer(pair: Pair) -> None:
    channel, peer = pair
    other = Channel(peer)
    message = {"exports": ["x" * 100] * 50_000}
    writer = threading.Thread(target=other.send, args=(message,))
    writer.start()
    assert channel.wait() == (message, [])
    writer.join(30)


def test_channel_delivers_descriptors_with_their_message(pair: Pair) -> None:
    channel, peer = pair
    other = Channel(peer)
    read_one, write_one = os.pipe()
    read_two, write_two = os.pipe()
    other.send({"n": 1}, [write_one])
    other.send({"n": 2})
    other.send({"n": 3}, [write_two, write_one])
    for fd in (write_one, write_two):
        os.close(fd)
    got = [channel.wait() for _ in range(3)]
    assert [found[0]["n"] for found in got if found] == [1, 2, 3]
    assert [len(found[1]) for found in got if found] == [1, 0, 2]
    assert got[2] is not None
    os.write(got[2][1][0], b"two")
    assert os.read(read_two, 9) == b"two"
    for fd in [read_one, read_two, *(fd for found in got if found for fd in found[1])]:
        os.close(fd)


def test_channel_descriptors_are_not_inherited(pair: Pair) -> None:
    channel, peer = pair
    Channel(peer).send({}, [0])
    found = channel.wait()
    assert found is not None
    assert not os.get_inheritable(found[1][0])
    os.close(found[1][0])


def test_channel_close_closes_descriptors_not_taken() -> None:
    before = open_fds()
    ours, theirs = Channel.pair()
    channel = Channel(ours)
    Channel(theirs).send({}, [0, 1, 2])
    assert channel.receive()
    assert open_fds() == before + 5
    channel.close()
    theirs.close()
    assert open_fds() == before


def test_channel_end_of_stream_is_no_error(pair: Pair) -> None:
    channel, peer = pair
    peer.send(b'{"last":1}\n')
    peer.close()
    assert channel.wait() == ({"last": 1}, [])
    assert channel.wait() is None


def test_channel_peer_gone_with_unread_messages_is_end_of_stream(pair: Pair) -> None:
    channel, peer = pair
    channel.send({"unread": 1})
    peer.close()
    assert channel.wait() is None
    with pytest.raises(OSError, match="pipe"):
        channel.send({})


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"hello\n", "not JSON"),
        (b"\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[1]\n", "not a JSON object"),
        (b"null\n", "not a JSON object"),
        (b"[" * 200_000 + b"\n", "not JSON"),
        (b'{"fds":1}\n', "descriptors are missing"),
        (b'{"fds":-1}\n', "descriptors are missing"),
        (b'{"fds":"x"}\n', "descriptors are missing"),
        (b'{"fds":99999999999}\n', "descriptors are missing"),
    ],
)
def test_channel_refuses_what_is_no_message(pair: Pair, line: bytes, why: str) -> None:
    channel, peer = pair
    writer = threading.Thread(target=peer.sendall, args=(line,))
    writer.start()
    with pytest.raises(ChannelError, match=why):
        channel.wait()
    writer.join(30)


def test_channel_refuses_line_without_end_in_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.ipc.channel, "MAX_LINE", 8 << 20)
    channel, peer = pair

    def flood() -> None:
        try:
            while True:
                peer.send(b"x" * 65536)
        except OSError:
            return

    writer = threading.Thread(target=flood)
    writer.start()
    with pytest.raises(ChannelError, match="too long"):
        channel.wait()
    channel.close()
    writer.join(30)
    assert not writer.is_alive()


def test_channel_refuses_descriptors_not_announced(pair: Pair) -> None:
    channel, peer = pair
    before = open_fds()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 50))]

    def pour() -> None:
        for _ in range(20):
            peer.sendmsg([b" "], rights)
            assert channel.receive()

    with pytest.raises(ChannelError, match="descriptors"):
        pour()
    channel.close()
    assert open_fds() == before - 1


def test_channel_non_blocking_raises_if_empty_or_full(pair: Pair) -> None:
    channel, _peer = pair
    channel.setblocking(False)
    with pytest.raises(BlockingIOError):
        channel.receive()

    def pour() -> None:
        while True:
            channel.send({"x": "y" * 10_000})

    with pytest.raises(BlockingIOError):
        pour()
