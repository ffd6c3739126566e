# SPDX-License-Identifier: MIT
"""The poller: who watches is called, and nobody is called for what is somebody else's by now."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from functools import partial

import pytest

from nbdd.ipc.poller import Poller

LONG = 30.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            continue


def test_poller_calls_callback_with_events(pipe: tuple[int, int]) -> None:
    poller, told = Poller(), list[int]()
    poller.register(pipe[0], select.POLLIN, told.append)
    poller.run_once(0)
    os.write(pipe[1], b"x")
    poller.run_once(LONG)
    os.close(pipe[1])
    poller.run_once(LONG)
    assert told == [select.POLLIN, select.POLLIN | select.POLLHUP]


def test_poller_run_once_ends_after_its_time(pipe: tuple[int, int]) -> None:
    poller = Poller()
    poller.register(pipe[0], select.POLLIN, print)
    start = time.monotonic()
    poller.run_once(-1.0)
    poller.run_once(0.01)
    assert time.monotonic() - start < LONG


def test_poller_knows_its_descriptors(pipe: tuple[int, int]) -> None:
    poller = Poller()
    poller.register(pipe[0], select.POLLIN, print)
    assert (list(poller), len(poller)) == ([pipe[0]], 1)
    poller.unregister(pipe[0])
    assert list(poller) == []


def test_poller_drops_events_of_reused_descriptor() -> None:
    poller, told = Poller(), list[str]()
    pipes = [os.pipe(), os.pipe()]

    def swap(name: str, _events: int) -> None:
        """The first who is called replaces the other's pipe by one that is silent, under the same number."""
        told.append(name)
        other = pipes[name == "a"][0]
        poller.unregister(other)
        silent = os.pipe()
        os.dup2(silent[0], other)
        os.close(silent[0])
        pipes.append((silent[1], silent[1]))
        poller.register(other, select.POLLIN, partial(swap, "stranger"))

    for name, (reader, writer) in zip("ab", pipes, strict=True):
        poller.register(reader, select.POLLIN, partial(swap, name))
        os.write(writer, b"x")
    poller.run_once(LONG)
    assert len(told) == 1
    assert "stranger" not in told
    for fd in {fd for pair in pipes for fd in pair}:
        os.close(fd)


def test_poller_stopped_calls_no_further_callback() -> None:
    poller, called = Poller(), list[int]()
    pipes = [os.pipe() for _ in range(2)]

    def stop(_events: int) -> None:
        called.append(1)
        poller.stop(3)

    for read, write in pipes:
        poller.register(read, select.POLLIN, stop)
        os.write(write, b"x")
    poller.run_once(LONG)
    assert (called, poller.exit_code) == ([1], 3)
    for fd in (fd for pipe in pipes for fd in pipe):
        os.close(fd)
