# SPDX-License-Identifier: MIT
"""GET /metrics on listening sockets of systemd: one request for each connection, bounded in time and in size.

Neither http.server nor the server of prometheus_client, which is built on it: both give each client a thread and limit
each read, not the request, so a few clients that send a byte now and then keep all threads that TasksMax= allows.
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
"""Size of a request without its body, which is ignored."""

HEAD_SECONDS = 5.0
"""How long a client may take to send its request."""

ANSWER_SECONDS = 15.0
"""How long the answer may take, until the client has taken the last byte."""

LINGER_SECONDS = 1.0
"""How long to read and ignore what a client still sends, so that it gets its answer and not a reset."""

MAX_CLIENTS = 32
"""Connections at the same time; more get status 503."""

IDLE_SECONDS = 300.0
"""Without a client for so long the program ends; systemd starts it for the next one. Scrapes are more frequent."""

_LAST_SECONDS = 0.1
"""For a client that was accepted just before the listeners were closed."""


class HTTPError(Exception):
    """A request that gets no metrics; ``str()`` is the body of the answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """Serves what `gather` returns; see the limits above."""

    def __init__(
        self,
        gather: Callable[[], Awaitable[Snapshot]],
        *,
        idle_seconds: float = IDLE_SECONDS,
        head_seconds: float = HEAD_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._gather = gather
        self._idle_seconds, self._head_seconds, self._answer_seconds = idle_seconds, head_seconds, answer_seconds
        self._clients = 0
        self._idle: asyncio.TimerHandle | None = None
        self._end = asyncio.Event()
        self._gathering: asyncio.Future[Snapshot] | None = None
        self._problem = ""

    def stop(self) -> None:
        """End `run` when all connected clients have their answers."""
        self._end.set()

    async def run(self, listeners: Iterable[socket.socket]) -> None:
        """Serve until there was no client for `idle_seconds`, or `stop`; then close the listeners."""
        servers = [await asyncio.start_server(self._accept, sock=one, limit=HEAD_BYTES) for one in listeners]
        self._start_idle_timer()
        await self._end.wait()
        log.debug("closing the listeners with %d clients left", self._clients)
        for server in servers:
            server.close()
        self._idle_seconds = 0  # systemd starts the next instance for new clients: end with the last one
        await asyncio.sleep(_LAST_SECONDS)
        while self._clients:
            self._end.clear()
            await self._end.wait()

    def _start_idle_timer(self) -> None:
        self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self.stop)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._clients == MAX_CLIENTS:
            log.debug("client refused, %d are being served", MAX_CLIENTS)
            writer.write(_answer(HTTPStatus.SERVICE_UNAVAILABLE, *_plain("Too many clients at once.")))
            writer.close()
            return
        if self._idle is not None:
            self._idle.cancel()
        self._clients += 1
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError) as problem:
            log.debug("connection to a client lost: %r", problem)
        finally:
            # Everything is sent by now, or the client does not read it.
            writer.transport.abort()
            self._clients -= 1
            if not self._clients:
                self._start_idle_timer()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # so that `drain` returns when everything is sent
        try:
            method, accept = await self._request(reader)
            answer = _answer(HTTPStatus.OK, *await self._metrics(accept), head_only=method == "HEAD")
        except HTTPError as error:
            answer = _answer(error.status, *_plain(str(error)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client closed the connection within its request
        except Exception as problem:  # noqa: BLE001 - no client gets a traceback or ends the service
            log.error("This is a bug in nbdd-metrics, please report it: %s: %s", type(problem).__name__, problem)
            answer = _answer(HTTPStatus.INTERNAL_SERVER_ERROR, *_plain("The journal of nbdd-metrics has the reason."))
        async with asyncio.timeout(self._answer_seconds):
            writer.write(answer)
            await writer.drain()
        writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await reader.read(HEAD_BYTES):
                    pass

    async def _request(self, reader: asyncio.StreamReader) -> tuple[str, str]:
        """The method and the Accept header; raises `HTTPError` for everything but a valid request for the metrics."""
        try:
            async with asyncio.timeout(self._head_seconds):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise HTTPError(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"A request has up to {HEAD_BYTES} bytes."
            ) from None
        except TimeoutError:
            raise HTTPError(HTTPStatus.REQUEST_TIMEOUT, "No whole request came in time.") from None
        first, *fields = head.decode("latin-1").split("\r\n")
        match first.split(" "):
            case [method, target, "HTTP/1.0" | "HTTP/1.1"]:
                pass
            case _:
                raise HTTPError(HTTPStatus.BAD_REQUEST, "This is not HTTP/1.1.")
        if method not in {"GET", "HEAD"}:
            raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, "There is GET, and HEAD.")
        try:
            path = urlsplit(target).path
        except ValueError:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "This is no URL.") from None
        if path != "/metrics":
            raise HTTPError(HTTPStatus.NOT_FOUND, "The metrics of nbdd are at /metrics.")
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
        """Ask nbdd once for all scrapes that come at the same time."""
        if self._gathering is None or self._gathering.done():
            self._gathering = asyncio.ensure_future(self._gather())
        return await asyncio.shield(self._gathering)


def _plain(sentence: str) -> tuple[str, bytes]:
    return "text/plain; charset=utf-8", f"{sentence}\n".encode()


def _answer(status: HTTPStatus, kind: str, body: bytes, *, head_only: bool = False) -> bytes:
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        head += "Allow: GET, HEAD\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + (b"" if head_only else body)
