# SPDX-License-Identifier: MIT
"""Calls that may hang: what becomes of them when their time is over, or when the caller is interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Never

import pytest

from nbdd.errors import KernelError, TimedOut
from nbdd.kernel import bounded as module
from nbdd.kernel.bounded import bounded

SECONDS = 30.0


class Interrupt(Exception):
    """As Ctrl-C is."""


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Called in another thread, it raises `Interrupt` in the main one, which waits for that."""

    def handler(_number: int, _frame: object) -> Never:
        came.set()
        raise Interrupt

    def now() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGALRM)
        assert came.wait(SECONDS)

    came = threading.Event()
    before = signal.signal(signal.SIGALRM, handler)
    yield now
    signal.signal(signal.SIGALRM, before)


def test_bounded_without_a_thread_raises_kernel_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(KernelError, match="no more threads"):
        bounded(lambda: None, 5, "stuck")


def test_bounded_leaves_no_thread_after_its_call() -> None:
    before = threading.active_count()
    assert bounded(lambda: 5, SECONDS, "stuck") == 5
    assert threading.active_count() == before


def test_bounded_raises_what_its_call_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, SECONDS, "stuck")


def test_bounded_call_that_comes_back_late_is_undone() -> None:
    gate, undone = threading.Event(), threading.Event()
    with pytest.raises(TimedOut, match="stuck"):
        bounded(lambda: gate.wait(SECONDS), 0.01, "stuck", late=lambda _result: undone.set())
    gate.set()
    assert undone.wait(SECONDS)


def test_bounded_holds_an_interruption_back_until_the_call_is_over(interrupt: Callable[[], None]) -> None:
    done = threading.Event()

    def call() -> None:
        interrupt()
        done.set()

    with pytest.raises(Interrupt):
        bounded(call, SECONDS, "stuck")
    assert done.is_set()


def test_bounded_call_that_hangs_holds_no_interruption_back_for_long(
    interrupt: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERRUPT_SECONDS", 0.05)
    gate, undone = threading.Event(), threading.Event()

    def call() -> bool:
        interrupt()
        return gate.wait(SECONDS)

    with pytest.raises(Interrupt):
        bounded(call, SECONDS, "stuck", late=lambda _result: undone.set())
    assert not undone.is_set()
    gate.set()
    assert undone.wait(SECONDS)


def test_bounded_undoes_the_result_of_an_interrupted_call(interrupt: Callable[[], None]) -> None:
    undone: list[str] = []

    def call() -> str:
        interrupt()
        return "a descriptor"

    with pytest.raises(Interrupt):
        bounded(call, SECONDS, "stuck", late=undone.append)
    assert undone == ["a descriptor"]
