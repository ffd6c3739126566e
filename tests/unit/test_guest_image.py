# SPDX-License-Identifier: MIT
"""The cache of guest images, with the building itself replaced."""

from __future__ import annotations

import dataclasses
import lzma
import os
import struct
import threading
from pathlib import Path

import pytest

from tests.guest import deb, image, recipe
from tests.guest.errors import GuestError
from tests.guest.recipe import Recipe
from tests.guest.scratch import PREFIX, Scratch


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds that were made, in a cache of the test's own."""
    made: list[str] = []

    def build(wanted: Recipe, target: image.Image) -> None:
        made.append(wanted.release)
        work = target.directory.parent / f"{wanted.release}.building-x"
        work.mkdir()
        (work / "manifest.json").write_text("{}")
        work.rename(target.directory)

    monkeypatch.setenv("NBDD_GUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image, "_build", build)
    return made


def test_an_image_is_built_once(builds: list[str]) -> None:
    first, second = image.ensure("debian12"), image.ensure("debian12")
    assert first == second
    assert builds == ["debian12"]


def test_two_at_once_build_once(builds: list[str]) -> None:
    threads = [threading.Thread(target=image.ensure, args=("debian13",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert builds == ["debian13"]


def test_a_changed_recipe_is_built_anew_and_the_old_image_removed(
    builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = image.ensure("debian12")
    monkeypatch.setattr(recipe, "PACKAGES", (*recipe.PACKAGES, "one-more"))
    new = image.ensure("debian12")
    assert builds == ["debian12", "debian12"]
    assert new.directory.is_dir()
    assert not old.directory.exists()


def test_an_old_image_stays_while_a_guest_runs_on_it(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    old = image.ensure("debian12")
    with old.in_use():
        monkeypatch.setattr(recipe, "PACKAGES", (*recipe.PACKAGES, "one-more"))
        image.ensure("debian12")
        assert old.directory.is_dir()
    monkeypatch.setattr(recipe, "PACKAGES", (*recipe.PACKAGES, "and-another"))
    image.ensure("debian12")
    assert not old.directory.exists()
    assert len(builds) == 3


def test_what_a_killed_build_left_is_removed(builds: list[str]) -> None:
    left = image.cache() / "debian12.building-dead"
    (left / "root").mkdir(parents=True)
    image.ensure("debian12")
    assert not left.exists()
    assert builds == ["debian12"]


def test_an_unknown_release_is_a_sentence() -> None:
    with pytest.raises(GuestError, match="no guest 'debian11'; choose from debian12, debian13"):
        image.ensure("debian11")


def test_the_releases_have_different_recipes_and_equal_ones_the_same_digest() -> None:
    one, other = recipe.recipe("debian12"), recipe.recipe("debian13")
    assert one.digest != other.digest
    assert one.digest == dataclasses.replace(one).digest


def test_the_packages_that_the_deb_depends_on_are_in_the_guest() -> None:
    wanted = {f"python3-{name}" for name in ("dbus-next", "sdnotify", "yaml", "jsonschema", "click", "rich")}
    assert wanted <= set(recipe.PACKAGES)


def test_the_kernel_inside_a_bzimage_is_found() -> None:
    kernel = b"\x7fELF" + bytes(1000)
    payload = lzma.compress(kernel) + struct.pack("<I", len(kernel))
    header = bytearray(512 * 3 + 100)
    header[0x1F1] = 2
    struct.pack_into("<II", header, 0x248, 100, len(payload))
    assert image._unpack_kernel(bytes(header) + payload + b"more") == kernel


def test_a_kernel_packed_otherwise_is_refused() -> None:
    header = bytearray(4096)
    struct.pack_into("<II", header, 0x248, 0, 100)
    with pytest.raises(GuestError, match="packed in a way that is not known"):
        image._unpack_kernel(bytes(header))


def test_the_newest_package_is_taken(tmp_path: Path) -> None:
    assert deb.newest(tmp_path) is None
    for age, name in enumerate(("nbdd_0.2_all.deb", "nbdd_0.10_all.deb", "nbdd_0.1_all.deb")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert deb.newest(tmp_path) == tmp_path / "nbdd_0.2_all.deb"


def test_a_missing_package_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"no nbdd package in .*: run `make deb` first"):
        deb.required(tmp_path)


def test_a_dead_owners_directory_is_removed_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alive = Scratch()
    dead = tmp_path / f"{PREFIX}dead"
    dead.mkdir()
    (dead / "lock").touch()
    unborn = tmp_path / f"{PREFIX}unborn"
    unborn.mkdir()
    other = Scratch()
    assert alive.directory.is_dir()
    assert not dead.exists()
    assert unborn.is_dir(), "it may be another's that is just being made"
    alive.remove()
    other.remove()
    assert not alive.directory.exists()
