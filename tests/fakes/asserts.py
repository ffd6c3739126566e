# SPDX-License-Identifier: MIT
"""What many tests wait for and insist on: a refusal, a condition, a coroutine's end without anything left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from nbdd.errors import NbddError

DEADLINE = 30.0
"""Seconds after which a test gives up on something that takes a moment."""

T = TypeVar("T")


async def refused(work: Awaitable[Any]) -> NbddError:
    """The error that `work` ends with."""
    try:
        await work
    except NbddError as error:
        return error
    raise AssertionError("not refused")


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until the condition holds, for what has no event to wait for."""
    while not condition():  # noqa: ASYNC110 - see above
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` with a deadline; an exception that is left unseen in a task or a future is a failure, too."""
    unseen: list[dict[str, Any]] = []

    async def bounded() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unseen.append(context))
        async with asyncio.timeout(DEADLINE):
            return await work

    try:
        return asyncio.run(bounded())
    finally:
        gc.collect()
        assert not unseen, unseen
