# SPDX-License-Identifier: MIT
"""The connection of nbdd to the system bus: how it claims the name, and what keeps it from that."""

from __future__ import annotations

import socket
import threading

import pytest

from nbdd.bus.daemon.connection import BusConnection
from nbdd.bus.wire.names import BUS_NAME
from nbdd.errors import NbddError
from tests.fakes.bus import DEADLINE, close, private_bus


@pytest.mark.usefixtures("address")
async def test_claim_of_a_second_instance_says_that_it_is_the_second() -> None:
    first, second = BusConnection(), BusConnection()
    await first.claim()
    with pytest.raises(NbddError, match=r"^Another nbdd is running: .*\.$"):
        await second.claim()
    await second.close()
    third = BusConnection()
    await first.close()
    await first.lost()
    await third.claim()
    for connection in (first, second, third):
        await close(connection._bus)


async def test_claim_refused_by_the_bus_policy_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with private_bus(f'<deny own="{BUS_NAME}"/>') as bus:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        connection = BusConnection()
        with pytest.raises(NbddError, match=r"The bus name org\.nbdd1 can't be owned: .*as root, with its bus policy"):
            await connection.claim()
        await close(connection._bus)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # dbus-next forgets the socket
@pytest.mark.parametrize("where", ["unix:path=/nonexistent/bus", "nonsense", "unix:what=1", ""])
async def test_claim_without_a_bus_says_so(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", where)
    with pytest.raises(NbddError, match=r"^The system bus can't be reached: .*dbus\.service\.$"):
        BusConnection()


@pytest.mark.parametrize("says", [b"", b"REJECTED EXTERNAL\r\n", b"OK 1234", b"OK 1234deadbeef\r\n"])
async def test_claim_fails_if_the_bus_hangs_up_during_authentication(
    says: bytes, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path_factory.mktemp("b") / "s"
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={path}")

    def serve(listener: socket.socket) -> None:
        conn, _ = listener.accept()
        with conn:
            conn.recv(100)
            conn.sendall(says)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        connection = BusConnection()
        with pytest.raises(NbddError, match=r"^The system bus does not let us in: .+\.$"):
            await connection.claim()
        await close(connection._bus)
        server.join(DEADLINE)
