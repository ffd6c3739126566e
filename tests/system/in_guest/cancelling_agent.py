# SPDX-License-Identifier: MIT
"""Runs in a guest, in a session: runs a command with an agent for polkit beside it whose person gives no password.

python3 cancelling_agent.py cancels COMMAND...    The person always says "Cancel".
python3 cancelling_agent.py thinks COMMAND...     The person says nothing, and the command is ended at the question; we
                                                  stay until the question is withdrawn.

The last line of the output is what the person was asked.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from dbus_next import BusType, Message, MessageType, Variant
from dbus_next.aio import MessageBus

_LIMIT = 60

_PATH = "/org/nbdd1/TestAgent"
_POLKIT = "org.freedesktop.PolicyKit1"


async def main() -> int:
    """The command's exit code."""
    way, *command = sys.argv[1:]
    asked: asyncio.Queue[str] = asyncio.Queue()
    withdrawn = asyncio.Event()

    def answer(message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL or message.path != _PATH:
            return None
        if message.member == "CancelAuthentication":
            withdrawn.set()
            return Message.new_method_return(message)
        asked.put_nowait(message.body[1])
        if way == "thinks":
            return True
        return Message.new_error(message, f"{_POLKIT}.Error.Cancelled", "The person said: Cancel")

    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    bus.add_message_handler(answer)
    session = ["unix-session", {"session-id": Variant("s", os.environ["XDG_SESSION_ID"])}]
    registered = await bus.call(
        Message(
            destination=_POLKIT,
            path=f"/{_POLKIT.replace('.', '/')}/Authority",
            interface=f"{_POLKIT}.Authority",
            member="RegisterAuthenticationAgent",
            signature="(sa{sv})ss",
            body=[session, "C", _PATH],
        )
    )
    assert registered is not None
    assert registered.message_type is MessageType.METHOD_RETURN, registered.body
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    question = await asked.get()
    if way == "thinks":
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(_LIMIT):
            await withdrawn.wait()
    status = await process.wait()
    print(question)
    return status


sys.exit(asyncio.run(main()))
