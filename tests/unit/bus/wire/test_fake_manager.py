# SPDX-License-Identifier: MIT
"""The fake of nbdd on the bus answers as dbus/org.nbdd1.Manager.xml says."""

from __future__ import annotations

from typing import Any

import pytest

from nbdd.bus.wire.library import Message, MessageType, Variant
from tests.fakes.manager import ABSENT, RETURNS, TAKES, FakeManager

ARGUMENTS: dict[str, list[Any]] = {
    "": [],
    "sa{sv}": ["backup", {"name": Variant("s", "backup")}],
    "su": ["backup", 30],
}


@pytest.mark.parametrize("member", TAKES)
def test_fake_manager_answers_every_method_as_the_xml_says(member: str) -> None:
    fake = FakeManager("unix:path=/nonexistent")
    fake.devices["backup"] = ABSENT | {"Name": "backup"}
    body = ARGUMENTS[TAKES[member]]
    call: Any = Message("org.nbdd1", "/org/nbdd1", "org.nbdd1.Manager", member, signature=TAKES[member], body=body)
    call.serial, call.sender = 1, ":1.1"
    answer = fake._serve(call)
    assert isinstance(answer, Message)
    assert (answer.message_type, answer.signature) == (MessageType.METHOD_RETURN, RETURNS[member])
    fake._loop.close()


def test_fake_manager_refuses_a_method_of_another_interface() -> None:
    fake = FakeManager("unix:path=/nonexistent")
    call: Any = Message("org.nbdd1", "/org/nbdd1", "org.nbdd1.Device", "Reload")
    call.serial, call.sender = 1, ":1.1"
    answer = fake._serve(call)
    assert isinstance(answer, Message)
    assert answer.message_type is MessageType.ERROR
    fake._loop.close()
