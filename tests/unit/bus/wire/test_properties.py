# SPDX-License-Identifier: MIT
"""The names and the table of properties: they say what the XML, the manager and the callers' record say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from nbdd.bus.caller.device import DeviceView
from nbdd.bus.wire.interface import Interface
from nbdd.bus.wire.names import BUS_NAME, DEVICE_INTERFACE, MANAGER_INTERFACE, STATES
from nbdd.bus.wire.properties import DEVICE_PROPERTIES, FIELDS
from nbdd.data import read
from nbdd.errors import ConnectFailed
from nbdd.manager.status import State, Status
from tests.fakes.manager import ABSENT, PRESENT

TREE = Path(__file__).parents[4]


def test_properties_are_those_of_the_xml_with_their_types() -> None:
    reference = Interface.parse(read("org.nbdd1.Device.xml")).properties
    assert {item.name: item.signature for item in DEVICE_PROPERTIES} == {
        name: found.signature for name, found in reference.items()
    }


def test_properties_have_a_field_of_status_and_of_device_view_each() -> None:
    assert len(set(FIELDS.values())) == len(DEVICE_PROPERTIES)
    assert all(hasattr(Status, field) for field in FIELDS.values())
    assert [field.name for field in fields(DeviceView)] == list(FIELDS.values())


def test_properties_of_the_fake_manager_are_those_of_the_table() -> None:
    assert ABSENT.keys() == PRESENT.keys() == FIELDS.keys()


def test_states_are_those_of_the_manager() -> None:
    assert tuple(State) == STATES


def test_names_are_those_of_the_xml_the_bus_policy_and_the_errors() -> None:
    assert Interface.parse(read("org.nbdd1.Manager.xml")).name == MANAGER_INTERFACE
    assert Interface.parse(read("org.nbdd1.Device.xml")).name == DEVICE_INTERFACE
    assert f'own="{BUS_NAME}"' in (TREE / "dbus" / "org.nbdd1.conf").read_text()
    assert ConnectFailed.dbus_name == BUS_NAME + ".Error.ConnectFailed"
