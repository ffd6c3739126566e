# SPDX-License-Identifier: MIT
from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdd.errors import Busy, KernelError, NoFreeDevice, NotAttached, TimedOut
from nbdd.kernel import genl
from nbdd.kernel.connection_watch import LinkDeadMonitor
from nbdd.kernel.family import Attr, Cmd, ServerFlags
from nbdd.kernel.netlink import NetlinkNBD
from nbdd.kernel.usage import Usage

FAMILY_ID = 0x1F
GROUP_ID = 9
Handler = Callable[[int, dict[int, bytes]], list[bytes]]


def datagram(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def message(command: int, payload: bytes = b"") -> bytes:
    return struct.pack("=BBH", command, 1, 0) + payload


class Kernel:
    """The other end: answers as genetlink does, with what a test's handler says."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.requests: list[tuple[int, dict[int, bytes]]] = []
        self.errno = 0
        self.reason = ""
        self.replies: list[bytes] = []
        self.stale = False
        self.silent = False
        self.present = True
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._theirs.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._theirs.close()

    def _serve(self) -> None:
        while True:
            data = self._theirs.recv(65536)
            if not data:
                return
            _, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
            command = data[16]
            attributes = dict(genl.attributes(data[20:]))
            if kind == genl.GENL_ID_CTRL:
                self._control(sequence)
                continue
            self.requests.append((command, attributes))
            if self.silent:
                continue
            if self.stale:
                self._send(datagram(FAMILY_ID, 0, sequence - 1, message(Cmd.CONNECT, genl.u32(Attr.INDEX, 99))))
                self._send(self._ack(sequence - 1, errno.EIO, ""))
            for reply in self.replies:
                self._send(datagram(FAMILY_ID, 0, sequence, reply))
            self._send(self._ack(sequence, self.errno, self.reason))

    def _control(self, sequence: int) -> None:
        if not self.present:
            self._send(self._ack(sequence, errno.ENOENT, ""))
            return
        group = genl.nested(1, genl.u32(2, GROUP_ID), genl.string(1, "nbd_mc_group"))
        content = genl.string(2, "nbd") + genl.attribute(1, struct.pack("=H", FAMILY_ID)) + genl.nested(7, group)
        self._send(datagram(genl.GENL_ID_CTRL, 0, sequence, message(1, content)))
        self._send(self._ack(sequence, 0, ""))

    def _ack(self, sequence: int, number: int, reason: str) -> bytes:
        words = genl.string(1, reason) if reason else b""
        flags = genl.NLM_F_CAPPED | (genl.NLM_F_ACK_TLVS if reason else 0)
        original = struct.pack("=IHHII", 16, FAMILY_ID, 5, sequence, 0)
        return datagram(genl.NLMSG_ERROR, flags, sequence, struct.pack("=i", -number) + original + words)

    def _send(self, data: bytes) -> None:
        # The side under test may have given up and gone.
        with contextlib.suppress(OSError):
            self._theirs.send(data)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    peer = Kernel()
    yield peer
    peer.close()


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    (tmp_path / "block").mkdir()
    return tmp_path


@pytest.fixture
def netlink(kernel: Kernel, sysfs: Path) -> Iterator[NetlinkNBD]:
    with NetlinkNBD(sock=kernel.ours, sysfs_root=str(sysfs), seconds=5) as opened:
        yield opened


@pytest.fixture
def connection() -> Iterator[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours.fileno()


def bind(netlink: NetlinkNBD, fd: int, **changes: object) -> int:
    arguments: dict[str, object] = {
        "fds": [fd],
        "size": 1 << 20,
        "block_size": 512,
        "server_flags": 0x1FF,
        "timeout": 0,
        "dead_timeout": 300,
        "backend": "backup",
        "busy_seconds": 0.0,
    }
    return netlink.connect(**{**arguments, **changes})  # type: ignore[arg-type]


def make_node(sysfs: Path, index: int, **files: str) -> Path:
    directory = sysfs / "block" / f"nbd{index}"
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text + "\n")
    return directory


def test_connect_returns_the_index_of_the_kernels_reply(netlink: NetlinkNBD, kernel: Kernel, connection: int) -> None:
    kernel.replies = [message(Cmd.CONNECT, genl.u32(Attr.INDEX, 7))]
    assert bind(netlink, connection) == 7


def test_connect_sends_what_the_kernel_needs_and_no_more(netlink: NetlinkNBD, kernel: Kernel, connection: int) -> None:
    kernel.replies = [message(Cmd.CONNECT, genl.u32(Attr.INDEX, 0))]
    bind(netlink, connection)
    command, sent = kernel.requests[-1]
    assert command == Cmd.CONNECT
    assert sent[Attr.BACKEND_IDENTIFIER] == b"backup\0"
    assert struct.unpack("=Q", sent[Attr.BLOCK_SIZE_BYTES]) == (512,)
    assert struct.unpack("=Q", sent[Attr.SIZE_BYTES]) == (1 << 20,)
    assert struct.unpack("=Q", sent[Attr.DEAD_CONN_TIMEOUT]) == (300,)
    assert struct.unpack("=Q", sent[Attr.CLIENT_FLAGS]) == (0,)
    # 0x80 is SEND_DF, which the kernel doesn't know.
    assert struct.unpack("=Q", sent[Attr.SERVER_FLAGS]) == (0x17F,)
    assert Attr.INDEX not in sent
    # 0 would put queue/io_timeout back to 30 seconds.
    assert Attr.TIMEOUT not in sent


def test_connect_gives_the_kernel_descriptors_of_its_own(netlink: NetlinkNBD, kernel: Kernel, connection: int) -> None:
    kernel.replies = [message(Cmd.CONNECT, genl.u32(Attr.INDEX, 0))]
    before = set(os.listdir("/proc/self/fd"))
    bind(netlink, connection, fds=[connection, connection])
    items = list(genl.attributes(kernel.requests[-1][1][Attr.SOCKETS]))
    sent = [struct.unpack("=I", dict(genl.attributes(item))[1])[0] for _, item in items]
    assert len(set(sent)) == 2
    assert connection not in sent
    assert set(os.listdir("/proc/self/fd")) == before


def test_connect_finds_the_device_in_sysfs_after_a_lost_reply(
    netlink: NetlinkNBD, sysfs: Path, connection: int
) -> None:
    make_node(sysfs, 4, pid="1", backend="backup")
    assert bind(netlink, connection) == 4


def test_netlink_ignores_answers_to_earlier_requests(netlink: NetlinkNBD, kernel: Kernel, connection: int) -> None:
    kernel.stale = True
    kernel.replies = [message(Cmd.CONNECT, genl.u32(Attr.INDEX, 2))]
    assert bind(netlink, connection) == 2


def test_netlink_command_without_an_answer_times_out(kernel: Kernel, connection: int) -> None:
    with NetlinkNBD(sock=kernel.ours, seconds=0.2) as netlink:
        kernel.silent = True
        with pytest.raises(TimedOut):
            bind(netlink, connection)


class Stuck(socket.socket):
    """A socket whose `send` waits for a gate, as sendmsg does while the kernel runs a command."""

    gate: threading.Event | None = None

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        assert self.gate is None or self.gate.wait(10)
        return super().send(data, flags)


def test_netlink_command_stuck_in_the_kernel_times_out(kernel: Kernel) -> None:
    sock = Stuck(fileno=kernel.ours.detach())
    with NetlinkNBD(sock=sock, seconds=0.2) as netlink:
        sock.gate = threading.Event()
        with pytest.raises(TimedOut, match="netlink command"):
            netlink.disconnect(0)
        sock.gate.set()


def test_netlink_command_stuck_in_the_kernel_is_nudged(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    monkeypatch.setattr("nbdd.kernel.bounded.NUDGE_SECONDS", 0.05)
    sock = Stuck(fileno=kernel.ours.detach())
    with NetlinkNBD(sock=sock, seconds=10) as netlink:
        sock.gate = threading.Event()
        netlink.disconnect(0, nudge=sock.gate.set)


def test_netlink_without_the_driver_says_how_to_load_it(kernel: Kernel) -> None:
    kernel.present = False
    with pytest.raises(KernelError, match="modprobe nbd"):
        NetlinkNBD(sock=kernel.ours, seconds=5)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EBUSY])
def test_connect_without_a_free_device_raises_no_free_device(
    netlink: NetlinkNBD, kernel: Kernel, connection: int, number: int
) -> None:
    kernel.errno = number
    with pytest.raises(NoFreeDevice, match="no free NBD device") as caught:
        bind(netlink, connection)
    assert caught.value.errno == number


def test_connect_to_a_taken_device_names_its_identifier(
    netlink: NetlinkNBD, kernel: Kernel, sysfs: Path, connection: int
) -> None:
    kernel.errno = errno.EBUSY
    make_node(sysfs, 3, pid="1", backend="archive")
    with pytest.raises(Busy, match=r"/dev/nbd3 is taken: it is bound as 'archive'"):
        bind(netlink, connection, index=3, busy_seconds=60)


def test_connect_to_a_device_of_another_program_names_the_process(
    netlink: NetlinkNBD, kernel: Kernel, sysfs: Path, connection: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.errno = errno.EBUSY
    make_node(sysfs, 3, pid="12345")
    with pytest.raises(Busy, match="bound by another program"):
        bind(netlink, connection, index=3)
    monkeypatch.setattr(Usage, "users", lambda *_: ["/dev/nbd3 is open in process 77 (nbd-client)"])
    with pytest.raises(Busy, match=r"process 77 \(nbd-client\)"):
        bind(netlink, connection, index=3)


def test_connect_to_a_device_that_is_only_open_is_tried_again(
    netlink: NetlinkNBD, kernel: Kernel, sysfs: Path, connection: int
) -> None:
    make_node(sysfs, 3)
    kernel.errno = errno.EBUSY
    with pytest.raises(Busy, match="taken"):
        bind(netlink, connection, index=3, busy_seconds=0.2)
    assert len(kernel.requests) > 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.EINVAL, "neither TCP nor a Unix stream"),
        (errno.ENOENT, "modprobe nbd"),
        (errno.ENOTSOCK, "not an open socket"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_connect_refused_by_the_kernel_is_a_sentence(
    netlink: NetlinkNBD, kernel: Kernel, connection: int, number: int, words: str
) -> None:
    kernel.errno = number
    with pytest.raises(KernelError, match=words) as caught:
        bind(netlink, connection)
    assert caught.value.errno == number
    assert str(caught.value).endswith(".")


def test_connect_error_has_the_kernels_own_reason(netlink: NetlinkNBD, kernel: Kernel, connection: int) -> None:
    kernel.errno = errno.EOPNOTSUPP
    kernel.reason = "the moon is full"
    with pytest.raises(KernelError, match="the moon is full"):
        bind(netlink, connection)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 0}, "0 bytes"),
        ({"size": 2**63}, "more than the kernel can address"),
        ({"block_size": 1000}, "power of two"),
        ({"block_size": 256}, "power of two"),
        ({"block_size": 131072}, "power of two"),
        ({"size": 600, "block_size": 1024}, "don't fill one block"),
        ({"fds": []}, "No connection"),
        ({"index": 1 << 20}, r"no /dev/nbd1048576; the last is /dev/nbd1048575"),
        ({"index": -1}, "no /dev/nbd-1"),
        ({"fds": [0, 0], "server_flags": int(ServerFlags.HAS_FLAGS)}, "connections to 1"),
    ],
)
def test_connect_refuses_what_the_kernel_would_get_wrong(
    netlink: NetlinkNBD, kernel: Kernel, connection: int, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(KernelError, match=words):
        bind(netlink, connection, **changes)
    assert not kernel.requests


def test_reconfigure_repeats_the_identity_and_sends_only_what_changes(netlink: NetlinkNBD, kernel: Kernel) -> None:
    netlink.reconfigure(5, backend="backup", timeout=0)
    command, sent = kernel.requests[-1]
    assert command == Cmd.RECONFIGURE
    assert sent == {
        Attr.INDEX: struct.pack("=I", 5),
        Attr.BACKEND_IDENTIFIER: b"backup\0",
        Attr.TIMEOUT: struct.pack("=Q", 0),
    }


def test_reconfigure_of_a_device_without_identity_sends_none(netlink: NetlinkNBD, kernel: Kernel) -> None:
    netlink.reconfigure(5, backend=None, size=4096, block_size=1024, dead_timeout=3)
    assert kernel.requests[-1][1] == {
        Attr.INDEX: struct.pack("=I", 5),
        Attr.SIZE_BYTES: struct.pack("=Q", 4096),
        Attr.BLOCK_SIZE_BYTES: struct.pack("=Q", 1024),
        Attr.DEAD_CONN_TIMEOUT: struct.pack("=Q", 3),
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (NotAttached, "not bound any more")),
        ({"pid": "1", "backend": "other"}, (NotAttached, "bound as 'other'")),
        ({"pid": "1", "backend": "backup"}, (KernelError, "being disconnected")),
    ],
)
def test_reconfigure_refused_says_what_the_device_is_now(
    netlink: NetlinkNBD, kernel: Kernel, sysfs: Path, files: dict[str, str], expected: tuple[type[Exception], str]
) -> None:
    make_node(sysfs, 5, **files)
    kernel.errno = errno.EINVAL
    with pytest.raises(expected[0], match=expected[1]):
        netlink.reconfigure(5, backend="backup", timeout=3)


def test_disconnect_of_a_device_that_is_not_there_succeeds(netlink: NetlinkNBD, kernel: Kernel, sysfs: Path) -> None:
    kernel.errno = errno.EINVAL
    netlink.disconnect(9)
    make_node(sysfs, 9)
    with pytest.raises(KernelError, match="disconnect /dev/nbd9"):
        netlink.disconnect(9)


def test_link_dead_monitor_reports_devices_by_index(sysfs: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs, LinkDeadMonitor(ours, FAMILY_ID, sysfs_root=str(sysfs)) as monitor:
        assert monitor.read() == []
        for index in (3, 3, 5):
            theirs.send(datagram(FAMILY_ID, 0, 0, message(Cmd.LINK_DEAD, genl.u32(Attr.INDEX, index))))
        theirs.send(datagram(FAMILY_ID, 0, 0, message(Cmd.STATUS, genl.u32(Attr.INDEX, 6))))
        theirs.send(datagram(FAMILY_ID + 1, 0, 0, message(Cmd.LINK_DEAD, genl.u32(Attr.INDEX, 7))))
        assert monitor.wait(5) == [3, 3, 5]


def test_link_dead_monitor_reports_every_bound_device_after_lost_reports(
    sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_node(sysfs, 1, pid="1")
    make_node(sysfs, 2)
    answers: list[OSError | None] = [OSError(errno.ENOBUFS, "no buffer space"), None]

    def receive(_sock: socket.socket) -> bytes:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return b""

    monkeypatch.setattr(genl, "receive", receive)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs, LinkDeadMonitor(ours, FAMILY_ID, sysfs_root=str(sysfs)) as monitor:
        assert monitor.read() == [1]


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        struct.pack("=IHHII", 8, 2, 0, 1, 0),
        struct.pack("=IHHII", 4000, 2, 0, 1, 0),
        datagram(FAMILY_ID, 0, 1, b"\x01"),
        datagram(FAMILY_ID, 0, 1, message(1, b"\x03\x00\x01\x00")),
        datagram(FAMILY_ID, 0, 1, message(1, b"\xff\xff\x01\x00")),
    ],
)
def test_genl_parser_yields_nothing_for_cut_messages(data: bytes) -> None:
    for _, _, _, content in genl.messages(data):
        answer = genl.generic(content)
        assert answer is None or not answer.attributes
