# SPDX-License-Identifier: MIT
"""Runs in a guest, as anybody: asks one thing of a device over and over, and waits for no answer.

python3 flood.py NAME COUNT
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from dbus_next import Message, MessageFlag

_BUS = "org.freedesktop.DBus"
_AT_ONCE = 100


def octets(message: Any) -> bytes:
    """As dbus-next itself sends it."""
    return bytes(message._marshall())


def main() -> None:
    """Ask for the statistics of the device."""
    name, count = sys.argv[1], int(sys.argv[2])
    hello = Message(destination=_BUS, path="/org/freedesktop/DBus", interface=_BUS, member="Hello", serial=1)
    question = Message(
        destination="org.nbdd1",
        path=f"/org/nbdd1/device/{name}",
        interface="org.nbdd1.Device",
        member="GetStatistics",
        flags=MessageFlag.NO_REPLY_EXPECTED,
        serial=2,
    )
    with socket.socket(socket.AF_UNIX) as bus:
        bus.connect("/run/dbus/system_bus_socket")
        bus.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        assert bus.recv(100).startswith(b"OK")
        bus.sendall(b"BEGIN\r\n" + octets(hello))
        assert bus.recv(4096)
        for _ in range(count // _AT_ONCE):
            bus.sendall(octets(question) * _AT_ONCE)


main()
