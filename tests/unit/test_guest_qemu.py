# SPDX-License-Identifier: MIT
"""Which accelerator is taken, with KVM itself replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.guest import qemu
from tests.guest.errors import GuestError
from tests.guest.image import Image
from tests.guest.qemu import Accelerator

IMAGE = Image("debian13", Path("/nonexistent"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBDD_GUEST_CACHE", str(tmp_path))
    monkeypatch.delenv("NBDD_GUEST_ACCEL", raising=False)
    monkeypatch.setattr(os, "access", lambda *_: True)
    return tmp_path


def _verdict(monkeypatch: pytest.MonkeyPatch, *, boots: bool) -> list[Image]:
    tried: list[Image] = []

    def probe(image: Image) -> bool:
        tried.append(image)
        return boots

    monkeypatch.setattr(qemu, "_kvm_boots", probe)
    return tried


def test_kvm_is_taken_where_a_kernel_starts_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _verdict(monkeypatch, boots=True)
    assert qemu.accelerator(IMAGE) is Accelerator.KVM


def test_a_kvm_that_hangs_is_tried_once_and_remembered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = _verdict(monkeypatch, boots=False)
    assert [qemu.accelerator(IMAGE) for _ in range(3)] == [Accelerator.TCG] * 3
    assert len(tried) == 1
    assert "a kernel does not start under it: emulating (TCG)" in capsys.readouterr().err


@pytest.mark.parametrize("remembered", ['{"boot_id": "another", "accelerator": "kvm"}', "{", "[]", '{"boot_id": 1}'])
def test_what_was_remembered_of_another_boot_is_not_believed(
    remembered: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "accelerator.json").write_text(remembered)
    tried = _verdict(monkeypatch, boots=False)
    assert qemu.accelerator(IMAGE) is Accelerator.TCG
    assert len(tried) == 1


def test_without_dev_kvm_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _verdict(monkeypatch, boots=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert qemu.accelerator(IMAGE) is Accelerator.TCG
    assert not tried


def test_the_user_may_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _verdict(monkeypatch, boots=True)
    monkeypatch.setenv("NBDD_GUEST_ACCEL", "tcg")
    assert qemu.accelerator(IMAGE) is Accelerator.TCG
    monkeypatch.setenv("NBDD_GUEST_ACCEL", "xen")
    with pytest.raises(GuestError, match="it can be kvm or tcg"):
        qemu.accelerator(IMAGE)
    assert not tried
