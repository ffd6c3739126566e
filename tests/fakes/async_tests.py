# SPDX-License-Identifier: MIT
"""Runs `async def test_…`, each in an event loop of its own, with a deadline.

A fixture may give an async context manager: it is entered in the test's loop, and the test gets what it gives. A test
that leaves an exception unseen in a task or a future, or a descriptor open, fails.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.fakes.worker import open_fds

DEADLINE = 60.0
"""Seconds for one test, however busy the machine is."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    before = open_fds()
    unseen: list[dict[str, Any]] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unseen.append(context))
        async with asyncio.timeout(DEADLINE), AsyncExitStack() as stack:
            arguments = {name: await _entered(stack, pyfuncitem.funcargs[name]) for name in names}
            await pyfuncitem.obj(**arguments)

    try:
        asyncio.run(bounded())
    finally:
        gc.collect()
    assert not unseen, unseen
    assert open_fds() <= before, "the test left descriptors open"
    return True


async def _entered(stack: AsyncExitStack, argument: Any) -> Any:
    return await stack.enter_async_context(argument) if hasattr(argument, "__aenter__") else argument
