# SPDX-License-Identifier: MIT
"""The cache of snapshots, with QEMU replaced: what makes another one, who makes it, and which are removed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest import Guest, guest, host, qemu, snapshot
from tests.guest.errors import GuestError
from tests.guest.image import Image
from tests.guest.snapshot import Snapshot

SIZE = {"memory": 2048, "cpus": 2}
Make = Callable[[Snapshot], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBDD_GUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NBDD_GUEST_ACCEL", "tcg")
    monkeypatch.delenv(snapshot.VARIABLE, raising=False)
    monkeypatch.setattr(qemu, "machine", lambda: "QEMU 7.2")
    return tmp_path / "cache" / "snapshots"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    made = Image("debian12", tmp_path / "image")
    made.directory.mkdir()
    for path in (made.key, made.known_hosts, made.directory / "manifest.json"):
        path.write_text(path.name)
    return made


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "nbdd_1_all.deb"
    path.write_text("one")
    return path


@pytest.fixture
def made() -> list[Path]:
    return []


@pytest.fixture
def make(made: list[Path]) -> Make:
    def fill(empty: Snapshot) -> None:
        made.append(empty.directory)
        for path in (empty.saved.memory, empty.saved.devices, empty.disk):
            path.write_bytes(bytes(8192))

    return fill


def test_a_snapshot_is_made_once(image: Image, package: Path, make: Make, made: list[Path]) -> None:
    first, second = (snapshot.ensure(image, package, make, **SIZE) for _ in range(2))
    assert first == second
    assert len(made) == 1
    assert sorted(path.name for path in first.directory.iterdir()) == [
        "devices",
        "disk.qcow2",
        "manifest.json",
        "memory",
    ]


def test_two_at_once_make_one(image: Image, package: Path, make: Make, made: list[Path]) -> None:
    threads = [threading.Thread(target=snapshot.ensure, args=(image, package, make), kwargs=SIZE) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1


def test_each_thing_that_is_in_it_makes_another_key(
    image: Image, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**size: int) -> str:
        return snapshot.key(image, package, **{**SIZE, **size})

    keys = [key(), key(memory=512), key(cpus=1)]
    package.write_text("two")
    keys.append(key())
    image.known_hosts.write_text("another build of the same recipe")
    keys.append(key())
    monkeypatch.setattr(qemu, "machine", lambda: "QEMU 10.0")
    keys.append(key())
    monkeypatch.setenv("NBDD_GUEST_ACCEL", "kvm")
    keys.append(key())
    monkeypatch.setattr(snapshot, "QUIESCE", "sync")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_the_packages_name_and_age_are_no_part_of_the_key(image: Image, package: Path) -> None:
    before = snapshot.key(image, package, **SIZE)
    other = package.rename(package.with_name("nbdd_2_all.deb"))
    os.utime(other, (1, 1))
    assert snapshot.key(image, other, **SIZE) == before


def test_the_machine_is_qemus_version_its_arguments_and_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(host, "command", lambda argv, _what, **_more: f"version of {argv[0]}")
    before = qemu.machine()
    assert before.startswith("version of qemu-system-x86_64\n")
    monkeypatch.setattr(qemu, "KERNEL_COMMAND_LINE", "quiet")
    assert qemu.machine() != before


def test_one_that_fails_leaves_nothing_and_is_made_again(
    image: Image, package: Path, make: Make, made: list[Path], cache: Path
) -> None:
    def fail(empty: Snapshot) -> None:
        make(empty)
        raise GuestError("no boot")

    with pytest.raises(GuestError, match="no boot"):
        snapshot.ensure(image, package, fail, **SIZE)
    assert [path.name for path in cache.iterdir()] == ["debian12.lock"]
    assert snapshot.ensure(image, package, make, **SIZE).directory.is_dir()
    assert len(made) == 2


def test_what_a_killed_maker_left_is_removed(image: Image, package: Path, make: Make, cache: Path) -> None:
    left = cache / "debian12.making-dead"
    left.mkdir(parents=True)
    snapshot.ensure(image, package, make, **SIZE)
    assert not left.exists()


def test_those_used_least_recently_go_unless_a_guest_runs_on_them(image: Image, package: Path, make: Make) -> None:
    def ensure(content: str) -> Snapshot:
        package.write_text(content)
        return snapshot.ensure(image, package, make, **SIZE)

    found = [ensure("0"), ensure("1")]
    for number, each in enumerate(found):
        os.utime(each.directory, (1000 - number, 1000 - number))
    with found[1].in_use():
        # In use, and by that the last that was used, too: the other one goes.
        found.append(ensure("2"))
        assert [each.directory.exists() for each in found] == [False, True, True]
        os.utime(found[1].directory, (10, 10))
        found.append(ensure("3"))
        assert [each.directory.exists() for each in found] == [False, True, True, True]
    found.append(ensure("4"))
    assert [each.directory.exists() for each in found] == [False, False, False, True, True]
    assert len(list(found[-1].directory.parent.glob("debian12-*"))) == snapshot.KEPT


def test_one_of_another_release_is_not_counted(image: Image, package: Path, make: Make, tmp_path: Path) -> None:
    other = Image("debian13", image.directory)
    found = [snapshot.ensure(each, package, make, **SIZE) for each in (image, other)]
    package.write_text("two")
    found += [snapshot.ensure(each, package, make, **SIZE) for each in (image, other)]
    assert all(each.directory.is_dir() for each in found)
    assert tmp_path in found[0].directory.parents


def test_one_in_use_is_not_discarded(image: Image, package: Path, make: Make) -> None:
    found = snapshot.ensure(image, package, make, **SIZE)
    with found.in_use():
        found.discard()
        assert found.directory.is_dir()
    found.discard()
    assert not found.directory.exists()
    with pytest.raises(FileNotFoundError), found.in_use():
        pass


@pytest.mark.parametrize(("said", "restored"), [("yes", True), ("", True), ("no", False)])
def test_the_environment_can_have_each_guest_booted(said: str, restored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(snapshot.VARIABLE, said)
    assert snapshot.wanted() is restored
    monkeypatch.setenv(snapshot.VARIABLE, "perhaps")
    with pytest.raises(GuestError, match="NBDD_GUEST_SNAPSHOTS is 'perhaps'; it can be yes or no"):
        snapshot.wanted()


@pytest.fixture
def steps(image: Image, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a guest does to come up, in its order; nothing of it is done."""
    done: list[str] = []

    def fill(_guest: Guest, empty: Snapshot, _package: Path) -> None:
        done.append("fill")
        empty.saved.memory.write_bytes(b"")

    def start(_guest: Guest, *, restores: object = None) -> None:
        done.append("restore" if restores else "boot")

    monkeypatch.setattr(guest, "ensure", lambda _release: image)
    monkeypatch.setattr(host, "ensure_runtime", lambda: None)
    monkeypatch.setattr(Guest, "accelerator", "tcg")
    monkeypatch.setattr(Guest, "_fill", fill)
    monkeypatch.setattr(Guest, "_start", start)
    monkeypatch.setattr(Guest, "_make_overlay", lambda _guest, below, _kind: done.append(f"disk over {below.name}"))
    monkeypatch.setattr(Guest, "_connect", lambda *_: done.append("connect"))
    monkeypatch.setattr(Guest, "_wait_up", lambda *_: done.append("wait"))
    monkeypatch.setattr(Guest, "install", lambda *_: done.append("install"))
    monkeypatch.setattr(Guest, "run", lambda _guest, command, **_more: done.append(command.split()[0]))
    return done


RESTORED = ["disk over disk.qcow2", "restore", "connect", "date"]
BOOTED = ["disk over disk.raw", "boot", "wait", "install"]


def test_a_guest_is_restored_and_given_the_time_of_day(steps: list[str], package: Path) -> None:
    for number in range(2):
        made = Guest("debian12")
        made.come_up(package)
        assert steps == (["fill"] if number == 0 else []) + RESTORED
        assert [what for what, _ in made.costs] == ["restoring"]
        made.close()
        steps.clear()


def test_a_guest_that_is_not_restored_is_booted_and_the_snapshot_thrown_away(
    steps: list[str], package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise GuestError("QEMU failed to read it")

    monkeypatch.setattr(Guest, "_connect", fail)
    made = Guest("debian12")
    made.come_up(package)
    made.close()
    assert steps == ["fill", *RESTORED[:2], *BOOTED]
    assert list(cache.glob("debian12-*")) == []
    assert "debian12: no snapshot, so the guest is booted: QEMU failed to read it" in capsys.readouterr().err


def test_without_snapshots_a_guest_is_booted(steps: list[str], package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(snapshot.VARIABLE, "no")
    made = Guest("debian12")
    made.come_up(package)
    made.close()
    assert steps == BOOTED
