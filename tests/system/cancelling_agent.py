# SPDX-License-Identifier: MIT
"""Runs in a guest, in a session: runs a command with an agent for polkit beside it whose person always says "Cancel".

python3 cancelling_agent.py COMMAND...    The last line of the output is what the person was asked.
"""

from __future__ import annotations

import asyncio
import os
import sys

from dbus_next import BusType, Message, MessageType, Variant
from dbus_next.aio import MessageBus

_PATH = "/org/nbdd1/TestAgent"
_POLKIT = "org.freedesktop.PolicyKit1"


async def main() -> int:
    """The command's exit code."""
    asked = []

    def answer(message: Message) -> Message | None:
        if (message.message_type, message.member) != (MessageType.METHOD_CALL, "BeginAuthentication"):
            return None
        asked.append(message.body[1])
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
    process = await asyncio.create_subprocess_exec(*sys.argv[1:], stdin=asyncio.subprocess.DEVNULL)
    status = await process.wait()
    print(*asked)
    return status


sys.exit(asyncio.run(main()))
