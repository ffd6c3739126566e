# SPDX-License-Identifier: MIT
"""The file for the textfile collector."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nbdd.errors import NbddError
from nbdd.metrics import textfile


def test_textfile_is_replaced_as_a_whole_and_others_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "nbdd.prom"
    path.write_text("old")
    with path.open() as reader:
        textfile.write(path, b"new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_textfile_that_can_not_be_written_leaves_the_old_one_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nbdd.prom"
    path.write_text("old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NbddError, match=r"^\S+/nbdd.prom can't be written: No space left on device.$"):
        textfile.write(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
