# SPDX-License-Identifier: MIT
"""Many D-Bus calls from one process in a guest, where a start of gdbus for each would take a second.

    caller.py together|in-turn TIMEOUT <CALLS

CALLS is a JSON list of {path, interface, member, signature, body, first}: `first` is a shell command to run before, and
in `body` {"key": ["u", 5]} stands for a{sv}, and {"": ["u", 5]} for v.
Prints a JSON list of {error, text, body, seconds}, `error` being "" where there was none.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from dbus_next import BusType, Message, MessageType, Variant
from dbus_next.aio import MessageBus


def value(given: Any) -> Any:
    """JSON as dbus-next wants it."""
    if isinstance(given, dict):
        variants = {key: Variant(*inner) for key, inner in given.items()}
        return variants.get("", variants)
    return given


def plain(given: Any) -> Any:
    """What came over the bus as JSON."""
    if isinstance(given, Variant):
        return plain(given.value)
    if isinstance(given, dict):
        return {key: plain(inner) for key, inner in given.items()}
    if isinstance(given, list):
        return [plain(inner) for inner in given]
    return given


async def call(bus: MessageBus, what: dict[str, Any], seconds: float) -> dict[str, Any]:
    if what["first"]:
        await (await asyncio.create_subprocess_shell(what["first"], stdin=asyncio.subprocess.DEVNULL)).wait()
    message = Message(
        destination="org.nbdd1",
        path=what["path"],
        interface=what["interface"],
        member=what["member"],
        signature=what["signature"],
        body=[value(given) for given in what["body"]],
    )
    start = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            reply = await bus.call(message)
    except TimeoutError:
        return {"error": "timeout", "text": f"no reply in {seconds:g} s", "body": [], "seconds": seconds}
    assert reply is not None
    failed = reply.message_type is MessageType.ERROR
    return {
        "error": reply.error_name if failed else "",
        "text": reply.body[0] if failed else "",
        "body": [] if failed else plain(reply.body),
        "seconds": time.monotonic() - start,
    }


async def main() -> None:
    together, seconds = sys.argv[1] == "together", float(sys.argv[2])
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    calls = [call(bus, what, seconds) for what in json.load(sys.stdin)]
    outcomes = await asyncio.gather(*calls) if together else [await one for one in calls]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    asyncio.run(main())
