# SPDX-License-Identifier: MIT
"""Whether an export that came back is the same: the UUIDs on it, against those that udev found on the device."""

from __future__ import annotations

import errno
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nbdd.errors import NegotiationFailed, ServerError, TimedOut
from nbdd.kernel.sysfs import Node
from nbdd.kernel.usage import Usage
from nbdd.server import fingerprint
from nbdd.server.connect import Deadline
from nbdd.server.fingerprint import Fingerprint

MIB = 1 << 20
ONE, TWO = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
REQUEST = struct.Struct(">IHHQQI")


def answer(
    image: bytes, magic: int = 0x67446698, error: int = 0, *, backwards: bool = False
) -> Callable[[socket.socket], None]:
    """A server in its transmission phase, as far as reads go."""

    def serve(sock: socket.socket) -> None:
        # A client that is not content hangs up.
        with sock, sock.makefile("rb") as file, suppress(BrokenPipeError):
            replies: list[bytes] = []
            while octets := file.read(REQUEST.size):
                _, _, _, cookie, offset, length = REQUEST.unpack(octets)
                data = b"" if error else image[offset : offset + length]
                replies.append(struct.pack(">IIQ", magic, error, cookie) + data)
                if not backwards or len(replies) == 2:
                    sock.sendall(b"".join(reversed(replies)))
                    replies.clear()

    return serve


def mute(sock: socket.socket) -> None:
    """A server that reads and never answers."""
    with sock:
        while sock.recv(65536):
            pass


def look(
    size: int, serve: Callable[[socket.socket], None], *, seconds: float = 10, block_size: int = 512
) -> Fingerprint:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs,))
    thread.start()
    with ours:
        try:
            return fingerprint.of_export(ours, size, block_size, Deadline(seconds))
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("no mkfs.ext4 here")
    path = tmp_path_factory.mktemp("disk") / "image"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-U", ONE, path], check=True)
    return path.read_bytes()


@pytest.mark.parametrize("backwards", [False, True])
def test_fingerprint_of_an_export_has_the_uuid_of_its_filesystem(ext4: bytes, backwards: bool) -> None:
    assert look(len(ext4), answer(ext4, backwards=backwards)) == Fingerprint(filesystem=ONE)


def test_fingerprint_of_an_export_whose_size_is_no_multiple_of_the_block_size(ext4: bytes) -> None:
    image = ext4 + bytes(700)
    assert look(len(image), answer(image), block_size=4096) == Fingerprint(filesystem=ONE)


def test_fingerprint_of_an_empty_export_is_empty() -> None:
    assert look(100_000, answer(bytes(100_000))) == Fingerprint()


def test_fingerprint_of_a_server_that_fails_answers_nonsense_or_nothing_is_an_error() -> None:
    with pytest.raises(ServerError, match="could not read the export: Input/output error"):
        look(MIB, answer(b"", error=errno.EIO))
    with pytest.raises(NegotiationFailed, match="something else than a reply"):
        look(MIB, answer(bytes(MIB), magic=1))
    with pytest.raises(TimedOut):
        look(MIB, mute, seconds=0.2)


@pytest.mark.parametrize(
    ("one", "two", "difference"),
    [
        (Fingerprint(ONE), Fingerprint(ONE), ""),
        (Fingerprint(ONE), Fingerprint(TWO), f"the UUID of its filesystem was {ONE} and is {TWO}"),
        (Fingerprint("", ONE), Fingerprint("", TWO), f"the UUID of its partition table was {ONE} and is {TWO}"),
        (Fingerprint(ONE), Fingerprint(), ""),
        (Fingerprint(), Fingerprint(ONE), ""),
    ],
)
def test_fingerprint_difference_is_only_in_what_both_have(one: Fingerprint, two: Fingerprint, difference: str) -> None:
    assert one.difference(two) == difference


def device(tmp_path: Path, *, written: bool = False, claims: bool = False, busy: bool = False) -> Fingerprint:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b43:0").write_text(f"I:1\nE:ID_FS_UUID={ONE}\nE:ID_FS_TYPE=ext4\nE:ID_PART_TABLE_UUID=ab\n")
    if busy:
        (tmp_path / "queue").touch()
    node = SimpleNamespace(name="nbd0", devices=lambda: {"nbd0": "43:0", "nbd0p1": "43:1"})
    usage = SimpleNamespace(written=lambda _node: written, claims=lambda _node: ["mounted"] if claims else [])
    return fingerprint.of_device(cast(Node, node), cast(Usage, usage), udev=str(tmp_path))


def test_fingerprint_of_a_device_is_what_udev_found(tmp_path: Path) -> None:
    assert device(tmp_path) == Fingerprint(ONE, "ab")


def test_fingerprint_of_a_device_that_is_written_to_is_empty(tmp_path: Path) -> None:
    assert device(tmp_path, written=True, claims=True) == Fingerprint()


@pytest.mark.parametrize(("claims", "known"), [(False, Fingerprint()), (True, Fingerprint(ONE, "ab"))])
def test_fingerprint_while_udev_is_busy_needs_the_device_in_use(
    tmp_path: Path, claims: bool, known: Fingerprint
) -> None:
    assert device(tmp_path, busy=True, claims=claims) == known
