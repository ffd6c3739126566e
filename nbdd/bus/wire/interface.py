# SPDX-License-Identifier: MIT
"""D-Bus interfaces as their XML describes them; the XML is the reference, nothing is said twice."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

EMITS_CHANGED = "org.freedesktop.DBus.Property.EmitsChangedSignal"


@dataclass(frozen=True, slots=True)
class Method:
    """Signatures of a method's arguments, such as "sa{sv}"."""

    in_signature: str
    out_signature: str


@dataclass(frozen=True, slots=True)
class Property:
    """A readable property; `emits` is "true", "invalidates", "const" or "false"."""

    signature: str
    emits: str


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface; `xml` is its element, for Introspect."""

    name: str
    methods: Mapping[str, Method]
    properties: Mapping[str, Property]
    xml: str

    @staticmethod
    def parse(document: str) -> Interface:
        """Read the first interface of an introspection document that this tree ships."""
        # Only files of the package are read here, never what came over a wire.
        element = ET.fromstring(document).find("interface")  # noqa: S314
        if element is None:
            raise ValueError("no interface in the document")
        ET.indent(element)
        return Interface(
            name=element.attrib["name"],
            methods={
                method.attrib["name"]: Method(_signature(method, "in"), _signature(method, "out"))
                for method in element.iter("method")
            },
            properties={
                item.attrib["name"]: Property(
                    item.attrib["type"],
                    next(
                        (a.attrib["value"] for a in item.iter("annotation") if a.attrib["name"] == EMITS_CHANGED),
                        "true",
                    ),
                )
                for item in element.iter("property")
            },
            xml=ET.tostring(element, encoding="unicode"),
        )


def _signature(method: ET.Element, direction: str) -> str:
    return "".join(arg.attrib["type"] for arg in method.iter("arg") if arg.attrib.get("direction", "in") == direction)


INTROSPECTABLE = Interface.parse(
    """<node><interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="data" type="s" direction="out"/></method>
    </interface></node>"""
)
PEER = Interface.parse(
    """<node><interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
    </interface></node>"""
)
PROPERTIES = Interface.parse(
    """<node><interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{sv}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
    </interface></node>"""
)
OBJECT_MANAGER = Interface.parse(
    """<node><interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects">
      <arg name="objects" type="a{oa{sa{sv}}}" direction="out"/>
    </method>
    <signal name="InterfacesAdded">
      <arg name="object_path" type="o"/>
      <arg name="interfaces_and_properties" type="a{sa{sv}}"/>
    </signal>
    <signal name="InterfacesRemoved">
      <arg name="object_path" type="o"/>
      <arg name="interfaces" type="as"/>
    </signal>
    </interface></node>"""
)
