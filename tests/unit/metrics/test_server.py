# SPDX-License-Identifier: MIT
"""GET /metrics over HTTP, from well-meaning clients and from hostile ones."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdd.metrics.families import OPENMETRICS, PLAIN, text
from nbdd.metrics.gather import Snapshot
from nbdd.metrics.server import HEAD_BYTES, MAX_CLIENTS, Server
from tests.fakes.asserts import run
from tests.fakes.manager import DEADLINE
from tests.fakes.metrics import device


class Served:
    """A server of the test's own; `end` is done when it has ended."""

    def __init__(self, look: Callable[[], Awaitable[Snapshot]], **limits: float) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.server = Server(look, **limits)
        self.end = asyncio.ensure_future(self.server.run([self._listener]))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.stop()
        await self.end

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def talk(self, said: bytes, *, hang_up: bool = False) -> bytes:
        """Say something, and hear all that is answered."""
        reader, writer = await self.connect()
        try:
            writer.write(said)
            if hang_up:
                writer.write_eof()
            return await reader.read()
        finally:
            writer.close()


SCRAPE = b"GET /metrics HTTP/1.1\r\n\r\n"


async def nothing() -> Snapshot:
    return Snapshot(at=1)


async def request(said: bytes, **limits: float) -> tuple[str, bytes, bytes]:
    """The status line, the head and the body of the answer."""
    async with Served(nothing, **limits) as served:
        head, _, body = (await served.talk(said)).partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0].decode(), head, body


async def test_server_answers_in_the_format_that_was_asked_for() -> None:
    wanted = (
        b"GET /metrics HTTP/1.1\r\nHost: x\r\naccept: application/openmetrics-text;version=1.0.0,text/plain\r\n\r\n"
    )
    status, head, body = await request(wanted)
    assert status == "HTTP/1.1 200 OK"
    assert f"Content-Type: {OPENMETRICS}\r\n".encode() in head
    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert body.endswith(b"# EOF\n")
    status, head, body = await request(b"GET http://x/metrics?a=b HTTP/1.0\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert f"Content-Type: {PLAIN}\r\n".encode() in head
    assert body == text(Snapshot(at=1))


async def test_server_answers_head_with_the_head_alone() -> None:
    status, head, body = await request(b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert (status, body) == ("HTTP/1.1 200 OK", b"")
    assert f"Content-Length: {len(text(Snapshot(at=1)))}\r\n".encode() in head


OTHERS = {
    "another path": (b"GET / HTTP/1.1\r\n\r\n", 404),
    "a path that climbs": (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", 404),
    "no URL": (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
    "no version": (b"GET /metrics\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "nothing": (b"\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x00\xff\r\n\r\n", 400),
    "POST": (b"POST /metrics HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n" + bytes(3_000_000), 405),
    "DELETE": (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
    "a long head": (b"GET /metrics HTTP/1.1\r\nCookie: " + b"x" * HEAD_BYTES + b"\r\n\r\n", 431),
    "a very long line": (b"x" * 3_000_000, 431),
}


@pytest.mark.parametrize(("said", "status"), OTHERS.values(), ids=OTHERS)
async def test_server_answers_any_other_request_with_its_status_and_a_sentence(said: bytes, status: int) -> None:
    first, _, body = await request(said)
    assert int(first.split()[1]) == status
    assert body.endswith(b".\n")
    assert body.count(b"\n") == 1


async def test_server_sends_no_reset_to_a_client_that_reads_last() -> None:
    async with Served(nothing) as served:

        def talk() -> bytes:
            with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as client:
                client.sendall(b"POST /metrics HTTP/1.1\r\n\r\n" + bytes(8 << 20))
                return client.recv(1 << 16)

        assert (await asyncio.to_thread(talk)).startswith(b"HTTP/1.1 405 ")


async def test_server_names_the_allowed_methods() -> None:
    assert b"\r\nAllow: GET, HEAD\r\n" in (await request(b"PUT /metrics HTTP/1.1\r\n\r\n"))[1]


async def answers(said: list[bytes]) -> list[bytes]:
    async with Served(nothing) as served:
        return [await served.talk(one, hang_up=True) for one in said]


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=300), max_size=20))
def test_server_survives_garbage_and_sends_no_traceback(said: list[bytes]) -> None:
    for answer in run(answers(said)):
        assert b"Traceback" not in answer
        assert b"journal" not in answer
        assert not answer or answer.startswith(b"HTTP/1.1 ")


async def test_server_times_out_a_client_that_sends_nothing() -> None:
    assert (await request(b"GET /metr", head_seconds=0.05))[0] == "HTTP/1.1 408 Request Timeout"


async def test_server_gives_up_a_client_that_does_not_read() -> None:
    big = Snapshot(at=1, devices=tuple(device(Name=f"disk{number}") for number in range(5000)))

    async def look() -> Snapshot:
        return big

    # The server ends when it has had no client for a moment: so this one is given up.
    async with Served(look, answer_seconds=0.1, idle_seconds=0.5) as served:
        _, writer = await served.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(SCRAPE)
        await served.end
        writer.transport.abort()


async def test_server_refuses_clients_over_its_limit_and_serves_later_ones() -> None:
    async with Served(nothing) as served:
        slow = [await served.connect() for _ in range(MAX_CLIENTS)]
        assert (await served.talk(b"")).startswith(b"HTTP/1.1 503 ")
        for _, writer in slow:
            writer.write(SCRAPE)
        for reader, writer in slow:
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
        while (answer := await served.talk(SCRAPE)).startswith(b"HTTP/1.1 503 "):
            pass  # the server has not yet seen all of them leave
        assert answer.startswith(b"HTTP/1.1 200 ")


async def test_server_asks_nbdd_once_for_scrapes_at_the_same_time() -> None:
    looks = 0
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def look() -> Snapshot:
        nonlocal looks
        looks += 1
        begun.set()
        await go_on.wait()
        return Snapshot(at=1)

    async with Served(look) as served:
        two = [asyncio.ensure_future(served.talk(SCRAPE)) for _ in range(2)]
        _, writer = await served.connect()
        writer.write(SCRAPE)
        await writer.drain()
        writer.close()  # one that leaves takes nothing from the others
        await begun.wait()
        while served.server._clients < 3:  # noqa: ASYNC110 - nothing tells that
            await asyncio.sleep(0)
        go_on.set()
        for answer in await asyncio.gather(*two):
            assert answer.startswith(b"HTTP/1.1 200 ")
        assert looks == 1
        await served.talk(SCRAPE)
        assert looks == 2


async def test_server_logs_a_bug_as_a_sentence_and_serves_the_next_scrape(caplog: pytest.LogCaptureFixture) -> None:
    looks = iter([ValueError("oops")])

    async def look() -> Snapshot:
        for problem in looks:
            raise problem
        return Snapshot(at=1)

    async with Served(look) as served:
        assert (await served.talk(SCRAPE)).startswith(b"HTTP/1.1 500 ")
        assert (await served.talk(SCRAPE)).startswith(b"HTTP/1.1 200 ")
    assert caplog.messages == ["This is a bug in nbdd-metrics, please report it: ValueError: oops"]


async def test_server_logs_one_line_when_nbdd_goes_and_one_when_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    problems = iter(["It is away.", "It is away.", "", ""])

    async def look() -> Snapshot:
        return Snapshot(1, next(problems))

    async with Served(look) as served:
        for _ in range(4):
            await served.talk(SCRAPE)
    assert caplog.messages == ["It is away.", "nbdd answers again."]


async def test_server_ends_when_idle_and_not_while_it_serves() -> None:
    go_on = asyncio.Event()

    async def look() -> Snapshot:
        await go_on.wait()
        return Snapshot(at=1)

    async with Served(look, idle_seconds=0.1) as served:
        client = asyncio.ensure_future(served.talk(SCRAPE))
        done, _ = await asyncio.wait({served.end}, timeout=0.5)
        assert not done
        assert (await served.talk(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")  # and others are let in
        go_on.set()
        assert (await client).startswith(b"HTTP/1.1 200 ")
        await served.end
