# SPDX-License-Identifier: MIT
"""Files of the configuration: what can be read, and what is reported of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdd.config.source import MAX_BYTES
from tests.fakes.config import Write, device, problems


def test_byte_order_mark_takes_no_column(write: Write) -> None:
    (found,) = problems(write("\ufeffdevices: 3\n"))
    assert found.startswith("nbdd.yaml:1:10: key 'devices': ")


def test_symbolic_link_to_nothing_is_reported(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").symlink_to("gone.yaml")
    (found,) = problems(tmp_path)
    assert found == "nbdd.yaml: can't be read: it is a link to 'gone.yaml', which does not exist."


def test_symbolic_link_to_itself_is_reported(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").symlink_to("nbdd.yaml")
    assert problems(tmp_path) == ["nbdd.yaml: can't be read: too many levels of symbolic links."]


def test_directory_pipe_and_device_in_place_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").mkdir()
    (tmp_path / "devices.d").mkdir()
    os.mkfifo(tmp_path / "devices.d" / "pipe.yaml")
    (tmp_path / "devices.d" / "zero.yaml").symlink_to("/dev/zero")
    kind = "it is a device, a pipe or a socket, not a regular file."
    assert problems(tmp_path) == [
        "nbdd.yaml: can't be read: it is a directory, not a regular file.",
        f"devices.d/pipe.yaml: can't be read: {kind}",
        f"devices.d/zero.yaml: can't be read: {kind}",
    ]


def test_file_without_permission_is_reported(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(device())

    def refuse(path: Path, _: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    # Tests may run as root, whom no file refuses.
    monkeypatch.setattr("nbdd.config.source.os.open", refuse)
    assert problems(directory) == ["nbdd.yaml: can't be read: permission denied."]


@pytest.mark.parametrize(
    ("content", "place"),
    [(b"devices: {}\n# \xff\n", "2:3"), (b"\xff\xfed\0", "1:1"), ("é: é\n# ".encode() + b"\xe9", "2:3")],
)
def test_file_that_is_not_utf_8_is_reported_with_the_bytes_place(write: Write, content: bytes, place: str) -> None:
    (found,) = problems(write(content))
    assert found.startswith(f"nbdd.yaml:{place}: the byte 0x")
    assert found.endswith("is not UTF-8; save the file as UTF-8.")


def test_reading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").mkdir()
    (tmp_path / "devices.d").mkdir()
    (tmp_path / "devices.d" / "a.yaml").write_text("[")
    problems(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    problems(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_that_is_too_large_is_refused_unread(write: Write) -> None:
    (found,) = problems(write(b"#" * (MAX_BYTES + 1)))
    assert found == "nbdd.yaml: is larger than 16 MiB; divide it into several files."
