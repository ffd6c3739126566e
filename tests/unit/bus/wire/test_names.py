# SPDX-License-Identifier: MIT
"""Names of devices and their object paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdd.bus.wire.names import device_name, device_path


@pytest.mark.parametrize(
    ("name", "label"),
    [("backup", "backup"), ("a-b.c", "a_2db_2ec"), ("1st", "_31st"), ("a_b", "a_5fb"), ("é", "_c3_a9"), ("", "_")],
)
def test_object_path_is_escaped_as_systemd_does_it(name: str, label: str) -> None:
    assert device_path(name) == "/org/nbdd1/device/" + label


@given(st.text())
def test_object_path_gives_back_every_name(name: str) -> None:
    assert device_name(device_path(name)) == name


@pytest.mark.parametrize(
    "path", ["/org/nbdd1", "/org/nbdd1/device/a/b", "/org/nbdd1/device/a_zz", "/org/nbdd1/device/_ff"]
)
def test_object_path_of_no_device_has_no_name(path: str) -> None:
    assert device_name(path) is None
