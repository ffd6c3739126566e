# SPDX-License-Identifier: MIT
"""GET /metrics, on sockets that systemd listens on: one request for each connection, bounded in time and in size.

Not `http.server` nor the server of the Prometheus library: both give every slow client a thread, as long as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from urllib.parse import urlsplit

from nbdd.metrics.families import OPENMETRICS, PLAIN, open_text, text
from nbdd.metrics.gather import Snapshot

log = logging.getLogger(__name__)

HEAD_BYTES = 8192
"""How long a request may be, without its body; nobody looks at that."""

HEAD_SECONDS = 5.0
"""How long a client may take to say what it wants."""

ANSWER_SECONDS = 15.0
"""How long the answer may take, until the client has taken the last byte."""

LINGER_SECONDS = 1.0
"""How long what a client still sends is thrown away, so that it gets its answer and not a reset."""

MAX_CLIENTS = 32
"""More at once are turned away."""

IDLE_SECONDS = 300.0
"""After so long without a client the program ends; systemd starts it for the next one. Scrapes are less far apart."""

_LAST_SECONDS = 0.1
"""For a client that was let in just before the door was closed."""


class Refusal(Exception):
    """A request that gets no metrics; ``str()`` is for the person who sent it."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """Answers with what `look` finds; see the limits above."""

    def __init__(
        self,
        look: Callable[[], Awaitable[Snapshot]],
        *,
        idle_seconds: float = IDLE_SECONDS,
        head_seconds: float = HEAD_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._look = look
        self._idle_seconds, self._head_seconds, self._answer_seconds = idle_seconds, head_seconds, answer_seconds
        self._clients = 0
        self._idle: asyncio.TimerHandle | None = None
        self._end = asyncio.Event()
        self._looking: asyncio.Future[Snapshot] | None = None
        self._problem = ""

    def stop(self) -> None:
        """End `run` when those who are being served have their answers."""
        self._end.set()

    async def run(self, listeners: Iterable[socket.socket]) -> None:
        """Serve until nobody has come for a while, or `stop`; the listeners are closed then."""
        doors = [await asyncio.start_server(self._welcome, sock=one, limit=HEAD_BYTES) for one in listeners]
        self._wait_for_idleness()
        await self._end.wait()
        for door in doors:
            door.close()
        self._idle_seconds = 0  # who comes now waits for the next of us: be gone with the last client
        await asyncio.sleep(_LAST_SECONDS)
        while self._clients:
            self._end.clear()
            await self._end.wait()

    def _wait_for_idleness(self) -> None:
        self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self.stop)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._clients == MAX_CLIENTS:
            writer.write(_answer(HTTPStatus.SERVICE_UNAVAILABLE, *_told("Too many clients at once.")))
            writer.close()
            return
        if self._idle is not None:
            self._idle.cancel()
        self._clients += 1
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError) as problem:
            log.debug("a client is lost: %r", problem)
        finally:
            # What was to be sent is sent by now, or nobody takes it.
            writer.transport.abort()
            self._clients -= 1
            if not self._clients:
                self._wait_for_idleness()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # so that `drain` returns when all is out
        try:
            method, accept = await self._request(reader)
            answer = _answer(HTTPStatus.OK, *await self._metrics(accept), head_only=method == "HEAD")
        except Refusal as refusal:
            answer = _answer(refusal.status, *_told(str(refusal)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # it left without a whole request
        except Exception as problem:  # noqa: BLE001 - no client gets a traceback, and none ends the service
            log.error("This is a mistake in nbdd-metrics, please report it: %s: %s", type(problem).__name__, problem)
            answer = _answer(HTTPStatus.INTERNAL_SERVER_ERROR, *_told("The journal of nbdd-metrics has the reason."))
        async with asyncio.timeout(self._answer_seconds):
            writer.write(answer)
            await writer.drain()
        writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await reader.read(HEAD_BYTES):
                    pass

    async def _request(self, reader: asyncio.StreamReader) -> tuple[str, str]:
        """The method, and what the client accepts; `Refusal` for all but a good request for the metrics."""
        try:
            async with asyncio.timeout(self._head_seconds):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise Refusal(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"A request has up to {HEAD_BYTES} bytes."
            ) from None
        except TimeoutError:
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "No whole request came in time.") from None
        first, *fields = head.decode("latin-1").split("\r\n")
        match first.split(" "):
            case [method, target, "HTTP/1.0" | "HTTP/1.1"]:
                pass
            case _:
                raise Refusal(HTTPStatus.BAD_REQUEST, "This is not HTTP/1.1.")
        if method not in {"GET", "HEAD"}:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "There is GET, and HEAD.")
        try:
            path = urlsplit(target).path
        except ValueError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "This is no URL.") from None
        if path != "/metrics":
            raise Refusal(HTTPStatus.NOT_FOUND, "The metrics of nbdd are at /metrics.")
        named = (field.partition(":") for field in fields)
        return method, ",".join(value for name, _, value in named if name.lower() == "accept")

    async def _metrics(self, accept: str) -> tuple[str, bytes]:
        snapshot = await self._snapshot()
        if snapshot.problem != self._problem:  # once, and not with every scrape
            log.warning("%s", snapshot.problem or "nbdd answers again.")
        self._problem = snapshot.problem
        if "application/openmetrics-text" in accept.lower():
            return OPENMETRICS, open_text(snapshot)
        return PLAIN, text(snapshot)

    async def _snapshot(self) -> Snapshot:
        """One look at nbdd at a time: who comes meanwhile gets what it finds."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        return await asyncio.shield(self._looking)


def _told(sentence: str) -> tuple[str, bytes]:
    return "text/plain; charset=utf-8", f"{sentence}\n".encode()


def _answer(status: HTTPStatus, kind: str, body: bytes, *, head_only: bool = False) -> bytes:
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        head += "Allow: GET, HEAD\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + (b"" if head_only else body)
