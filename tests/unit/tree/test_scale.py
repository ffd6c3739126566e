# SPDX-License-Identifier: MIT
"""The two sizes of the tests."""

from __future__ import annotations

import pytest

from tests.scale import VARIABLE, times


@pytest.mark.parametrize(("said", "number"), [(None, 3), ("", 3), ("quick", 3), ("full", 100)])
def test_run_is_quick_unless_asked_to_be_full(monkeypatch: pytest.MonkeyPatch, said: str | None, number: int) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(VARIABLE, said)
    assert times(3, 100) == number


def test_run_of_an_unknown_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fully")
    with pytest.raises(ValueError, match="'fully'; it can be quick or full"):
        times(3, 100)
