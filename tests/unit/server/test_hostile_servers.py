# SPDX-License-Identifier: MIT
"""Servers that mean harm, over real sockets, against all that connects: library, connections, worker.

Each attack ends within the deadline, with a typed error in a printable sentence, and costs no more memory than is said
here. What needs no socket is in test_any_server.py; what reaches the manager and the kernel, in tests/system.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from nbdd.config.definition import Definition
from nbdd.ctl.show import Look, exports
from nbdd.errors import KernelError, NbddError, NegotiationFailed, ServerError, TimedOut
from nbdd.ipc.channel import Channel, Message
from nbdd.protocol import Export
from nbdd.server.connect import Deadline, list_exports, open_export
from nbdd.server.connections import open_connections
from nbdd.text import printable
from nbdd.uri import URI
from tests.fakes.hostile import (
    CAN_MULTI_CONN,
    ESCAPES,
    GOOD,
    IMPOSTORS,
    INFO,
    LIST,
    MISDEEDS,
    Misdeed,
    Patience,
    answers,
    cut,
    dialogue,
)
from tests.fakes.servers import GO, MIB, Server, accepts, ack, entry, greeting, info, info_blocks

SECONDS = 30.0
"""A test that waits so long has failed: no attack here needs the deadline, but for those of `Patience`."""

SHORT = 0.5
"""Seconds of a deadline that is meant to pass."""

PAUSE = SHORT / 5
"""Seconds between two bytes of a slow server: far below the deadline, and still all of them take much longer."""

OPENING_MIB = 32
"""Most that a worker that opens exports ever has in memory, Python's own 16 MiB included, whatever servers do."""

LISTING_MIB = 256
"""The same for a worker that lists exports, on its way to the manager included."""

Talk = Callable[[URI, Deadline], object]


def _open_export(uri: URI, deadline: Deadline) -> Export:
    sock, export = open_export(uri, deadline)
    sock.close()
    return export


def _open_connections(uri: URI, deadline: Deadline) -> Export:
    with open_connections(Definition("hostile", (uri,), connections=3), deadline) as connections:
        return connections.export


TALKS: dict[str, tuple[Talk, tuple[int, ...]]] = {
    # Who talks to a server, and with which options.
    "export": (_open_export, (GO,)),
    "connections": (_open_connections, (GO,)),
    "list": (list_exports, (LIST, INFO)),
}

ATTACKS = [
    pytest.param(TALKS[talk][0], misdeed, option, id=f"{name}-{talk}-{option}")
    for name, misdeed in MISDEEDS.items()
    for talk in TALKS
    for option in misdeed.options
    if option in TALKS[talk][1]
]


def refusal(talk: Talk, uri: URI, seconds: float = SECONDS) -> ServerError:
    """The error that it ends with, in time and fit for a terminal and a journal."""
    start = time.monotonic()
    with pytest.raises(ServerError) as caught:
        talk(uri, Deadline(seconds))
    assert time.monotonic() - start < seconds + 5
    check_sentence(str(caught.value), uri)
    return caught.value


def check_sentence(message: str, uri: URI) -> None:
    assert uri.address in message
    assert message.isprintable()
    assert printable(message) == message
    assert message.endswith(".")
    assert len(message) < 5000


# One attack after the other.


@pytest.mark.parametrize(("talk", "misdeed", "option"), ATTACKS)
def test_misdeed_is_reported_and_ends_the_negotiation(talk: Talk, misdeed: Misdeed, option: int) -> None:
    with Server(misdeed.server(option)) as server:
        error = refusal(talk, server.uri("x"))
    assert type(error) is misdeed.error
    assert misdeed.words in str(error)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_impostor_is_reported_and_ends_the_negotiation(talk: str, impostor: str) -> None:
    serve, words = IMPOSTORS[impostor]
    with Server(serve) as server:
        error = refusal(TALKS[talk][0], server.uri("x"))
    assert type(error) is NegotiationFailed
    assert words in str(error)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
@pytest.mark.parametrize("talk", TALKS)
def test_connection_that_is_cut_at_any_byte_is_reported(talk: str, family: int) -> None:
    call, (option, *_) = TALKS[talk]
    length = dialogue(option)
    with Server(cut(range(length)), family) as server:
        for count in range(length):
            error = refusal(call, server.uri("x"))
            assert type(error) is NegotiationFailed, count
            assert "closed the connection" in str(error), count
            assert ("its greeting" in str(error)) == (count < len(greeting())), count
    with Server(cut(itertools.repeat(length)), family) as server:
        call(server.uri("x"), Deadline(SECONDS))


def test_server_that_takes_its_time_times_out_at_the_deadline() -> None:
    # All at the same time, since each lasts as long as the deadline.
    patience = Patience()
    with ExitStack() as stack:
        attacks: list[tuple[Talk, URI]] = []
        for call, (option, *_) in TALKS.values():
            end = dialogue(option)
            serves = [patience.silent(count) for count in (0, 5, 18, 18 + 13, 18 + 20 + 3, end - 20, end - 1)]
            serves += [patience.slow(count, PAUSE) for count in (0, 18, end - 20)]
            serves.append(patience.deaf(option))
            attacks += [(call, stack.enter_context(Server(serve)).uri("x")) for serve in serves]
        pool = stack.enter_context(ThreadPoolExecutor(len(attacks)))
        stack.callback(patience.over.set)
        list(pool.map(lambda attack: _given_up(*attack), attacks, timeout=SECONDS))


def _given_up(call: Talk, uri: URI) -> None:
    start = time.monotonic()
    # A list that is told already is told, and says where the time was over.
    found: object = None
    problem = ""
    try:
        found = call(uri, Deadline(SHORT))
    except TimedOut as error:
        problem = str(error)
    if isinstance(found, list):
        assert not found[0].problem
        assert "not described in time" in found[-1].problem
    else:
        assert f"within {SHORT:g} s." in problem
    assert time.monotonic() - start < SHORT + 5


# A server that is not the same every time.

CHANGES: dict[str, tuple[bytes, str]] = {
    "size": (accepts(GO, 2 * MIB, CAN_MULTI_CONN), "the size was 1048576 and is 2097152"),
    "size-negative": (accepts(GO, 1 << 63, CAN_MULTI_CONN), "more than any device can have"),
    "size-gone": (accepts(GO, 0, CAN_MULTI_CONN), "the size was 1048576 and is 0"),
    "flags": (accepts(GO, MIB, CAN_MULTI_CONN | 2), "the flags was"),
    "blocks": (info_blocks(GO, 4096, 4096, 4096) + accepts(GO, MIB, CAN_MULTI_CONN), "the minimum block size was"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_server_that_changes_between_two_connections_is_refused(change: str) -> None:
    other, changed = CHANGES[change]
    turns = iter([accepts(GO, MIB, CAN_MULTI_CONN), other, other])
    with Server(answers(lambda _: [next(turns)])) as server:
        assert changed in str(refusal(_open_connections, server.uri("x")))


# Words that a terminal would act upon.


def test_names_and_descriptions_of_a_server_reach_a_terminal_only_escaped() -> None:
    described = [info(INFO, 1, ESCAPES) + info(INFO, 2, ESCAPES) + accepts(INFO)]
    listed = [entry(ESCAPES, ESCAPES) + ack(LIST)]
    with Server(answers(lambda option: listed if option == LIST else described)) as server:
        found = [export.to_wire() for export in list_exports(server.uri(), Deadline(SECONDS))]
    assert [export["name"].encode("utf-8", "surrogateescape") for export in found] == [ESCAPES]
    table = exports(found, Look(colour=False, width=200, terminal=True))
    assert all(line.isprintable() for line in table.split("\n"))
    assert "\\x1b]0;owned\\x07" in table
    assert len(table.split("\n")) == 2
    assert json.dumps(found, indent=2).isascii()


# The worker, in a process of its own.


class LoneWorker:
    """The process of tests/fakes/lone_worker.py. It must end in good order, without a word of complaint."""

    def __init__(self, seconds: float) -> None:
        ours, theirs = Channel.pair()
        ours.settimeout(SECONDS)
        self._sock = ours
        self._channel = Channel(ours)
        self._ids = itertools.count(1)
        command = [sys.executable, "-m", "tests.fakes.lone_worker", str(theirs.fileno()), str(seconds)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[3],
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        self.peak = 0
        """MiB of memory that it had at most; known once it has ended."""
        self.order("ping")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        try:
            peak, complaints = self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        # What it says there is the journal's.
        assert complaints == b""
        assert self._process.returncode == 0
        self.peak = int(peak)

    def order(self, order: str, **arguments: Any) -> list[Message]:
        """What it told on the way; raises the error that it replies."""
        number = next(self._ids)
        self._channel.send({"order": order, "id": number, **arguments})
        events = []
        while True:
            found = self._channel.wait()
            assert found is not None, "the worker ended"
            message, fds = found
            for fd in fds:
                os.close(fd)
            if "event" in message:
                events.append(message)
                continue
            assert message["id"] == number
            if "error" in message:
                raise NbddError.from_wire(message)
            return events

    def attach(self, uri: URI, _deadline: Deadline) -> None:
        self.order("attach", definition=Definition("hostile", (uri,)).to_wire(), resume=False)

    def list_exports(self, uri: URI, _deadline: Deadline) -> list[Export]:
        events = self.order("list-exports", uri=str(uri))
        return [Export.from_wire(wire) for event in events for wire in event["exports"]]

    @property
    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def wait_for_fds(self, count: int) -> None:
        """What the last order needed may be closed a moment after its reply."""
        end = time.monotonic() + SECONDS
        while self.fds != count:
            assert time.monotonic() < end, f"{self.fds} descriptors, not {count}"
            self.order("ping")


def test_worker_that_attaches_survives_every_attack_in_little_memory() -> None:
    with LoneWorker(SECONDS) as worker:
        before = worker.fds
        for misdeed in MISDEEDS.values():
            if GO in misdeed.options:
                with Server(misdeed.server(GO)) as server:
                    error = refusal(worker.attach, server.uri("x"))
                assert type(error) is misdeed.error
                assert misdeed.words in str(error)
        for serve, words in IMPOSTORS.values():
            with Server(serve) as server:
                assert words in str(refusal(worker.attach, server.uri("x")))
        with (
            Server(answers(lambda option: [GOOD[option]])) as server,
            pytest.raises(KernelError, match="no kernel here"),
        ):
            worker.attach(server.uri("x"), Deadline(SECONDS))
        worker.wait_for_fds(before)
    assert 0 < worker.peak < OPENING_MIB


def test_worker_that_lists_survives_every_attack_in_bounded_memory() -> None:
    with LoneWorker(SECONDS) as worker:
        before = worker.fds
        for misdeed in MISDEEDS.values():
            for option in {LIST, INFO} & set(misdeed.options):
                with Server(misdeed.server(option)) as server:
                    error = refusal(worker.list_exports, server.uri())
                assert type(error) is misdeed.error
                assert misdeed.words in str(error)
        for serve, words in IMPOSTORS.values():
            with Server(serve) as server:
                assert words in str(refusal(worker.list_exports, server.uri()))
        worker.wait_for_fds(before)
    assert 0 < worker.peak < LISTING_MIB


# One character beyond the others' range makes Python keep four bytes for each character of a string.
WIDE = "\U0001f600".encode()


@pytest.mark.parametrize(
    ("count", "name", "description"),
    [(100_000, WIDE + b"n" * 72, WIDE + b"d" * 76), (2040, WIDE + b"n" * 4092, b"\xff" * 4096)],
    ids=["many", "long"],
)
def test_list_of_the_largest_size_is_reported_in_bounded_memory(count: int, name: bytes, description: bytes) -> None:
    listed = [entry(name, description) * count, ack(LIST)]
    described = [info(INFO, 1, b"\xff" * 4096) + info(INFO, 2, WIDE + b"d" * 4092) + accepts(INFO)]
    with (
        Server(answers(lambda option: listed if option == LIST else described)) as server,
        LoneWorker(SECONDS) as worker,
    ):
        found = worker.list_exports(server.uri(), Deadline(SECONDS))
    assert len(found) == count
    assert found[0].description.encode() == WIDE + b"d" * 4092
    assert 0 < worker.peak < LISTING_MIB


def test_worker_times_out_on_a_server_that_takes_its_time() -> None:
    patience = Patience()
    with LoneWorker(SHORT) as worker, ExitStack() as stack:
        silent = stack.enter_context(Server(patience.silent(0)))
        slow = stack.enter_context(Server(patience.slow(18, PAUSE)))
        stack.callback(patience.over.set)
        for talk, server in ((worker.attach, silent), (worker.list_exports, silent), (worker.attach, slow)):
            assert type(refusal(talk, server.uri("x"), SHORT)) is TimedOut
        worker.order("ping")
