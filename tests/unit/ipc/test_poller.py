# SPDX-License-Identifier: MIT
"""The loop: who watches is called, and nobody is called for what is somebody else's by now."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from functools import partial

import pytest

from nbdd.ipc.poller import Loop

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


def test_who_watches_is_called_with_what_happened(pipe: tuple[int, int]) -> None:
    loop, told = Loop(), list[int]()
    loop.watch(pipe[0], select.POLLIN, told.append)
    loop.turn(0)
    os.write(pipe[1], b"x")
    loop.turn(LONG)
    os.close(pipe[1])
    loop.turn(LONG)
    assert told == [select.POLLIN, select.POLLIN | select.POLLHUP]


def test_a_turn_ends_when_its_time_is_over(pipe: tuple[int, int]) -> None:
    loop = Loop()
    loop.watch(pipe[0], select.POLLIN, print)
    start = time.monotonic()
    loop.turn(-1.0)
    loop.turn(0.01)
    assert time.monotonic() - start < LONG


def test_it_knows_what_is_watched(pipe: tuple[int, int]) -> None:
    loop = Loop()
    loop.watch(pipe[0], select.POLLIN, print)
    assert (list(loop), len(loop)) == ([pipe[0]], 1)
    loop.forget(pipe[0])
    assert list(loop) == []


def test_news_of_a_descriptor_that_is_another_by_now_are_told_to_nobody() -> None:
    loop, told = Loop(), list[str]()
    pipes = [os.pipe(), os.pipe()]

    def swap(name: str, _events: int) -> None:
        """The first who is called replaces the other's pipe by one that is silent, under the same number."""
        told.append(name)
        other = pipes[name == "a"][0]
        loop.forget(other)
        silent = os.pipe()
        os.dup2(silent[0], other)
        os.close(silent[0])
        pipes.append((silent[1], silent[1]))
        loop.watch(other, select.POLLIN, partial(swap, "stranger"))

    for name, (reader, writer) in zip("ab", pipes, strict=True):
        loop.watch(reader, select.POLLIN, partial(swap, name))
        os.write(writer, b"x")
    loop.turn(LONG)
    assert len(told) == 1
    assert "stranger" not in told
    for fd in {fd for pair in pipes for fd in pair}:
        os.close(fd)
