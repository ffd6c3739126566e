# SPDX-License-Identifier: MIT
from __future__ import annotations

import errno
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdd.errors import KernelError, NotAttached, TimedOut
from nbdd.kernel import udev
from nbdd.kernel.release import release
from nbdd.kernel.sysfs import Node
from nbdd.kernel.udev import settle


def packet(token: str, *, prefix: bytes = b"libudev\0", magic: bytes = b"\xfe\xed\xca\xfe") -> bytes:
    properties = f"ACTION=change\0SYNTH_UUID={token}\0SEQNUM=1\0".encode()
    header = struct.pack("=8s4sIIIIIII", prefix, magic, 40, 40, len(properties), 0, 0, 0, 0)
    return header + properties


class Udevd:
    """A udevd that reads the fake uevent files and answers on a socket pair, unless told to drop names."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "sys" / "block" / "nbd0"
        self.directory.mkdir(parents=True)
        (self.directory / "uevent").touch()
        self.control = root / "control"
        self.control.touch()
        (root / "dev").mkdir()
        (root / "dev" / "nbd0").touch()
        self.node = Node(0, sysfs=str(root / "sys"), dev=str(root / "dev"))
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.monitor = udev.Monitor(ours)
        self.handled: list[str] = []
        self.actions: list[str] = []
        self.drop: set[str] = set()
        self.on_handled: Callable[[str], None] = lambda _name: None

    def partition(self, number: int) -> None:
        directory = self.directory / f"nbd0p{number}"
        directory.mkdir()
        (directory / "uevent").touch()
        (directory / "partition").write_text(f"{number}\n")

    def trigger(self, _node: Node, name: str, token: str, action: str) -> bool:
        self.handled.append(name)
        self.actions.append(action)
        self.on_handled(name)
        if name not in self.drop:
            self._theirs.send(packet(udev.new_token()))
            self._theirs.send(packet(token))
        return True

    def close(self) -> None:
        self._theirs.close()


@pytest.fixture
def udevd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Udevd]:
    fake = Udevd(tmp_path)
    monkeypatch.setattr(udev, "trigger", fake.trigger)
    yield fake
    fake.close()
    with fake.monitor:
        pass


def settled(udevd: Udevd, seconds: float = 10.0) -> bool:
    return settle(udevd.node, seconds, control=str(udevd.control), monitor=udevd.monitor)


def test_settle_returns_when_the_tokens_of_disk_and_partitions_are_back(udevd: Udevd) -> None:
    udevd.partition(1)
    udevd.partition(2)
    assert settled(udevd)
    assert udevd.handled == ["nbd0", "nbd0p1", "nbd0p2"]


@pytest.mark.parametrize(("new", "action"), [(True, "add"), (False, "change")])
def test_settle_sends_add_for_a_new_disk_as_lvm_and_mdadm_wait_for_that(udevd: Udevd, new: bool, action: str) -> None:
    udevd.partition(1)
    assert settle(udevd.node, 10, new=new, control=str(udevd.control), monitor=udevd.monitor)
    assert udevd.actions == [action, "change"]


def test_settle_waits_for_partitions_that_appear_meanwhile(udevd: Udevd) -> None:
    def appear(name: str) -> None:
        if name == "nbd0":
            udevd.partition(1)

    udevd.on_handled = appear
    assert settled(udevd)
    assert udevd.handled == ["nbd0", "nbd0p1"]


def test_settle_does_not_wait_for_a_partition_that_goes_meanwhile(udevd: Udevd) -> None:
    udevd.partition(1)
    udevd.drop = {"nbd0p1"}

    def vanish(name: str) -> None:
        if name == "nbd0p1":
            for file in (udevd.directory / name).iterdir():
                file.unlink()
            (udevd.directory / name).rmdir()

    udevd.on_handled = vanish
    assert settled(udevd)


def test_settle_returns_false_if_udevd_never_finishes(udevd: Udevd) -> None:
    udevd.drop = {"nbd0"}
    assert not settled(udevd, 0.05)


def test_settle_calls_nudge_while_it_waits_for_udev(udevd: Udevd) -> None:
    udevd.drop.add("nbd0")
    looked: list[bool] = []
    assert not settle(
        udevd.node, 0.8, control=str(udevd.control), monitor=udevd.monitor, nudge=lambda: looked.append(True)
    )
    assert len(looked) >= 2


def test_settle_sends_lost_events_again_but_not_those_that_came(udevd: Udevd, monkeypatch: pytest.MonkeyPatch) -> None:
    udevd.partition(1)
    udevd.drop = {"nbd0p1"}
    real = udevd.monitor.tokens

    def tokens(seconds: float) -> list[str]:
        found = real(min(seconds, 0.01))
        if not found:
            udevd.drop.clear()
            udevd.monitor.lost = True
        return found

    monkeypatch.setattr(udevd.monitor, "tokens", tokens)
    assert settled(udevd)
    assert udevd.handled == ["nbd0", "nbd0p1", "nbd0p1"]


def test_udev_monitor_keeps_what_an_overflow_did_not_lose() -> None:
    class Full(socket.socket):
        full = True

        def recv(self, bufsize: int, flags: int = 0) -> bytes:
            if self.full:
                self.full = False
                raise OSError(errno.ENOBUFS, "no buffer space")
            return super().recv(bufsize, flags)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs, udev.Monitor(Full(fileno=ours.detach())) as monitor:
        theirs.send(packet("12-34"))
        assert monitor.tokens(5) == ["12-34"]
        assert monitor.lost


def test_settle_without_udevd_waits_for_nothing(udevd: Udevd) -> None:
    udevd.control.unlink()
    assert settled(udevd)
    assert udevd.handled == []


def test_scan_partitions_times_out_if_the_open_hangs(udevd: Udevd, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def hang(*_: object) -> int:
        go.wait(10)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", hang)
    with pytest.raises(TimedOut, match="its server doesn't answer"):
        settled(udevd, 0.05)
    go.set()


def test_scan_partitions_times_out_if_the_node_never_appears(udevd: Udevd) -> None:
    os.unlink(udevd.node.path)
    with pytest.raises(TimedOut, match="did not appear"):
        settled(udevd, 0.1)


def test_scan_partitions_opens_a_node_that_appears_late(udevd: Udevd) -> None:
    os.unlink(udevd.node.path)
    timer = threading.Timer(0.1, Path(udevd.node.path).touch)
    timer.start()
    assert settled(udevd)
    timer.join()


def test_udev_token_has_the_form_the_kernel_takes() -> None:
    token = udev.new_token()
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}", token)
    assert token != udev.new_token()


def test_udev_trigger_writes_action_and_token(tmp_path: Path) -> None:
    directory = tmp_path / "block" / "nbd0"
    directory.mkdir(parents=True)
    (directory / "uevent").touch()
    node = Node(0, sysfs=str(tmp_path))
    assert udev.trigger(node, "nbd0", "abc", "add")
    assert (directory / "uevent").read_bytes() == b"add abc"
    assert not udev.trigger(node, "nbd0p1", "abc", "add")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"change@/devices/virtual/block/nbd0\0ACTION=change\0SYNTH_UUID=x\0" + bytes(40),
        packet("x", prefix=b"libfoo\0\0"),
        packet("x", magic=b"\xca\xfe\xfe\xed"),
        packet("x")[:30],
    ],
)
def test_udev_message_that_libudev_did_not_send_has_no_token(data: bytes) -> None:
    assert udev.synthetic_token(data) is None


def test_udev_token_is_read_at_the_offset_of_the_header() -> None:
    assert udev.synthetic_token(packet("12-34")) == "12-34"


class Ender:
    """A NetlinkNBD that ends the fake device, or another one's."""

    def __init__(self, directory: Path, leave: str = "") -> None:
        self.directory = directory
        self.leave = leave
        self.asked: list[int] = []

    def disconnect(self, index: int, *, nudge: object = None) -> None:
        assert nudge is None
        self.asked.append(index)
        if self.leave:
            (self.directory / "backend").write_text(self.leave)
        else:
            (self.directory / "pid").unlink()
            (self.directory / "backend").unlink()


class Idle:
    def users(self, _node: Node) -> list[str]:
        return ["/dev/nbd0 is open in process 7 (cat)"]


@pytest.fixture
def bound(udevd: Udevd, monkeypatch: pytest.MonkeyPatch) -> Udevd:
    for name, text in (("pid", "1"), ("backend", "backup"), ("diskseq", "5")):
        (udevd.directory / name).write_text(text + "\n")
    monkeypatch.setattr(udev, "CONTROL", str(udevd.control))
    monkeypatch.setattr(udev, "settle", lambda *_args, **_more: True)
    return udevd


def test_release_returns_when_the_device_is_free(bound: Udevd) -> None:
    ender = Ender(bound.directory)
    assert release(ender, bound.node, "backup", 5, diskseq=5, force=True) == []  # type: ignore[arg-type]
    assert ender.asked == [0]


@pytest.mark.parametrize(("backend", "diskseq", "pid"), [("other", 5, 1), ("backup", 6, 1), ("backup", 5, 2)])
def test_release_leaves_another_device_of_the_same_index_alone(
    bound: Udevd, backend: str, diskseq: int, pid: int
) -> None:
    ender = Ender(bound.directory)
    with pytest.raises(NotAttached):
        release(ender, bound.node, backend, 5, diskseq=diskseq, pid=pid)  # type: ignore[arg-type]
    assert not ender.asked


def test_release_names_the_openers_that_are_left(bound: Udevd) -> None:
    ender = Ender(bound.directory, leave="backup")
    left = release(ender, bound.node, "backup", 0.05, force=True, usage=Idle())  # type: ignore[arg-type]
    assert left == ["/dev/nbd0 is open in process 7 (cat)"]


def test_release_of_an_index_that_is_taken_again_at_once_succeeds(bound: Udevd) -> None:
    ender = Ender(bound.directory, leave="next")
    assert release(ender, bound.node, "backup", 5, force=True) == []  # type: ignore[arg-type]


def test_udev_trigger_without_the_right_to_write_raises_kernel_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(KernelError, match="no event of nbd0 can be sent to udev"):
        udev.trigger(Node(0, sysfs=str(tmp_path)), "nbd0", "abc", "add")
