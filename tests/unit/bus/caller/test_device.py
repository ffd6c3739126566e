# SPDX-License-Identifier: MIT
"""The record of a device, made from its properties on the bus."""

from __future__ import annotations

from nbdd.bus.caller.device import DeviceView
from nbdd.bus.wire.properties import FIELDS
from tests.fakes.manager import properties


def test_json_has_every_property_of_the_reference() -> None:
    assert set(FIELDS) == set(properties("org.nbdd1.Device"))


def test_properties_of_another_version_do_no_harm() -> None:
    device = DeviceView.of({"Name": "x", "Colour": "red"})
    assert (device.name, device.state, device.size) == ("x", "unknown", 0)
